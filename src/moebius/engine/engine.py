"""The loop: plan, execute, sample, update.

One thread at a time owns an engine; EngineClient is how others reach it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moebius.engine.batch import Batch, build_batch
from moebius.engine.client import (
    Deliver,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    StepOutput,
    TokenLogprob,
)
from moebius.engine.constraints import Constraints
from moebius.engine.counters import Counters
from moebius.engine.devices import is_lost
from moebius.engine.faults import failed, failure, told
from moebius.engine.outputs import Outputs
from moebius.engine.prompt_scores import PromptRows, score
from moebius.engine.runner import Runner
from moebius.engine.sampler import Sampled, not_finite
from moebius.engine.steps_ahead import NO_STEPS_AHEAD, StepsAhead
from moebius.engine.tier import NO_TIER, Tier
from moebius.engine.trace import TraceWriter
from moebius.engine.tracing import Tracing
from moebius.engine.verify import accepted
from moebius.errors import DeadlineError, EngineError, MoebiusError, PeerError
from moebius.ops.threads import TorchThreads
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan


@dataclass(slots=True)
class _Results:
    """What a step computed, by request: tokens drawn, prompt tokens scored, and who failed."""

    sampled: dict[str, list[Sampled]] = field(default_factory=dict)
    prompts: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[str, MoebiusError] = field(default_factory=dict)


class Engine:
    """Requests in, StepOutputs out. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        constraints: Constraints | None = None,
        *,
        trace: TraceWriter | None = None,
        tier: Tier = NO_TIER,
        ahead: StepsAhead = NO_STEPS_AHEAD,
        torch_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.info = info
        self.clock = clock
        self.on_moved: Deliver = lambda outputs: None
        """Told, before a step is computed, who has left the queue for it, or is back there."""
        self._constraints = constraints or Constraints(None, info.limits.vocab_size, info.eos_ids)
        self._trace = Tracing(trace)
        self._tier = tier
        self._ahead = ahead
        self._torch_threads = TorchThreads(torch_threads)
        self._counters = Counters(clock(), tier.stats)
        self._outputs = Outputs(self._counters)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request; RequestError or OverloadError if it cannot be served (ever, or now)."""
        self.scheduler.add(request)
        self._constraints.add(request)
        self._outputs.add(request)
        self._trace.record(lambda trace: trace.add(request))

    def take(self, asked: EngineRequest) -> list[StepOutput]:
        """Queue what a client asks for; a refusal, or whatever fails, is its only output."""
        try:
            self.add(Request(asked, self.info.start_ids))
        except Exception as error:
            return [failed(asked.id, told("queueing a request", error))]
        return []

    def abort(self, request_id: str) -> StepOutput | None:
        """End a request between two steps; None if it is not here (any more)."""
        if self.scheduler.abort(request_id) is None:
            return None
        self._trace.record(lambda trace: trace.abort(request_id, FinishReason.ABORT))
        error = EngineError("the request was aborted")
        return self._ended(request_id, FinishReason.ABORT, error)

    def drop(self, request_id: str) -> list[StepOutput]:
        """End a request that its client wants no more of: its last output, if it is here."""
        try:
            ended = self.abort(request_id)
        except Exception as error:
            return [failed(request_id, failure("aborting a request", error))]
        return [] if ended is None else [ended]

    def step(self) -> list[StepOutput]:
        """Compute one step. A failure ends the requests it belongs to and no others."""
        with self._torch_threads:
            return self._step()

    def _step(self) -> list[StepOutput]:
        plan = self._plan()
        outputs = self._end_late(plan)
        outputs += self._computed(plan)
        self._counters.step(self.clock())
        return outputs

    def _computed(self, plan: StepPlan) -> list[StepOutput]:
        """What computing the plan's chunks brings their requests."""
        if not plan.chunks:
            return []
        try:
            results = self._compute(plan)
        except PeerError:  # not the step's fault: it is made again in the group's next epoch
            self._roll_back(plan)
            raise
        except Exception as error:
            if is_lost(error):  # a device that has failed once fails always
                raise
            return self._fail_step(plan, error)
        except BaseException:  # Ctrl-C: the step is made again, should its requests go on
            self._roll_back(plan)
            raise
        return self._update(plan, results)

    def _compute(self, plan: StepPlan) -> _Results:
        """The plan's tokens; what was computed ahead of it is not computed again."""
        results = _Results()
        rest = self._ahead.rest(plan)
        if rest.chunks:
            self._constraints.fill(rest, self.scheduler.requests)
            batch = self._execute(rest)
            if not self._ahead.draw(rest, batch):
                results = self._sample(batch)
        self._counters.computed(plan.num_tokens)
        drawn, failed = accepted(*self._ahead.finish(plan, self._trace))
        results.sampled |= drawn
        results.failed |= failed
        return results

    def stats(self) -> EngineStats:
        """A snapshot; cheap, and safe to call while another thread steps."""
        return self._counters.stats(self.scheduler, self.clock())

    def expert_loads(self) -> ExpertLoads:
        """How the routers spread the last steps' tokens; as safe as `stats`, a little dearer."""
        return self.runner.expert_counts.read()

    def close(self) -> None:
        """Finish the trace, and let grammars' threads go, and the other tier's."""
        self._tier.close()
        self._constraints.close()
        self._trace.close()

    def _plan(self) -> StepPlan:
        now = self.clock()
        self._tier.turn(now, self._counters, self._trace)
        plan = self.scheduler.plan(now)
        self._trace.record(lambda trace: trace.plan(now, plan))
        if plan.moved:
            self.on_moved([StepOutput(id, at=now, waits=back) for id, back in plan.moved.items()])
        return plan

    def _end_late(self, plan: StepPlan) -> list[StepOutput]:
        """The last outputs of requests whose deadline has passed."""
        late = DeadlineError("the request's deadline passed before it was finished")
        return [self._ended(id, FinishReason.DEADLINE, late) for id in plan.expired]

    def _execute(self, plan: StepPlan) -> Batch:
        """The plan's tokens through the model, and the batch that they make."""
        batch = build_batch(plan, self.scheduler.requests, self.info.block_size, self.runner.device)
        self.runner.execute(batch.inputs)
        return batch

    def _sample(self, batch: Batch) -> _Results:
        """Draw where a chunk reaches its sequence's end, and score the prompts that ask for it."""
        results = _Results()
        logits_LV = self._logits(batch.sampled_rows)
        outcomes = self._constraints.draw(logits_LV, batch.sampled, self.runner.ops)
        results.sampled, results.failed = accepted(batch.sampled, outcomes)
        for rows in batch.prompts:
            if rows.request.id not in results.failed:
                try:
                    self._score(rows, results)
                except Exception as error:
                    if is_lost(error):
                        raise
                    results.failed[rows.request.id] = failure("scoring a prompt", error)
        return results

    def _logits(self, rows: Sequence[int]) -> Tensor:
        return self.runner.logits(rows)

    def _score(self, rows: PromptRows, results: _Results) -> None:
        """Log-probabilities of prompt tokens, without those that were sent before a preemption."""
        request = rows.request
        scored = score(self.runner, rows)
        if scored is None:
            results.failed[request.id] = not_finite()
        else:
            results.prompts[request.id] = self._outputs.unsent(request, rows.start, scored)

    def _update(self, plan: StepPlan, results: _Results) -> list[StepOutput]:
        """Hand the tokens to the scheduler, and what is new to the clients."""
        now = self.clock()
        requests = [self.scheduler.requests[chunk.request_id] for chunk in plan.chunks]
        lengths = [len(request.output_ids) for request in requests]
        outputs = [self._fail(id, error) for id, error in results.failed.items()]
        tokens = {id: [each.token_id for each in drawn] for id, drawn in results.sampled.items()}
        self.scheduler.update(plan, tokens)
        self._trace.record(lambda trace: trace.update(tokens))
        for chunk, request, length in zip(plan.chunks, requests, lengths, strict=True):
            drawn = results.sampled.get(request.id, [])[: len(request.output_ids) - length]
            self._counters.drawn(len(drawn), len(chunk.drafts))
            scored = results.prompts.get(request.id, ()) if results.prompts else ()
            if not (drawn or scored or (request.finished and request.id not in results.failed)):
                continue
            if drawn and drawn[-1].complete:
                self._complete(request)
            try:
                outputs.append(self._outputs.news(request, drawn, scored, now))
            except Exception as error:
                cause = failure("handing out a request's tokens", error)
                outputs.append(self._fail(request.id, cause))
        return outputs

    def _complete(self, request: Request) -> None:
        """End a request whose grammar takes no more, even where it has reached its length, too."""
        if self.scheduler.abort(request.id, FinishReason.COMPLETE) is not None:
            self._trace.record(lambda trace: trace.abort(request.id, FinishReason.COMPLETE))
        request.finish_reason = FinishReason.COMPLETE

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        """The model failed: the step's requests end, nothing of it is kept, the engine goes on."""
        cause = failure(f"step {plan.step} with {len(plan.chunks)} requests", error)
        self._roll_back(plan)
        return [self._fail(chunk.request_id, cause) for chunk in plan.chunks]

    def _roll_back(self, plan: StepPlan) -> None:
        self._ahead.drop(plan)
        self.scheduler.rollback(plan)
        self._trace.record(TraceWriter.rollback)

    def _fail(self, request_id: str, error: MoebiusError) -> StepOutput:
        """End a request that failed, if it has not ended; what it published is withdrawn."""
        if request_id in self.scheduler.requests:
            self.scheduler.fail(request_id)
            self._trace.record(lambda trace: trace.fail(request_id))
        return self._ended(request_id, FinishReason.ERROR, error)

    def _ended(self, request_id: str, reason: FinishReason, error: MoebiusError) -> StepOutput:
        return self._outputs.last(request_id, reason, error, self.clock())
