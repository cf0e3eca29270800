"""What training starts from: a new model of the recipe's, or a checkpoint to be fine-tuned."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.family import model_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.ranks import ExpertRank
from moebius.train.data import PreparedData
from moebius.train.initial import initial_weights
from moebius.train.ops import TrainingOps
from moebius.train.recipe import Recipe


class Start(ABC):
    """config.json, the architecture that it says, and the weights before the first step."""

    config_json: dict[str, Any]
    config: ModelConfig

    @abstractmethod
    def weights(self, ranks: ExpertRank | None) -> dict[str, Tensor]:
        """Float32 weights by name: of all parameters, or of those that lie at a rank."""


class Fresh(Start):
    """The recipe's own model with random weights, the same on any number of ranks."""

    def __init__(self, recipe: Recipe, data: PreparedData) -> None:
        raw = recipe.config_json(data.vocab_size)
        self.config = model_config(raw)
        raw |= {"eos_token_id": data.end_of_text, "pad_token_id": data.end_of_text}
        parts = self.config.feed_forward
        if any(part.router and part.router.score == "softmax" for part in parts):
            raw["router_aux_loss_coef"] = recipe.training.load_balance
        self.config_json = raw
        self._recipe = recipe

    def weights(self, ranks: ExpertRank | None) -> dict[str, Tensor]:
        whole = Decoder(self.config, TrainingOps(), device="meta")
        here = Decoder(self.config, TrainingOps(), device="meta", ranks=ranks)
        wanted = {name for name, _ in here.named_parameters()}
        training = self._recipe.training
        drawn = initial_weights(
            whole,
            torch.Generator().manual_seed(self._recipe.seed),
            self.config_json["initializer_range"],
            training.init_scale,
            training.router_init,
        )
        return {name: value for name, value in drawn if name in wanted}


class Tuned(Start):
    """The checkpoint that the recipe's finetune table names.

    Raises ConfigError or WeightsError where it does not fit.
    """

    def __init__(self, recipe: Recipe, data: PreparedData) -> None:
        base = recipe.base()
        assert base is not None
        self._checkpoint = open_checkpoint(base)
        self.config = self._checkpoint.config
        raw = dict(self._checkpoint.config_json)
        # What is tied was decided by the file's tensors, and is said as it was loaded.
        if model_config(raw).tie_word_embeddings != self.config.tie_word_embeddings:
            raw["tie_word_embeddings"] = self.config.tie_word_embeddings
        if data.vocab_size > self.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {data.vocab_size} entries, the checkpoint "
                f"{self.config.vocab_size}; they do not belong together"
            )
        recipe.check_trainable(self.config)
        self.config_json = raw

    def weights(self, ranks: ExpertRank | None) -> dict[str, Tensor]:
        decoder = load_decoder(
            self._checkpoint, torch.float32, ops=TrainingOps(), mapped=False, ranks=ranks
        )
        return {name: weight.detach() for name, weight in decoder.named_parameters()}


def start(recipe: Recipe, data: PreparedData) -> Start:
    """What the recipe says. Raises ConfigError or WeightsError for a checkpoint that does not
    fit."""
    return Fresh(recipe, data) if recipe.model is not None else Tuned(recipe, data)
