"""The loop: plan, execute, sample, update. One thread at a time owns an engine; EngineClient is how
others reach it."""

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from moebius.engine.batch import Batch, PromptRows, build_batch
from moebius.engine.client import (
    STEP_TOKENS_BOUNDS,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    StepOutput,
    TokenLogprob,
)
from moebius.engine.faults import failed, failure, say
from moebius.engine.memory import PROMPT_LOGIT_ROWS
from moebius.engine.runner import Runner
from moebius.engine.sampler import Sampled, not_finite, sample, token_logprobs
from moebius.engine.trace import TraceWriter
from moebius.errors import DeadlineError, EngineError, MoebiusError, frames
from moebius.ops.threads import TorchThreads
from moebius.schedule.engine_request import EngineRequest
from moebius.schedule.request import FinishReason, Request
from moebius.schedule.scheduler import Scheduler, StepPlan

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Unfinished:
    """A request that is here, and what the engine remembers of it from one step to the next.

    The scheduler forgets a request before its last output is made.

    num_scored  how many prompt tokens' log-probabilities were sent
    counted     whether its prompt is among those that the counters know
    """

    request: Request
    num_scored: int = 0
    counted: bool = False


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
        self._unfinished: dict[str, _Unfinished] = {}
        self._last_step = clock()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request; RequestError or OverloadError if it cannot be served (ever, or now)."""
        self.scheduler.add(request)
        self._unfinished[request.id] = _Unfinished(request)
        self._record(lambda trace: trace.add(request))

    def take(self, asked: EngineRequest) -> list[StepOutput]:
        """Queue what a client asks for; a refusal, or whatever fails, is its only output."""
        try:
            self.add(Request(asked))
        except MoebiusError as error:
            return [failed(asked.id, error)]
        except Exception as error:
            return [failed(asked.id, failure("queueing a request", error))]
        return []

    def abort(self, request_id: str, error: MoebiusError | None = None) -> StepOutput | None:
        """End a request between two steps; None if it is not here (any more)."""
        request = self.scheduler.abort(request_id)
        if request is None:
            return None
        self._record(lambda trace: trace.abort(request_id, FinishReason.ABORT))
        return self._ended(
            request_id, FinishReason.ABORT, error or EngineError("the request was aborted")
        )

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
        if plan.chunks:
            try:
                batch = self._execute(plan)
                results = self._sample(batch)
            except Exception as error:
                outputs += self._fail_step(plan, error)
            except BaseException:  # Ctrl-C: the step is made again, should its requests go on
                self._roll_back(plan)
                raise
            else:
                outputs += self._update(plan, results)
        self._last_step = self.clock()
        self._counts["steps"] += 1
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot; cheap, and safe to call while another thread steps."""
        scheduler = self.scheduler
        pool = scheduler.pool
        counts = self._counts
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
            broken = self._trace
            self._trace = None
            cause = error if isinstance(error, OSError) else frames(error)
            say(log.warning, "--trace: tracing stops, serving goes on: %s", cause)
            broken.abandon()

    def _plan(self) -> StepPlan:
        now = self.clock()
        plan = self.scheduler.plan(now)
        if self._trace:
            self._record(lambda trace: trace.plan(now, plan))
        return plan

    def _end_late(self, plan: StepPlan) -> list[StepOutput]:
        """The last outputs of requests whose deadline has passed."""
        late = DeadlineError("the request's deadline passed before it was finished")
        return [self._ended(id, FinishReason.DEADLINE, late) for id in plan.expired]

    def _execute(self, plan: StepPlan) -> Batch:
        """The plan's tokens through the model, and the batch that they make."""
        batch = build_batch(plan, self.scheduler.requests, self.info.block_size, self.runner.device)
        self.runner.execute(batch.inputs)
        tokens = len(batch.inputs.input_ids_host)
        self._step_tokens[bisect_left(STEP_TOKENS_BOUNDS, tokens)] += 1
        self._counts["step_tokens"] += tokens
        return batch

    def _sample(self, batch: Batch) -> _Results:
        """Draw where a chunk reaches its sequence's end, and score the prompts that ask for it."""
        results = _Results()
        logits_LV = self.runner.logits(batch.sampled_rows)
        outcomes = sample(logits_LV, batch.sampled, self.runner.ops)
        for request, outcome in zip(batch.sampled, outcomes, strict=True):
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
        unfinished = self._unfinished[request.id]
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
        sent = unfinished.num_scored
        results.prompts[request.id] = scored[max(sent + 1 - rows.start, 0) :]
        unfinished.num_scored = max(sent, rows.start + len(rows.token_ids) - 1)

    def _update(self, plan: StepPlan, results: _Results) -> list[StepOutput]:
        """Hand the tokens to the scheduler, and what is new to the clients."""
        now = self.clock()
        requests = [self.scheduler.requests[chunk.request_id] for chunk in plan.chunks]
        outputs = [self._fail(id, error) for id, error in results.failed.items()]
        tokens = {
            id: (drawn.token_id,)
            for id, drawn in results.sampled.items()
            if id not in results.failed
        }
        self.scheduler.update(plan, tokens)
        if self._trace:
            self._record(lambda trace: trace.update(tokens))
        self._counts["generation_tokens"] += len(tokens)
        for request in requests:
            drawn = tokens.get(request.id, ())
            if drawn or self._has_news(request, results):
                try:
                    outputs.append(self._output(request, drawn, results, now))
                except Exception as error:
                    cause = failure("handing out a request's tokens", error)
                    outputs.append(self._fail(request.id, cause))
        return outputs

    def _has_news(self, request: Request, results: _Results) -> bool:
        """Without a token: it ended, or prompt tokens were scored."""
        if request.id in results.failed:
            return False
        return request.finished or bool(results.prompts.get(request.id))

    def _output(
        self, request: Request, token_ids: tuple[int, ...], results: _Results, now: float
    ) -> StepOutput:
        unfinished = self._unfinished[request.id]
        if not unfinished.counted:
            self._count_prompt(unfinished, token_ids)
        if request.finished:
            del self._unfinished[request.id]
        logprob = results.sampled[request.id].logprob if token_ids else None
        scored = results.prompts.get(request.id, ()) if results.prompts else ()
        return StepOutput(
            request_id=request.id,
            token_ids=token_ids,
            logprobs=(logprob,) if logprob else (),
            prompt_logprobs=tuple(scored),
            finish_reason=request.finish_reason,
            num_cached_tokens=request.num_cached_tokens or 0,
            at=now,
            scheduled=request.scheduled,
            num_preemptions=request.num_preemptions,
        )

    def _count_prompt(self, unfinished: _Unfinished, token_ids: tuple[int, ...]) -> None:
        """A prompt counts with its first token, or where it ends without one."""
        request = unfinished.request
        if token_ids or request.finished:
            unfinished.counted = True
            self._counts["prompt_tokens"] += len(request.prompt_ids)
            self._counts["prompt_tokens_cached"] += request.num_cached_tokens or 0

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        """The model itself failed: nothing of the step is kept, its requests end, the engine goes
        on."""
        cause = failure(f"step {plan.step} with {len(plan.chunks)} requests", error)
        self._roll_back(plan)
        return [self._fail(chunk.request_id, cause) for chunk in plan.chunks]

    def _roll_back(self, plan: StepPlan) -> None:
        self.scheduler.rollback(plan)
        self._record(TraceWriter.rollback)

    def _fail(self, request_id: str, error: MoebiusError) -> StepOutput:
        """End a request that failed, where it has not ended already; what it published is
        withdrawn."""
        if request_id in self.scheduler.requests:
            self.scheduler.fail(request_id)
            self._record(lambda trace: trace.fail(request_id))
        return self._ended(request_id, FinishReason.ERROR, error)

    def _ended(self, request_id: str, reason: FinishReason, error: MoebiusError) -> StepOutput:
        ended = StepOutput(request_id, finish_reason=reason, error=error, at=self.clock())
        unfinished = self._unfinished.pop(request_id, None)
        if unfinished is None:
            return ended
        request = unfinished.request
        return replace(ended, scheduled=request.scheduled, num_preemptions=request.num_preemptions)
