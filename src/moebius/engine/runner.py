"""Runs the model on a step's inputs. Real, warm-up and empty steps take the same way."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.engine.expert_loads import ExpertCounts
from moebius.engine.kv_cache import KVCache
from moebius.models.decoder import Decoder
from moebius.nn.attention import PagedAttend
from moebius.ops.steps import StepInputs


class Runner:
    """A decoder and its KV cache. Nothing is kept between steps but what they write to the cache,
    and counts of what its routers chose."""

    def __init__(
        self, model: Decoder, cache: KVCache, device: torch.device, max_tokens: int = 2048
    ) -> None:
        self.model = model
        self.ops = model.ops
        self.cache = cache
        self.device = device
        self.expert_counts = ExpertCounts(model, device)
        one = self._zeros(1)
        with torch.inference_mode():
            self._forward, self._logits = self.ops.capture(
                self._compute, self._compute_logits, one, max_tokens
            )

    # Not around what calls them: a recorded step computes nothing in torch, and even this would
    # cost it time.
    @torch.inference_mode()
    def _compute(self, inputs: StepInputs) -> Tensor:
        attend = PagedAttend(
            self.ops,
            self.model.config,
            self.cache.layers,
            inputs,
            self.cache.block_size,
            self.cache.groups,
        )
        hidden_TD: Tensor = self.model(inputs.input_ids, inputs.positions, attend)[0]
        return hidden_TD

    @torch.inference_mode()
    def _compute_logits(self, hidden_TD: Tensor, rows_L: Tensor) -> Tensor:
        return self.model.logits(self.ops.embed(rows_L, hidden_TD))

    def execute(self, inputs: StepInputs) -> Tensor:
        """Compute the step, write its keys and values, and return its final hidden states (T, D),
        which are read until the next step.

        `logits` turns rows of it into logits, a few at a time: those of one long prompt would take
        gigabytes.
        """
        self.cache.last_used = time.monotonic()
        if inputs.states is not None:
            self.cache.clear_states(inputs.states.cleared)
            self.cache.copy_states(inputs.states.restores)
        hidden_TD = self._forward(inputs)
        if inputs.states is not None:
            self.cache.copy_states(inputs.states.saves)
        self.cache.last_used = time.monotonic()
        self.expert_counts.step()
        return hidden_TD

    def logits(self, hidden_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """(L, V) float32 of rows of the last step's hidden states; read until the next call."""
        return self._logits(hidden_TD, rows)

    def warm_up(self) -> None:
        """Run an empty step and one of a single token, so that the first request meets nothing for
        the first time."""
        for sequences in (0, 1):
            self.logits(self.execute(self._zeros(sequences)), range(sequences))
        self.expert_counts.clear()

    def _zeros(self, sequences: int) -> StepInputs:
        """A step of as many sequences of one token 0, all in block 0."""
        zeros = [[0]] * sequences
        others = [zeros] * (len(self.cache.layout.windows) - 1)
        size = self.cache.block_size
        return StepInputs.build(zeros, [0] * sequences, zeros, size, self.device, others=others)
