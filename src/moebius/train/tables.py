"""The tables of a recipe, each a frozen record that checks itself."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic as p

from moebius.errors import ConfigError
from moebius.train.tokenizer import END_OF_TEXT

Share = Annotated[float, p.Field(ge=0, le=1)]
Below1 = Annotated[float, p.Field(ge=0, lt=1)]


def _absolute(name: str, info: p.ValidationInfo) -> str:
    """A path that starts at the recipe's folder."""
    if not name:
        return ""
    if "\0" in name:
        raise ConfigError(f"{name!r} is no path: it holds a zero byte")
    try:
        return str((Path(info.context or ".") / Path(name).expanduser()).resolve())
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{name!r} is no path: {error}") from None


def _model(name: str, info: p.ValidationInfo) -> str:
    """A directory that is there, or a name for moebius.models.hub."""
    return _absolute(name, info) if (Path(info.context or ".") / name).exists() else name


LocalPath = Annotated[str, p.AfterValidator(_absolute)]
LocalPaths = Annotated[
    tuple[LocalPath, ...], p.BeforeValidator(lambda x: tuple(x) if isinstance(x, list) else (x,))
]


@dataclass(frozen=True, slots=True)
class CorpusRecipe:
    """Where the text comes from, and which share of it is held out.

    files     paths by kind of text: text files, folders of them, or .jsonl whose objects have
              `text_key`. A kind's name is part of file names. In texts of the kind `chat` special
              tokens count as such, and a new tokenizer is not trained on them
    """

    files: Annotated[dict[str, LocalPaths], p.Field(min_length=1)]
    text_key: str = "text"
    heldout_share: Annotated[float, p.Field(gt=0, lt=0.5)] = 0.045

    def __post_init__(self) -> None:
        for kind in self.files:
            if not re.fullmatch(r"[\w-]{1,64}", kind):
                raise ConfigError(
                    f"corpus.files: a kind of text is called {kind!r}; its name must be letters, "
                    "digits, '-' and '_', 64 of them at most"
                )
            if kind == "all":
                raise ConfigError(
                    "corpus.files.all: `all` is what all kinds together are called; choose "
                    "another name"
                )


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """A byte-level BPE to be trained, or the tokenizer.json in `path`.

    vocab_size    entries to train, special tokens included; at least 259: bytes and these
    end_of_text   names the token that stands between documents
    """

    vocab_size: Annotated[int, p.Field(ge=259, le=2**16)] = 4096
    path: LocalPath = ""
    end_of_text: str = END_OF_TEXT


@dataclass(frozen=True, slots=True)
class FinetuneRecipe:
    """Start from a model directory of any supported type, with its tokenizer.

    train            `all`, `experts` (behind a router) or `all_but_experts`: without experts it
                     goes about as well, with nothing but experts badly (ST-MoE section 4.2)
    dropout          on what attention and feed-forward add to the residual stream, and within dense
                     feed-forwards
    expert_dropout   within experts behind a router (Switch section 2.4: 0.1 and 0.4)
    """

    checkpoint: Annotated[str, p.AfterValidator(_model)]
    train: Literal["all", "experts", "all_but_experts"] = "all"
    dropout: Below1 = 0.1
    expert_dropout: Below1 = 0.4


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """Steps, batch, optimiser, losses.

    A step takes rows_per_step rows of row_length tokens, in `accumulation` micro-batches, whose
    rows torchrun's ranks share evenly. The learning rate rises linearly over warmup_steps to
    learning_rate, then falls along a half cosine to final_share of it at the last step.
    weight_decay applies to matrices only.

    load_balance, z_loss   weights of the auxiliary losses (ST-MoE, arXiv 2202.08906, eq 6)
    balance          over which tokens the load is measured: each micro-`batch`, each `sequence`
                     (row), or `global`, the whole step's, which needs a forward pass more where a
                     step has several micro-batches
    first_choices    the load counts first choices only (GShard, ST-MoE)
    bias_rate        how much the selection bias moves after a step (arXiv 2408.15664)
    init_scale       new matrices are normal, initializer_range of the model wide and cut off at 3,
                     narrower into the residual stream; or, where it is given, sqrt(init_scale /
                     inputs) wide and cut off at 2 (Switch section 2.4: 0.1 in place of 1)
    router_init      multiplies the routers' initial weights
    dtype            of the decoder; masters, moments and routers are float32 in any case
    export_every     writes a model directory every so many steps; 0 for none
    tensorboard      writes metrics for TensorBoard too, which is to be installed (the extra
                     `tensorboard`)
    """

    steps: p.PositiveInt
    rows_per_step: p.PositiveInt
    row_length: p.PositiveInt
    learning_rate: p.PositiveFloat
    accumulation: p.PositiveInt = 1
    warmup_steps: p.NonNegativeInt = 100
    final_share: Share = 0.02
    beta1: Below1 = 0.9
    beta2: Below1 = 0.95
    weight_decay: p.NonNegativeFloat = 0.1
    clip_norm: p.PositiveFloat = 1.0
    load_balance: p.NonNegativeFloat = 0.01
    z_loss: p.NonNegativeFloat = 0.001
    balance: Literal["batch", "sequence", "global"] = "batch"
    first_choices: bool = False
    bias_rate: p.NonNegativeFloat = 0.0
    init_scale: p.NonNegativeFloat = 0.0
    router_init: p.PositiveFloat = 1.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    log_every: p.PositiveInt = 20
    evaluate_every: p.PositiveInt = 500
    evaluate_rows: p.PositiveInt = 64
    export_every: p.NonNegativeInt = 0
    tensorboard: bool = False
    checkpoint_seconds: p.NonNegativeFloat = 120.0

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"training.warmup_steps is {self.warmup_steps}; it must be less than "
                f"training.steps = {self.steps}"
            )
        if self.rows_per_step % self.accumulation:
            raise ConfigError(
                f"training.rows_per_step = {self.rows_per_step} is no multiple of "
                f"training.accumulation = {self.accumulation}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.row_length

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then a half cosine to the last step.

        (arXiv 1608.03983, eq 5.)
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        share = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * share
