"""A step and the logits of its rows, as programs of a model as it lies in memory."""

import logging
from array import array
from dataclasses import replace

import torch
from torch import Tensor

from moebius.engine.kv_cache import KVCache
from moebius.engine.shared_head import SharedHead
from moebius.engine.workspace import StepRows, Workspace, forward, head
from moebius.models.decoder import Decoder
from moebius.models.encoder_decoder import EncoderDecoder
from moebius.ops.program import Program
from moebius.ops.steps import Step, StepInputs

log = logging.getLogger(__name__)


class StepPrograms:
    """What a runner runs, recorded where the backend can.

    rows: how many a step has at most. planned: what plan_workspace said of these.
    shared: of few logits, that ranks make together; None where there are no ranks.
    """

    step: Program[StepInputs]
    head: "Program[array[int]]"
    shared_head: "Program[array[int]] | None" = None

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        device: torch.device,
        rows: StepRows,
        planned: Workspace | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._changes = model.changes
        self._recorded_at = model.changes.count
        self._last = torch.empty(0)
        self._source = model.rows if isinstance(model, EncoderDecoder) else None
        if self._source is not None:
            self._source.most = rows.tokens
            rows = replace(rows, sequences=0)  # none is without what an encoder has read
        ops = model.ops
        source = rows.step_source(
            len(cache.layout.windows), cache.block_size, states=cache.num_states > 0
        )
        self.step = ops.record(self._hidden, source, device, planned.step if planned else None)
        logits = planned.head if planned else None
        if not self.step.trace.recorded:  # its results are elsewhere each time
            logits = self.step.trace
        self.head = ops.record(self._logits, rows.head_source(), device, logits)
        self.shared = SharedHead.of(model)
        if self.shared is not None:
            trace = planned.shared_head if planned else None
            if not self.step.trace.recorded:
                trace = self.step.trace
            self.shared_head = ops.record(self._few_logits, self.shared.source, device, trace)
        for what, program in (("steps", self.step), ("logits", self.head)):
            if not program.trace.recorded:
                log.info("%s are not recorded: %s", what, program.trace.reason)

    @property
    def current(self) -> bool:
        """No parameter has changed since: what was recorded would be of others."""
        return self._changes.count == self._recorded_at

    def hidden(self, inputs: StepInputs) -> Tensor:
        """A step's final hidden states (T, D), read until the next step."""
        if self._source is not None:
            self._source.begin(inputs)
        self._last = self.step.run(inputs)
        return self._last

    def logits(self, rows: "array[int]", shared: bool = False) -> Tensor:
        """(L, V) float32 of rows of the last step, read until the next call.

        shared: of few rows, which all ranks make together.
        """
        if shared:
            assert self.shared_head is not None, "a model without ranks has no shared head"
            return self.shared_head.run(rows)
        return self.head.run(rows)

    # Inference mode is theirs and not around what calls them: a recorded step computes nothing in
    # torch, and even this would cost it time.
    def _hidden(self, step: Step) -> Tensor:
        return forward(self._model, self._cache, step)

    def _logits(self, rows_L: Tensor) -> Tensor:
        return head(self._model, self._whole, rows_L)

    def _few_logits(self, rows_G: Tensor) -> Tensor:
        assert self.shared is not None, "only where there are ranks"
        return self.shared.logits(self._whole, rows_G)

    @property
    def _whole(self) -> Tensor:
        return self._last if self.step.whole is None else self.step.whole
