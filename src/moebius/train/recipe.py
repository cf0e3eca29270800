"""A training recipe: a TOML file as frozen, checked records. Unknown keys and impossible values are errors."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from moebius.config import TrainingRouting, require
from moebius.errors import ConfigError
from moebius.train.architecture import ModelRecipe, check_trainable
from moebius.train.corpus import KINDS
from moebius.train.fields import Below1, Count, Must, Natural, Positive, Share, Weight, check
from moebius.train.tokenizer import END_OF_TEXT

_Record = TypeVar("_Record")
_VOCABULARY = Must("lie between 259 (bytes and special tokens) and 65536", lambda x: 259 <= x <= 65536)


@dataclass(frozen=True, slots=True)
class CorpusRecipe:
    """Where the text comes from, and which share of it is held out.

    files           paths by kind of text: text files, folders of them, or .jsonl whose objects have `text_key`;
                    without any, the standard library of this Python
    chat_examples   how many conversations are made from the standard library's training documents
    """

    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    text_key: str = "text"
    heldout_share: Annotated[float, Must("lie between 0 and 0.5", lambda x: 0 < x < 0.5)] = 0.045
    chat_examples: Natural = 4000
    seed: int = 1

    def __post_init__(self) -> None:
        check("corpus", self)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.files) or KINDS


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """A byte-level BPE trained to `vocab_size` entries, special tokens included, or the tokenizer.json in `path`.

    end_of_text names the token that stands between documents.
    """

    vocab_size: Annotated[int, _VOCABULARY] = 4096
    path: str = ""
    end_of_text: str = END_OF_TEXT

    def __post_init__(self) -> None:
        check("tokenizer", self)


@dataclass(frozen=True, slots=True)
class FinetuneRecipe:
    """Start from a model directory of any supported type, with its tokenizer.

    train            `all`, `experts` (behind a router) or `all_but_experts`: without experts it goes about as well,
                     with nothing but experts badly (ST-MoE section 4.2)
    dropout          on what attention and feed-forward add to the residual stream, and within dense feed-forwards
    expert_dropout   within experts behind a router (Switch section 2.4: 0.1 and 0.4)
    """

    checkpoint: str
    train: Literal["all", "experts", "all_but_experts"] = "all"
    dropout: Below1 = 0.1
    expert_dropout: Below1 = 0.4

    def __post_init__(self) -> None:
        check("finetune", self)


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Steps, batch, optimiser, losses.

    A step takes rows_per_step rows of row_length tokens, in `accumulation` micro-batches, which torchrun's ranks share
    out. The learning rate rises linearly over warmup_steps to learning_rate, then falls along a half cosine to
    final_share of it at the last step. weight_decay applies to matrices only.

    load_balance, z_loss   weights of the auxiliary losses (ST-MoE, arXiv 2202.08906, eq 6)
    balance          over which tokens the load is measured: each micro-`batch`, each `sequence` (row), or `global`, the
                     whole step's, which needs a forward pass more where a step has several micro-batches
    first_choices    the load counts first choices only (GShard, ST-MoE)
    bias_rate        how much the selection bias moves after a step (arXiv 2408.15664)
    dtype            of the decoder; masters, moments and routers are float32 in any case
    export_every     writes a model directory every so many steps; 0 for none
    tensorboard      writes metrics for TensorBoard too, which is to be installed (the extra `tensorboard`)
    """

    steps: Count
    rows_per_step: Count
    row_length: Count
    learning_rate: Positive
    accumulation: Count = 1
    warmup_steps: int = 100
    final_share: Share = 0.02
    beta1: Below1 = 0.9
    beta2: Below1 = 0.95
    weight_decay: Weight = 0.1
    clip_norm: Positive = 1.0
    load_balance: Weight = 0.01
    z_loss: Weight = 0.001
    balance: Literal["batch", "sequence", "global"] = "batch"
    first_choices: bool = False
    bias_rate: Weight = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    log_every: Count = 20
    evaluate_every: Count = 500
    evaluate_rows: Count = 64
    export_every: Natural = 0
    tensorboard: bool = False
    checkpoint_seconds: Weight = 120.0

    def __post_init__(self) -> None:
        check("training", self)
        require(
            0 <= self.warmup_steps < self.steps,
            f"training.warmup_steps is {self.warmup_steps}; it must be less than training.steps = {self.steps}",
        )
        require(
            self.rows_per_step % self.accumulation == 0,
            f"training.rows_per_step = {self.rows_per_step} is no multiple of training.accumulation = "
            f"{self.accumulation}",
        )

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.row_length

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a half cosine (arXiv 1608.03983, eq 5) to the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        share = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * share


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a training run, beside the text itself. mixture: how often an epoch passes over each kind."""

    name: str
    training: TrainingRecipe
    model: ModelRecipe | None = None
    seed: int = 1
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    mixture: dict[str, int] = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    routing: TrainingRouting = field(default_factory=TrainingRouting)
    finetune: FinetuneRecipe | None = None

    def __post_init__(self) -> None:
        for kind, copies in self.mixture.items():
            known = ", ".join(self.corpus.kinds)
            require(kind in self.corpus.kinds, f"mixture.{kind} names no kind of text; there are {known}")
            require(copies >= 0, f"mixture.{kind} is {copies}; it must not be negative")
        passes = {kind: self.mixture.get(kind, 1) for kind in self.corpus.kinds}
        require(any(passes.values()), "mixture: every kind of text is passed over 0 times")
        require(
            bool(self.corpus.files) or not passes["chat"] or self.corpus.chat_examples > 0,
            f"mixture.chat is {passes.get('chat')} but corpus.chat_examples is 0",
        )
        require(
            (self.model is None) != (self.finetune is None),
            "the recipe needs either a model table, for a new model, or a finetune table, for a checkpoint",
        )
        if self.model is not None:
            self._check_model(self.model)

    def _check_model(self, model: ModelRecipe) -> None:
        require(
            self.training.row_length <= model.max_position_embeddings,
            f"training.row_length = {self.training.row_length} exceeds model.max_position_embeddings = "
            f"{model.max_position_embeddings}",
        )
        require(
            self.routing.second_policy == "all" or model.experts_per_token > 1 or not model.num_experts,
            "routing.second_policy needs model.experts_per_token of 2 or more; a single choice has no second",
        )
        require(
            not self.training.bias_rate or model.selection_bias or not model.num_experts,
            f"training.bias_rate is {self.training.bias_rate}, but model.selection_bias is false",
        )
        check_trainable(model.config(self.tokenizer.vocab_size))

    def dense_twin(self) -> Recipe:
        """The same run with a dense model of as many parameters as a token of this one uses."""
        require(self.model is not None, "--dense-twin needs a recipe with a model table")
        assert self.model is not None
        return replace(self, name=f"{self.name}-dense", model=self.model.dense_twin())


def read_recipe(path: Path) -> Recipe:
    """Raises: ConfigError, naming the key, for anything that is missing, unknown, of a wrong type or impossible.

    Relative paths in it start at its own folder.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the recipe {path} is not TOML: {error}") from None
    recipe = _record(Recipe, table, "")

    def absolute(name: str) -> str:
        return str((path.parent / Path(name).expanduser()).resolve()) if name else ""

    files = {kind: tuple(map(absolute, names)) for kind, names in recipe.corpus.files.items()}
    start = recipe.finetune
    if start is not None and (path.parent / start.checkpoint).exists():
        start = replace(start, checkpoint=absolute(start.checkpoint))
    return replace(
        recipe,
        corpus=replace(recipe.corpus, files=files),
        tokenizer=replace(recipe.tokenizer, path=absolute(recipe.tokenizer.path)),
        finetune=start,
    )


def _record(cls: type[_Record], table: dict[str, Any], where: str) -> _Record:
    hints = get_type_hints(cls)
    names = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in table:
        require(key in names, f"unknown recipe key {where}{key}; known are {', '.join(names)}")
    values = {}
    for name, f in names.items():
        if name in table:
            values[name] = _value(hints[name], table[name], f"{where}{name}")
        else:
            optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
            require(optional, f"the recipe lacks {where}{name}")
    return cls(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"{where} is {value!r}; it must be a table")
        return _record(kind, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(kind) is dict:
        require(isinstance(value, dict), f"{where} is {value!r}; it must be a table")
        return {key: _value(get_args(kind)[1], entry, f"{where}.{key}") for key, entry in value.items()}
    if get_origin(kind) is tuple:
        return tuple(_value(str, entry, where) for entry in (value if isinstance(value, list) else [value]))
    if get_origin(kind) is Literal:
        kind = str
    if kind is float and type(value) is int:
        return float(value)
    require(type(value) is kind, f"{where} is {value!r}; it must be of type {kind.__name__}")
    return value
