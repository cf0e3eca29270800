"""The loop: plan, execute, sample, update. One thread owns an engine; EngineClient is how others
reach it."""

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from moebius.engine.batch import Batch, PromptRows, build_batch
from moebius.engine.client import (
    STEP_TOKENS_BOUNDS,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    StepOutput,
    TokenLogprob,
)
from moebius.engine.faults import failure, say
from moebius.engine.memory import PROMPT_LOGIT_ROWS
from moebius.engine.runner import Runner
from moebius.engine.sampler import Sampled, not_finite, sample, token_logprobs
from moebius.engine.trace import TraceWriter
from moebius.errors import DeadlineError, EngineError, MoebiusError, frames
from moebius.ops.threads import TorchThreads
from moebius.schedule.request import FinishReason, Request
from moebius.schedule.scheduler import Scheduler, StepPlan

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Results:
    """What a step computed, by request: tokens drawn, prompt tokens scored, and who failed."""

    sampled: dict[str, Sampled] = field(default_factory=dict)
    prompts: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[str, MoebiusError] = field(default_factory=dict)


class Engine:
    """Requests in, StepOutputs out. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        *,
        trace: TraceWriter | None = None,
        torch_threads: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.info = info
        self.clock = clock
        self._trace = trace
        self._torch_threads = TorchThreads(torch_threads)
        self._counts: Counter[str] = Counter()
        self._step_tokens = [0] * (len(STEP_TOKENS_BOUNDS) + 1)
        # Unfinished requests by id: the scheduler forgets one before its last output is made.
        self._requests: dict[str, Request] = {}
        self._scored: dict[str, int] = {}
        self._last_step = clock()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request; RequestError or OverloadError if it cannot be served (ever, or now)."""
        self.scheduler.add(request)
        self._requests[request.id] = request
        self._record(lambda trace: trace.add(request))

    def abort(self, request_id: str, error: MoebiusError | None = None) -> StepOutput | None:
        """End a request between two steps; None if it is not here (any more)."""
        request = self.scheduler.abort(request_id)
        if request is None:
            return None
        self._record(lambda trace: trace.abort(request_id, FinishReason.ABORT))
        return self._ended(
            request_id, FinishReason.ABORT, error or EngineError("the request was aborted")
        )

    def step(self) -> list[StepOutput]:
        """Compute one step. A failure ends the requests it belongs to and no others."""
        with self._torch_threads:
            return self._step()

    def _step(self) -> list[StepOutput]:
        now = self.clock()
        plan = self.scheduler.plan(now)
        if self._trace:
            self._record(lambda trace: trace.plan(now, plan))
        late = DeadlineError("the request's deadline passed before it was finished")
        outputs = [self._ended(id, FinishReason.DEADLINE, late) for id in plan.expired]
        if plan.chunks:
            try:
                batch = build_batch(
                    plan, self.scheduler.requests, self.info.block_size, self.runner.device
                )
                self.runner.execute(batch.inputs)
                results = self._sample(batch)
                self._count_step(len(batch.inputs.input_ids_host))
            except Exception as error:
                outputs += self._failed_step(plan, error)
            except BaseException:  # Ctrl-C: the step is made again, should its requests go on
                self.scheduler.rollback(plan)
                self._record(TraceWriter.rollback)
                raise
            else:
                outputs += self._update(plan, results)
        self._last_step = self.clock()
        self._counts["steps"] += 1
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot; cheap, and safe to call while another thread steps."""
        scheduler, pool, counts = self.scheduler, self.scheduler.pool, self._counts
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            deferred=scheduler.num_deferred,
            used_blocks=pool.num_used,
            total_blocks=pool.num_blocks,
            steps=counts["steps"],
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            prompt_tokens=counts["prompt_tokens"],
            prompt_tokens_cached=counts["prompt_tokens_cached"],
            generation_tokens=counts["generation_tokens"],
            step_tokens=tuple(self._step_tokens),
            step_tokens_sum=counts["step_tokens"],
            last_step=self._last_step,
            now=self.clock(),
            ready=True,
        )

    def expert_loads(self) -> ExpertLoads:
        """How the routers of the model spread the tokens of the last steps; as safe as `stats`, and
        a little dearer."""
        return self.runner.expert_counts.read()

    def close(self) -> None:
        """Finish the trace. The engine itself has nothing to give back."""
        self._record(TraceWriter.close)
        self._trace = None

    def _record(self, write: Callable[[TraceWriter], None]) -> None:
        """Trace something. A trace that cannot be written, as on a full disk, ends there; serving
        goes on."""
        if self._trace is None:
            return
        try:
            write(self._trace)
        except Exception as error:
            broken, self._trace = self._trace, None
            cause = error if isinstance(error, OSError) else frames(error)
            say(log.warning, "--trace: tracing stops, serving goes on: %s", cause)
            broken.abandon()

    def _count_step(self, tokens: int) -> None:
        self._step_tokens[bisect_left(STEP_TOKENS_BOUNDS, tokens)] += 1
        self._counts["step_tokens"] += tokens

    def _sample(self, batch: Batch) -> _Results:
        results = _Results()
        logits_LV = self.runner.logits(batch.sampled_rows)
        for request, outcome in zip(
            batch.sampled, sample(logits_LV, batch.sampled, self.runner.ops), strict=True
        ):
            if isinstance(outcome, Sampled):
                results.sampled[request.id] = outcome
            else:
                results.failed[request.id] = outcome
        for rows in batch.prompts:
            if rows.request.id not in results.failed:
                try:
                    self._score(rows, results)
                except Exception as error:
                    results.failed[rows.request.id] = failure("scoring a prompt", error)
        return results

    def _score(self, rows: PromptRows, results: _Results) -> None:
        """Log-probabilities of prompt tokens, without those that were sent before a preemption."""
        request = rows.request
        sent = self._scored.get(request.id, 0)
        scored: list[TokenLogprob] = []
        for offset in range(0, len(rows.token_ids), PROMPT_LOGIT_ROWS):
            tokens = rows.token_ids[offset : offset + PROMPT_LOGIT_ROWS]
            first = rows.first + offset
            logits = self.runner.logits(range(first, first + len(tokens)))
            part = token_logprobs(
                logits, tokens, request.params.prompt_logprobs or 0, self.runner.ops
            )
            if part is None:
                results.failed[request.id] = not_finite()
                return
            scored += part
        results.prompts[request.id] = scored[max(sent + 1 - rows.start, 0) :]
        self._scored[request.id] = max(sent, rows.start + len(rows.token_ids) - 1)

    def _update(self, plan: StepPlan, results: _Results) -> list[StepOutput]:
        outputs, now = [], self.clock()
        requests = [self.scheduler.requests[chunk.request_id] for chunk in plan.chunks]
        for request_id, error in results.failed.items():
            outputs.append(self._fail(request_id, error))
        tokens = {
            id: (s.token_id,) for id, s in results.sampled.items() if id not in results.failed
        }
        self.scheduler.update(plan, tokens)
        if self._trace:
            self._record(lambda trace: trace.update(tokens))
        self._counts["generation_tokens"] += len(tokens)
        for request in requests:
            drawn = tokens.get(request.id, ())
            if drawn or (
                request.id not in results.failed
                and (request.finished or results.prompts.get(request.id))
            ):
                try:
                    outputs.append(self._output(request, drawn, results, now))
                except Exception as error:
                    outputs.append(
                        self._fail(request.id, failure("handing out a request's tokens", error))
                    )
        return outputs

    def _output(
        self, request: Request, token_ids: tuple[int, ...], results: _Results, now: float
    ) -> StepOutput:
        finished, cached = request.finish_reason, request.num_cached_tokens or 0
        if len(request.output_ids) == 1 or (finished and not token_ids):
            self._counts["prompt_tokens"] += len(request.prompt_ids)
            self._counts["prompt_tokens_cached"] += cached
        if finished:
            self._scored.pop(request.id, None)
            self._requests.pop(request.id, None)
        logprob = results.sampled[request.id].logprob if token_ids else None
        prompts = tuple(results.prompts.get(request.id, ())) if results.prompts else ()
        logprobs, scheduled, preemptions = (
            (logprob,) if logprob else (),
            request.scheduled,
            request.num_preemptions,
        )
        # By position: each step makes one for each of its requests, and names would cost half as
        # much again.
        return StepOutput(
            request.id,
            token_ids,
            logprobs,
            prompts,
            finished,
            cached,
            None,
            now,
            scheduled,
            preemptions,
        )

    def _failed_step(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        """The model itself failed: nothing of the step is kept, its requests end, the engine goes
        on."""
        cause = failure(f"step {plan.step} with {len(plan.chunks)} requests", error)
        self.scheduler.rollback(plan)
        self._record(TraceWriter.rollback)
        return [self._fail(chunk.request_id, cause) for chunk in plan.chunks]

    def _fail(self, request_id: str, error: MoebiusError) -> StepOutput:
        """End a request that failed, where it has not ended already; what it published is
        withdrawn."""
        if request_id in self.scheduler.requests:
            self.scheduler.fail(request_id)
            self._record(lambda trace: trace.fail(request_id))
        return self._ended(request_id, FinishReason.ERROR, error)

    def _ended(self, request_id: str, reason: FinishReason, error: MoebiusError) -> StepOutput:
        self._scored.pop(request_id, None)
        ended = StepOutput(request_id, finish_reason=reason, error=error, at=self.clock())
        request = self._requests.pop(request_id, None)
        if request is None:
            return ended
        return ended._replace(scheduled=request.scheduled, num_preemptions=request.num_preemptions)
