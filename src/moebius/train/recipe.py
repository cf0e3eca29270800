"""A training recipe: a TOML file as frozen, checked records. Unknown keys and impossible values are errors."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from moebius.config import FeedForwardConfig, ModelConfig, RopeConfig, RouterConfig
from moebius.errors import ConfigError
from moebius.train.corpus import KINDS

_Record = TypeVar("_Record")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class CorpusRecipe:
    """Which share of the documents is held out, and how many conversations are made from the others."""

    heldout_share: float = 0.045
    chat_examples: int = 4000
    seed: int = 1

    def __post_init__(self) -> None:
        _require(
            0.0 < self.heldout_share < 0.5,
            f"corpus.heldout_share is {self.heldout_share}; it must lie between 0 and 0.5",
        )
        _require(self.chat_examples >= 0, f"corpus.chat_examples is {self.chat_examples}; it must not be negative")


@dataclass(frozen=True, slots=True)
class MixtureRecipe:
    """How often an epoch passes over each kind of text."""

    library: int = 1
    tests: int = 1
    docs: int = 1
    chat: int = 1

    def __post_init__(self) -> None:
        for kind in KINDS:
            _require(getattr(self, kind) >= 0, f"mixture.{kind} is {getattr(self, kind)}; it must not be negative")
        _require(any(getattr(self, kind) for kind in KINDS), "mixture: every kind of text is passed over 0 times")


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """Size of the byte-level BPE vocabulary, special tokens included."""

    vocab_size: int = 4096

    def __post_init__(self) -> None:
        _require(
            259 <= self.vocab_size <= 65536,
            f"tokenizer.vocab_size is {self.vocab_size}; it must lie between 259 (bytes and special tokens) and 65536",
        )


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
        _require(self.init_std > 0, f"model.init_std is {self.init_std}; it must be positive")
        for name in ("hidden_size", "expert_width"):
            value = getattr(self, name)
            _require(
                value > 0 and value % 8 == 0,
                f"model.{name} is {value}; grouped matrix products need a positive multiple of 8",
            )
        _require(
            self.max_position_embeddings >= 1,
            f"model.max_position_embeddings is {self.max_position_embeddings}; it must be at least 1",
        )


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
        for name in ("steps", "rows_per_step", "row_length", "log_every", "evaluate_every", "evaluate_rows"):
            _require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), f"training.{name} is {value}; it must be a positive number")
        for name in ("weight_decay", "load_balance", "z_loss", "checkpoint_seconds"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), f"training.{name} is {value}; it must not be negative")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"training.{name} is {value}; it must be at least 0 and less than 1")
        _require(0 <= self.final_share <= 1, f"training.final_share is {self.final_share}; it must lie between 0 and 1")
        _require(
            0 <= self.warmup_steps < self.steps,
            f"training.warmup_steps is {self.warmup_steps}; it must be less than training.steps = {self.steps}",
        )


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
        m = self.model
        router = RouterConfig(num_experts=m.num_experts, top_k=m.experts_per_token, score="softmax", weight="renorm")
        return ModelConfig(
            model_type="qwen3_moe",
            hidden_size=m.hidden_size,
            num_layers=m.num_layers,
            num_heads=m.num_heads,
            num_kv_heads=m.num_kv_heads,
            head_dim=m.head_dim,
            vocab_size=self.tokenizer.vocab_size,
            max_position_embeddings=m.max_position_embeddings,
            rope=RopeConfig(theta=m.rope_theta),
            feed_forward=(FeedForwardConfig(width=m.expert_width, router=router),) * m.num_layers,
            windows=(None,) * m.num_layers,
            tie_word_embeddings=True,
            qk_norm="head",
        )


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
