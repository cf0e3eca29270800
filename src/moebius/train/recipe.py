"""A training recipe: a TOML file as frozen, checked records. Unknown keys and impossible values are errors."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from moebius.config import ModelConfig
from moebius.errors import ConfigError
from moebius.models import model_config
from moebius.train.corpus import KINDS
from moebius.train.tokenizer import END_OF_TEXT, SPECIAL_TOKENS

_Record = TypeVar("_Record")
_INF = math.inf


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check(table: str, record: object, names: Iterable[str], must: str, holds: Callable[[Any], bool]) -> None:
    """ConfigError for the first of the fields `names` whose value is not what it `must` be."""
    for name in names:
        value = getattr(record, name)
        _require(holds(value), f"{table}.{name} is {value}; it must {must}")


@dataclass(frozen=True, slots=True)
class CorpusRecipe:
    """Which share of the documents is held out, and how many conversations are made from the others."""

    heldout_share: float = 0.045
    chat_examples: int = 4000
    seed: int = 1

    def __post_init__(self) -> None:
        _check("corpus", self, ["heldout_share"], "lie between 0 and 0.5", lambda x: 0 < x < 0.5)
        _check("corpus", self, ["chat_examples"], "not be negative", lambda x: x >= 0)


@dataclass(frozen=True, slots=True)
class MixtureRecipe:
    """How often an epoch passes over each kind of text."""

    library: int = 1
    tests: int = 1
    docs: int = 1
    chat: int = 1

    def __post_init__(self) -> None:
        _check("mixture", self, KINDS, "not be negative", lambda x: x >= 0)
        _require(any(getattr(self, kind) for kind in KINDS), "mixture: every kind of text is passed over 0 times")


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """Size of the byte-level BPE vocabulary, special tokens included."""

    vocab_size: int = 4096

    def __post_init__(self) -> None:
        bounds = "lie between 259 (bytes and special tokens) and 65536"
        _check("tokenizer", self, ["vocab_size"], bounds, lambda x: 259 <= x <= 65536)


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """The sizes of a qwen3_moe decoder with tied embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check("model", self, ["init_std"], "be positive", lambda x: x > 0)
        widths = ("hidden_size", "expert_width")
        must = "be a positive multiple of 8, which grouped matrix products need"
        _check("model", self, widths, must, lambda x: x > 0 and x % 8 == 0)
        counts = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "num_experts", "experts_per_token")
        _check("model", self, (*counts, "max_position_embeddings"), "be at least 1", lambda x: x >= 1)


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Steps, batch, optimiser, losses.

    A step takes rows_per_step rows of row_length tokens. The learning rate rises linearly over warmup_steps to
    learning_rate, then falls along a half cosine to final_share of it at the last step. weight_decay applies to
    matrices only. load_balance and z_loss are the weights of ST-MoE's auxiliary losses (arXiv 2202.08906, eq 6).
    """

    steps: int
    rows_per_step: int
    row_length: int
    learning_rate: float
    warmup_steps: int = 100
    final_share: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    load_balance: float = 0.01
    z_loss: float = 0.001
    log_every: int = 20
    evaluate_every: int = 500
    evaluate_rows: int = 64
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        counts = ("steps", "rows_per_step", "row_length", "log_every", "evaluate_every", "evaluate_rows")
        _check("training", self, counts, "be at least 1", lambda x: x >= 1)
        _check("training", self, ("learning_rate", "clip_norm"), "be a positive number", lambda x: 0 < x < _INF)
        weights = ("weight_decay", "load_balance", "z_loss", "checkpoint_seconds")
        _check("training", self, weights, "not be negative", lambda x: 0 <= x < _INF)
        _check("training", self, ("beta1", "beta2"), "be at least 0 and less than 1", lambda x: 0 <= x < 1)
        _check("training", self, ["final_share"], "lie between 0 and 1", lambda x: 0 <= x <= 1)
        _require(
            0 <= self.warmup_steps < self.steps,
            f"training.warmup_steps is {self.warmup_steps}; it must be less than training.steps = {self.steps}",
        )

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a half cosine (arXiv 1608.03983, eq 5) to the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        share = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * share


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a training run, beside the Python version whose standard library is the text."""

    name: str
    model: ModelRecipe
    training: TrainingRecipe
    seed: int = 1
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    mixture: MixtureRecipe = field(default_factory=MixtureRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)

    def __post_init__(self) -> None:
        _require(
            self.training.row_length <= self.model.max_position_embeddings,
            f"training.row_length = {self.training.row_length} exceeds model.max_position_embeddings = "
            f"{self.model.max_position_embeddings}",
        )
        _require(
            not (self.mixture.chat and not self.corpus.chat_examples),
            f"mixture.chat is {self.mixture.chat} but corpus.chat_examples is 0",
        )
        self.model_config()

    def model_config(self) -> ModelConfig:
        """The decoder that the recipe trains."""
        return model_config(self.config_json())

    def config_json(self) -> dict[str, Any]:
        """The config.json of the recipe's model, as transformers' Qwen3MoeForCausalLM reads it."""
        m = self.model
        return {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": m.hidden_size,
            "num_hidden_layers": m.num_layers,
            "num_attention_heads": m.num_heads,
            "num_key_value_heads": m.num_kv_heads,
            "head_dim": m.head_dim,
            "vocab_size": self.tokenizer.vocab_size,
            "max_position_embeddings": m.max_position_embeddings,
            "rope_theta": m.rope_theta,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "num_experts": m.num_experts,
            "num_experts_per_tok": m.experts_per_token,
            "moe_intermediate_size": m.expert_width,
            "intermediate_size": m.expert_width * m.experts_per_token,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "router_aux_loss_coef": self.training.load_balance,
            "initializer_range": m.init_std,
            "use_sliding_window": False,
            "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
            "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        }


def read_recipe(path: Path) -> Recipe:
    """Raises: ConfigError, naming the key, for anything that is missing, unknown, of a wrong type or impossible."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the recipe {path} is not TOML: {error}") from None
    return _record(Recipe, table, "")


def _record(cls: type[_Record], table: dict[str, Any], where: str) -> _Record:
    hints = get_type_hints(cls)
    names = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        _require(key in names, f"unknown recipe key {where}{key}; known are {', '.join(names)}")
    values = {}
    for name, f in names.items():
        if name in table:
            values[name] = _value(hints[name], table[name], f"{where}{name}")
        else:
            optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            _require(optional, f"the recipe lacks {where}{name}")
    return cls(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), f"{where} is {value!r}; it must be a table")
        return _record(kind, value, f"{where}.")  # type: ignore[arg-type]
    if kind is float and type(value) is int:
        return float(value)
    _require(type(value) is kind, f"{where} is {value!r}; it must be of type {kind.__name__}")
    return value
