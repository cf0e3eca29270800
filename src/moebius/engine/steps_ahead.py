"""The next step, computed while the host still waits for this one's tokens.

What a decoding step computes follows from the tokens of the one before it, which the device has
before the host has them. So these are drawn on the device, and the step that goes on with them is
handed over before the host reads any. The host's own part (what has ended, what comes next, what
clients are told) is done while the device computes.

Nothing is decided here. The next plan is made when this step's tokens are known, as always. What it
wants of a request is what was computed ahead, since a request's tokens depend on nothing but itself
(promise P1). What it does not want was computed for nothing: it lies behind all tokens of its
request, in a block that nobody else finds, and whoever gets that block writes there later.

A recurrent state cannot be taken back; but of a request that goes on, the plan wants just the token
that its state has come to, now or later. Of one that does not, or starts again, the state is gone.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.engine.batch import Batch, build_batch
from moebius.engine.devices import is_lost
from moebius.engine.faults import say
from moebius.engine.runner import Runner
from moebius.engine.sampler import Drawing, Sampled, begin, draw_of, needs_host
from moebius.engine.trace import TraceWriter
from moebius.engine.tracing import Tracing
from moebius.errors import MoebiusError, frames
from moebius.ops.transfer import send_numbers
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan

log = logging.getLogger(__name__)

Outcomes = tuple[list[Request], list[Sampled | MoebiusError | None]]
"""Requests, and for each its token, or why it ends without one; None: it is computed again."""


class StepsAhead(Protocol):
    """Used by the engine's thread alone: these three in this order for each plan with chunks, and
    `drop` where its step failed."""

    def rest(self, plan: StepPlan) -> StepPlan:
        """What is left of a plan to be computed."""

    def draw(self, rest: StepPlan, batch: Batch) -> bool:
        """Begin to draw the tokens of a batch that was just computed; False where the host is to
        do that."""

    def finish(self, plan: StepPlan, trace: Tracing) -> Outcomes:
        """Begin with what the next plan will want, where all of this one's tokens are being drawn;
        then wait for those."""

    def drop(self, plan: StepPlan) -> None:
        """The plan's step failed: what goes on with it is not wanted."""


class NoStepsAhead:
    """Where the host computes the steps itself, it has nothing to do meanwhile."""

    def rest(self, plan: StepPlan) -> StepPlan:
        return plan

    def draw(self, rest: StepPlan, batch: Batch) -> bool:
        return False

    def finish(self, plan: StepPlan, trace: Tracing) -> Outcomes:
        return [], []

    def drop(self, plan: StepPlan) -> None:
        pass


NO_STEPS_AHEAD = NoStepsAhead()


class _Drawn(NamedTuple):
    """The token of a request at position `end`, which is row `row` of a drawing.

    preemptions: how many the request had had when its step was computed.
    """

    request: Request
    end: int
    preemptions: int
    drawing: Drawing
    row: int

    @property
    def stands(self) -> bool:
        """The request goes on with what was computed."""
        return not self.request.finished and self.request.num_preemptions == self.preemptions


