"""Runs the model on a step's inputs. Real, warm-up and empty steps take the same way."""

import logging
import time
from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from moebius.engine.expert_loads import ExpertCounts
from moebius.engine.kv_cache import KVCache
from moebius.engine.workspace import StepRows, Workspace, forward, head
from moebius.models.decoder import Decoder
from moebius.ops.program import Program
from moebius.ops.steps import Step, StepInputs

log = logging.getLogger(__name__)


class Runner:
    """A decoder and its KV cache. From step to step it keeps only what its routers chose.

    rows: how many a step has at most. planned: what plan_workspace said of these.
    """

    _step: Program[StepInputs]
    _head: "Program[array[int]]"

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
        self._rows = rows
        self._last = torch.empty(0)
        self._num_rows = 0
        self._record(planned)

    def _record(self, planned: Workspace | None = None) -> None:
        """Programs of the model as it lies in memory now."""
        self._moves = self.model.moves
        step = planned.step if planned else None
        logits = planned.head if planned else None
        steps = self._rows.step_source(len(self.cache.layout.windows))
        self._step = self.ops.record(self._hidden, steps, self.device, step)
        if not self._step.trace.recorded:  # its results are elsewhere each time
            logits = self._step.trace
        self._head = self.ops.record(self._logits, self._rows.head_source(), self.device, logits)
        for what, program in (("steps", self._step), ("logits", self._head)):
            if not program.trace.recorded:
                log.info("%s are not recorded: %s", what, program.trace.reason)

    # Inference mode is theirs and not around what calls them: a recorded step computes nothing in
    # torch, and even this would cost it time.
    def _hidden(self, step: Step) -> Tensor:
        return forward(self.model, self.cache, step)

    def _logits(self, rows_L: Tensor) -> Tensor:
        hidden_TD = self._last if self._step.whole is None else self._step.whole
        return head(self.model, hidden_TD, rows_L)

    def execute(self, inputs: StepInputs) -> Tensor:
        """Compute the step; its final hidden states (T, D), which are read until the next one.

        `logits` turns rows of them into logits, a few at a time: those of one long prompt would
        take gigabytes.
        """
        self.cache.last_used = time.monotonic()
        if self.model.moves != self._moves:
            self._record()
        self._num_rows = 0  # should the step fail, none has logits
        if inputs.states is not None:
            self.cache.clear_states(inputs.states.cleared)
            self.cache.copy_states(inputs.states.restores)
        self._last = self._step.run(inputs)
        if inputs.states is not None:
            self.cache.copy_states(inputs.states.saves)
        self._num_rows = len(self._last)
        self.cache.last_used = time.monotonic()
        self.expert_counts.step()
        return self._last

    def logits(self, rows: Iterable[int]) -> Tensor:
        """(L, V) float32 of rows of the last step; read until the next call.

        Raises IndexError for a row that the step did not have.
        """
        wanted = array("q", rows)
        if max(wanted, default=-1) >= self._num_rows:
            raise IndexError(f"the last step had {self._num_rows} rows, not row {max(wanted)}")
        return self._head.run(wanted)

    def warm_up(self) -> None:
        """Run an empty step and one of one token: the first request meets nothing new."""
        for sequences in (0, 1):
            self.execute(self._zeros(sequences))
            self.logits(range(sequences))
        self.expert_counts.clear()

    def _zeros(self, sequences: int) -> StepInputs:
        """A step of as many sequences of one token 0, all in block 0."""
        zeros = [[0]] * sequences
        others = [zeros] * (len(self.cache.layout.windows) - 1)
        size = self.cache.block_size
        return StepInputs.build(zeros, [0] * sequences, zeros, size, self.device, others=others)
