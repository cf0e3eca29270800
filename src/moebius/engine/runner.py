"""Runs the model on a step's inputs. Real, warm-up and empty steps take the same way."""

import time

import torch
from torch import Tensor

from moebius.engine.kv_cache import KVCache
from moebius.models.decoder import Decoder
from moebius.nn.attention import PagedAttend
from moebius.ops.steps import StepInputs


class Runner:
    """A decoder and its KV cache. Nothing is kept between steps but what they write to the cache."""

    def __init__(self, model: Decoder, cache: KVCache, device: torch.device, max_tokens: int = 2048) -> None:
        self.model = model
        self.ops = model.ops
        self.cache = cache
        self.device = device
        one = StepInputs.build([[0]], [0], [[0]], [0], cache.block_size, device)
        with torch.inference_mode():
            self._forward = self.ops.capture(self._compute, one, max_tokens)

    def _compute(self, inputs: StepInputs) -> Tensor:
        attend = PagedAttend(self.ops, self.model.config, self.cache.layers, inputs, self.cache.block_size)
        hidden_TD: Tensor = self.model(inputs.input_ids, inputs.positions, attend)[0]
        return hidden_TD

    @torch.inference_mode()
    def execute(self, inputs: StepInputs) -> Tensor:
        """Compute the step, write its keys and values, and return the wanted rows' hidden states (L, D).

        `logits` turns rows of it into logits, a few at a time: those of one long prompt would take gigabytes.
        """
        self.cache.last_used = time.monotonic()
        hidden_TD = self._forward(inputs)
        self.cache.last_used = time.monotonic()
        return hidden_TD[inputs.logit_rows]

    @torch.inference_mode()
    def logits(self, hidden_LD: Tensor) -> Tensor:
        """(L, D) -> (L, V) float32."""
        return self.model.logits(hidden_LD)

    def warm_up(self) -> None:
        """Run an empty step and one of a single token, so that the first request meets nothing for the first time."""
        block_size = self.cache.block_size
        self.execute(StepInputs.build([], [], [], [], block_size, self.device))
        one = StepInputs.build([[0]], [0], [[0]], [0], block_size, self.device)
        self.logits(self.execute(one))