class DeviceStepsAhead:
    """Of an engine whose device works by itself."""

    def __init__(self, runner: Runner, scheduler: Scheduler, block_size: int) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._block_size = block_size
        self._ahead: dict[str, _Drawn] = {}
        """Of no plan yet."""
        self._due: dict[str, _Drawn] = {}
        """Of the plan under way."""
        self._undecided: dict[str, int] = {}
        """Requests, and how many tokens they had when their next one was not drawn here."""
        self._goes_back = scheduler.pool.states is None
        """Whether a token may turn out to be undecided: its request is computed again then."""

    def rest(self, plan: StepPlan) -> StepPlan:
        self._ahead = {id: known for id, known in self._ahead.items() if known.stands}
        requests = self._scheduler.requests
        self._undecided = {id: at for id, at in self._undecided.items() if id in requests}
        self._due = {}
        rest = []
        for chunk in plan.chunks:
            known = self._ahead.pop(chunk.request_id, None)
            if known is None:
                rest.append(chunk)
                continue
            assert (chunk.num_tokens, chunk.end) == (1, known.end), "a request goes on as it must"
            self._due[chunk.request_id] = known
            if chunk.states is not None and chunk.states.save is not None:
                self._runner.cache.copy_states([(chunk.states.slot, chunk.states.save)])
        return replace(plan, chunks=tuple(rest))

    def draw(self, rest: StepPlan, batch: Batch) -> bool:
        """All or none: the host would wait for its own rows anyway."""
        if not all(chunk.samples and not chunk.drafts for chunk in rest.chunks):
            return False
        if batch.prompts or not all(map(self._draws, batch.sampled)):
            return False
        ends = [request.num_tokens for request in batch.sampled]
        drawn = self._drawn(batch, ends)
        self._due.update(drawn)
        return bool(drawn)

    def finish(self, plan: StepPlan, trace: Tracing) -> Outcomes:
        if len(self._due) == len(plan.chunks):
            self._begin_following(plan, trace)
        due = self._due.values()
        outcomes = [known.drawing.outcomes[known.row] for known in due]
        for known, found in zip(due, outcomes, strict=True):
            if found is None:
                self._ahead.pop(known.request.id, None)
                self._undecided[known.request.id] = known.end
        return [known.request for known in due], outcomes

    def drop(self, plan: StepPlan) -> None:
        self._due = {}
        for chunk in plan.chunks:
            self._ahead.pop(chunk.request_id, None)

    def _draws(self, request: Request) -> bool:
        """Whether the device draws a request's next token, and likely the one behind it."""
        ops = self._runner.ops
        draw = draw_of(request, ops, request.num_tokens)
        return (
            not needs_host(request)
            and draw.width <= ops.first_look
            and (self._goes_back or draw.whole or not draw.width)
            and self._undecided.get(request.id) != request.num_tokens
        )

    def _begin_following(self, plan: StepPlan, trace: Tracing) -> None:
        chunks = self._scheduler.following(plan)
        trace.record(TraceWriter.following)
        if not chunks:
            return
        following = replace(plan, chunks=chunks)
        drawn_T = _together([self._due[chunk.request_id] for chunk in chunks])
        requests = self._scheduler.requests
        batch = build_batch(following, requests, self._block_size, self._runner.device, drawn_T)
        self._runner.execute(batch.inputs)
        self._ahead.update(self._drawn(batch, [chunk.end for chunk in chunks], drawn_T))

    def _drawn(
        self, batch: Batch, ends: Sequence[int], newest_L: Tensor | None = None
    ) -> dict[str, _Drawn]:
        """Begin to draw the token at each row's end; newest_L: those before, if not read yet.

        Where that fails there are none: the host draws then, and finds out whose fault it is.
        """
        try:
            logits_LV = self._runner.logits(batch.sampled_rows)
            drawing = begin(logits_LV, batch.sampled, ends, self._runner.ops, newest_L)
        except Exception as error:
            # States have gone on with what was not read, and it is not computed again.
            if is_lost(error) or not (self._goes_back or newest_L is None):
                raise
            say(log.warning, "drawing on the device failed; the host draws: %s", frames(error))
            return {}
        return {
            request.id: _Drawn(request, end, request.num_preemptions, drawing, row)
            for row, (request, end) in enumerate(zip(batch.sampled, ends, strict=True))
        }


def steps_ahead(runner: Runner, scheduler: Scheduler, block_size: int) -> StepsAhead:
    """Where there is something to gain: a device computes by itself, and no step needs the host in
    its midst, be it for a rank's rows or for experts in its memory."""
    model = runner.model
    if runner.device.type != "cuda" or model.ranks is not None or model.host is not None:
        return NO_STEPS_AHEAD
    return DeviceStepsAhead(runner, scheduler, block_size)


def _together(drawn: Sequence[_Drawn]) -> Tensor:
    """Their tokens as the next step reads them: (T,) int64. Where none could be drawn there is an
    id all the same, which nobody will want to know."""
    drawings = list({id(each.drawing): each.drawing for each in drawn}.values())
    starts: dict[int, int] = {}
    count = 0
    for drawing in drawings:
        starts[id(drawing)] = count
        count += len(drawing.ids_R)
    places = [starts[id(each.drawing)] + each.row for each in drawn]
    ids_R = torch.cat([drawing.ids_R for drawing in drawings])
    return ids_R[send_numbers(places, torch.int64, ids_R.device)].clamp(min=0)
