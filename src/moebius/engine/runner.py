"""Runs the model on a step's inputs. Real, warm-up and empty steps take the same way."""

import time
from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from moebius.engine.expert_loads import ExpertCounts
from moebius.engine.kv_cache import KVCache
from moebius.engine.programs import StepPrograms
from moebius.engine.workspace import StepRows, Workspace
from moebius.models.decoder import Decoder
from moebius.ops.steps import StepInputs


class Runner:
    """A decoder and its KV cache. From step to step it keeps only what its routers chose.

    rows and planned are as in StepPrograms.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        device: torch.device,
        rows: StepRows = StepRows(2048, 2048),  # noqa: B008 - it cannot be changed
        planned: Workspace | None = None,
    ) -> None:
        self.model = model
        self.ops = model.ops
        self.cache = cache
        self.device = device
        self.expert_counts = ExpertCounts(model, device)
        self.programs = StepPrograms(model, cache, device, rows, planned)
        self._rows = rows
        self._num_rows = 0

    def execute(self, inputs: StepInputs) -> Tensor:
        """Compute the step; its final hidden states (T, D), which are read until the next one.

        `logits` turns rows of them into logits, a few at a time: a long prompt's take gigabytes.
        """
        self.cache.last_used = time.monotonic()
        if not self.programs.current:
            self.programs = StepPrograms(self.model, self.cache, self.device, self._rows)
        self._num_rows = 0  # should the step fail, none has logits
        if inputs.states is not None:
            self.cache.clear_states(inputs.states.cleared)
            self.cache.copy_states(inputs.states.restores)
        hidden_TD = self.programs.hidden(inputs)
        if inputs.states is not None:
            self.cache.copy_states(inputs.states.saves)
        self._num_rows = len(hidden_TD)
        self.cache.last_used = time.monotonic()
        self.expert_counts.step()
        return hidden_TD

    def execute_empty(self) -> None:
        """Take part in a step without a token of one's own, where other ranks have some."""
        self.execute(self._zeros(0))

    def logits(self, rows: Iterable[int], shared: bool = False) -> Tensor:
        """(L, V) float32 of rows of the last step; read until the next call.

        shared: all ranks call it at once, for few rows each.
        Raises IndexError for a row that the step did not have.
        """
        wanted = array("q", rows)
        if max(wanted, default=-1) >= self._num_rows:
            raise IndexError(f"the last step had {self._num_rows} rows, not row {max(wanted)}")
        return self.programs.logits(wanted, shared)

    def warm_up(self) -> None:
        """Run an empty step and one of one token: the first request meets nothing new."""
        for sequences in (0, 1):
            self.execute(self._zeros(sequences))
            self.logits(range(sequences))
            if self.programs.shared is not None and self.programs.shared.usable:
                self.logits(range(sequences), shared=True)
        self.expert_counts.clear()

    def _zeros(self, sequences: int) -> StepInputs:
        """A step of as many sequences of one token 0, all in block 0."""
        zeros = [[0]] * sequences
        others = [zeros] * (len(self.cache.layout.windows) - 1)
        size = self.cache.block_size
        return StepInputs.build(zeros, [0] * sequences, zeros, size, self.device, others=others)
