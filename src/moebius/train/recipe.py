"""A training recipe: a TOML file as a frozen record; what is unknown or impossible is an error."""

import json
import re
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pydantic as p

from moebius.errors import ConfigError
from moebius.files import read_text
from moebius.models.config import ModelConfig
from moebius.models.family import model_config
from moebius.models.hub import resolve_model
from moebius.moe.config import FeedForwardConfig
from moebius.moe.training import TrainingRouting
from moebius.train.architecture import (
    check_model_table,
    check_trainable,
    check_written,
    config_json,
    dense_twin,
)
from moebius.train.tables import CorpusRecipe, FinetuneRecipe, TokenizerRecipe, TrainingRecipe


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a training run, beside the text itself.

    model     a config.json; of type `moebius`, its decoder's layers take the feed-forwards in
              `layers` in turn (moebius.train.architecture)
    mixture   how often an epoch passes over each kind of text
    """

    __pydantic_config__ = p.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    training: TrainingRecipe
    corpus: CorpusRecipe
    model: dict[str, Any] | None = None
    layers: tuple[FeedForwardConfig, ...] = ()
    seed: p.NonNegativeInt = 1
    mixture: dict[str, p.NonNegativeInt] = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    routing: TrainingRouting = field(default_factory=TrainingRouting)
    finetune: FinetuneRecipe | None = None

    def __post_init__(self) -> None:
        self._check_mixture()
        if (self.model is None) == (self.finetune is None):
            raise ConfigError(
                "the recipe needs either a model table, for a new model, or a finetune table, for "
                "a checkpoint"
            )
        if self.model is not None:
            whole = self.config_json(self.tokenizer.vocab_size)
            config = model_config(whole)
            self.check_trainable(config)
            check_model_table(self.model, self.layers, config)
            check_written(whole)
        elif self.layers or self.training.init_scale or self.training.router_init != 1:
            raise ConfigError(
                "layers, training.init_scale and training.router_init are for a new model, not "
                "for a finetune table"
            )

    def _check_mixture(self) -> None:
        kinds = self.corpus.files
        for kind in self.mixture:
            if kind not in kinds:
                raise ConfigError(
                    f"mixture.{kind} names no kind of text in corpus.files; there are "
                    f"{', '.join(kinds)}"
                )
        if not any(self.mixture.get(kind, 1) for kind in kinds):
            raise ConfigError("mixture: every kind of text is passed over 0 times")

    def config_json(self, vocab_size: int) -> dict[str, Any]:
        """The whole config.json of the new model, which the recipe must be for."""
        assert self.model is not None
        return config_json(self.model, self.layers, vocab_size)

    def check_trainable(self, config: ModelConfig) -> None:
        """ConfigError for a model, new or to be fine-tuned, that this recipe cannot train."""
        check_trainable(config, self.training, self.routing, self.finetune)

    def dense_twin(self) -> "Recipe":
        """The same run with a dense model that a token meets as many parameters of.

        Layers that are dense already stay as they are. ConfigError where there is nothing to do.
        """
        if self.model is None:
            raise ConfigError("--dense-twin needs a recipe with a model table")
        config = model_config(self.config_json(self.tokenizer.vocab_size))
        model, layers = dense_twin(self.model, config)
        return replace(self, name=f"{self.name}-dense", model=model, layers=layers)

    def base(self) -> Path | None:
        """The directory of the checkpoint to fine-tune; None for a new model.

        Raises ConfigError for a GGUF file, whose weights are mostly not to be trained.
        """
        if self.finetune is None:
            return None
        path = resolve_model(self.finetune.checkpoint)
        if not path.is_dir():
            raise ConfigError(
                f"finetune.checkpoint is the GGUF file {path}; fine-tuning starts from a directory "
                "with config.json and safetensors files"
            )
        return path

    def given_tokenizer(self) -> Path | None:
        """The tokenizer.json to use: its own or the checkpoint's; None to train one."""
        path = Path(self.tokenizer.path) if self.tokenizer.path else self.base()
        return path if path is None or path.is_file() else path / "tokenizer.json"


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file; relative paths in it start at its own folder.

    Raises ConfigError, naming the key, for what is missing, unknown, of a wrong type or impossible.
    """
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"the recipe {path} cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the recipe {path} is no UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the recipe {path} is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(
            f"the recipe {path} is not read: its lists or tables are nested too deeply"
        ) from None
    try:
        # As JSON, where strict means: an integer is a number too and a list a tuple, but nothing
        # else is converted.
        return p.TypeAdapter(Recipe).validate_json(
            json.dumps(table, default=str), context=path.parent
        )
    except p.ValidationError as error:
        raise ConfigError(_first(error)) from None


def _first(invalid: p.ValidationError) -> str:
    """One line about the first thing wrong: a misspelt key before the one it leaves missing."""
    unknown = "unexpected_keyword_argument"
    error = min(invalid.errors(), key=lambda e: e["type"] != unknown)
    names = [part for part in error["loc"] if isinstance(part, str)]
    where = ".".join(names)
    if error["type"] == unknown:
        record: Any = Recipe
        for name in names[:-1]:
            kind = get_type_hints(record)[name]
            record = next(option for option in (kind, *get_args(kind)) if is_dataclass(option))
        return f"unknown recipe key {where}; known are {', '.join(f.name for f in fields(record))}"
    if error["type"] == "missing":
        return f"the recipe lacks {where}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).replace("config.json: ", "model: ")
    return f"{where} is {error['input']!r}; {re.sub('.* should', 'it must', error['msg'])}"
