"""An EngineClient without a model: a thread that hands out scripted tokens, and remembers what it
was asked."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from msgspec.structs import replace

from moebius.engine.client import (
    Deliver,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    StepOutput,
    TokenLogprob,
)
from moebius.errors import EngineError, MoebiusError
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import ServingLimits

Script = Callable[[EngineRequest], Sequence[int]]
Fault = Callable[[EngineRequest, int], MoebiusError | None]

MINUS_INFINITY_TOKEN = 13


def hashed(vocab_size: int) -> Script:
    """Tokens that depend on prompt and seed alone, as long as anyone may ask for."""

    def script(request: EngineRequest) -> list[int]:
        key = repr((request.prompt_ids, request.seed)).encode()
        digest = blake2b(key, digest_size=64).digest()
        return [
            10 + digest[i % 64] * (i + 1) % (vocab_size - 10) for i in range(request.max_tokens)
        ]

    return script


def constant(ids: Sequence[int]) -> Script:
    """The same tokens whatever is asked."""
    return lambda request: ids


def logprob(token_id: int, k: int) -> TokenLogprob:
    """A token's made-up log-probability, and the top k: ids 100, 101, ... at -0.5, -1.0, ..."""
    own = float("-inf") if token_id == MINUS_INFINITY_TOKEN else -1.0 - token_id / 8
    return TokenLogprob(
        token_id, own, rank=token_id + 1, top=tuple((100 + i, -0.5 * (i + 1)) for i in range(k))
    )


@dataclass
class _Running:
    request: EngineRequest
    tokens: list[int]
    scheduled: float
    scored: int = 1
    sent: int = 0


@dataclass
class FakeEngine:
    """Each step gives every running request `step_tokens` tokens, or `prompt_chunk` prompt
    log-probabilities first.

    gate      cleared: no step is made, requests and aborts are still taken
    fault     asked before each of a request's steps (counted from 0): an error ends it there
    refuse    raised by submit
    loads     what its experts are said to have done
    """

    script: Script
    vocab_size: int = 400
    max_model_len: int = 512
    eos_ids: frozenset[int] = frozenset({1})
    priorities: bool = False
    step_seconds: float = 0.0
    step_tokens: int = 1
    prompt_chunk: int = 4
    cached_tokens: int = 0
    preemptions: int = 0
    deferred: int = 0
    fault: Fault = lambda request, step: None
    refuse: MoebiusError | None = None
    loads: ExpertLoads = field(default_factory=ExpertLoads)
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    drawn: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    ready: bool = True
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.deliveries = 0
        self._inbox: queue.SimpleQueue[EngineRequest | str | None] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def info(self) -> EngineInfo:
        limits = ServingLimits(self.vocab_size, self.max_model_len, self.priorities)
        return EngineInfo(
            limits,
            self.eos_ids,
            block_size=16,
            num_blocks=64,
            fingerprint="fp_fake",
            kv_dtype="int8",
            kv_bytes=2**20,
        )

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.requests.append(request)
        self._inbox.put(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._inbox.put(request_id)

    def advance(self, wanted: Callable[[], bool]) -> bool:
        return False

    def stats(self) -> EngineStats:
        generated = sum(self.drawn.values())
        return EngineStats(
            running=len(self._running),
            waiting=2,
            deferred=self.deferred,
            used_blocks=16,
            total_blocks=64,
            steps=self.steps,
            prefix_queries=30,
            prefix_hits=20,
            preemptions=3,
            prompt_tokens=sum(len(r.prompt_ids) for r in self.requests),
            prompt_tokens_cached=7,
            generation_tokens=generated,
            drafts=6,
            draft_tokens=20,
            accepted_tokens=9,
            accepted_per_place=(5, 3, 1, 0, 0, 0, 0),
            step_tokens=(0, self.steps, *[0] * 12),
            step_tokens_sum=8 * self.steps,
            now=time.monotonic(),
            ready=self.ready,
        )

    def expert_loads(self) -> ExpertLoads:
        return self.loads

    def close(self, timeout: float) -> None:
        self.closed = True
        self.gate.set()
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    @property
    def idle(self) -> bool:
        return not self._running and self._inbox.empty()

    def _run(self) -> None:
        while not self.closed:
            outputs = self._take()
            if self.gate.is_set():
                outputs += self._step()
            if outputs:
                self.deliveries += 1
                self._deliver(outputs)
            time.sleep(self.step_seconds if self.gate.is_set() else 0.001)
        error = EngineError("closed")
        self._deliver(
            [StepOutput(id, finish_reason=FinishReason.ERROR, error=error) for id in self._running]
        )

    def _take(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        while True:
            try:
                item = (
                    self._inbox.get(block=not self._running, timeout=0.05)
                    if not outputs
                    else self._inbox.get(False)
                )
            except queue.Empty:
                return outputs
            if isinstance(item, EngineRequest):
                self._running[item.id] = _Running(item, list(self.script(item)), time.monotonic())
                self.drawn[item.id] = 0
            elif isinstance(item, str) and self._running.pop(item, None):
                outputs.append(
                    _ended(item, FinishReason.ABORT, EngineError("the request was aborted"))
                )
            elif item is None:
                return outputs

    def _step(self) -> list[StepOutput]:
        self.steps += bool(self._running)
        now = time.monotonic()
        outputs = [
            replace(
                self._advance(running),
                at=now,
                scheduled=running.scheduled,
                num_preemptions=self.preemptions,
            )
            for running in list(self._running.values())
        ]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.request_id]
        return outputs

    def _advance(self, running: _Running) -> StepOutput:
        request = running.request
        error = self.fault(request, running.sent)
        if error is not None:
            return _ended(request.id, FinishReason.ERROR, error)
        prompt: tuple[TokenLogprob, ...] = ()
        if request.params.prompt_logprobs is not None and running.scored < len(request.prompt_ids):
            ids = request.prompt_ids[running.scored : running.scored + self.prompt_chunk]
            running.scored += len(ids)
            prompt = tuple(logprob(t, request.params.prompt_logprobs) for t in ids)
            if running.scored < len(request.prompt_ids):
                return StepOutput(request.id, prompt_logprobs=prompt)
        tokens, reason = self._draw(running)
        k = request.params.logprobs
        chosen = () if k is None else tuple(logprob(t, k) for t in tokens)
        return StepOutput(
            request.id, tokens, chosen, prompt, reason, num_cached_tokens=self.cached_tokens
        )

    def _draw(self, running: _Running) -> tuple[tuple[int, ...], FinishReason | None]:
        request, tokens, reason = running.request, [], None
        while reason is None and len(tokens) < self.step_tokens:
            if running.sent >= request.max_tokens:
                reason = FinishReason.LENGTH
                break
            token = (
                running.tokens[running.sent]
                if running.sent < len(running.tokens)
                else min(self.eos_ids)
            )
            tokens.append(token)
            running.sent += 1
            if token in request.stop_ids and running.sent >= request.params.min_tokens:
                reason = FinishReason.STOP
            elif running.sent >= request.max_tokens:
                reason = FinishReason.LENGTH
        self.drawn[request.id] += len(tokens)
        return tuple(tokens), reason


def _ended(request_id: str, reason: FinishReason, error: MoebiusError) -> StepOutput:
    return StepOutput(request_id, finish_reason=reason, error=error)
