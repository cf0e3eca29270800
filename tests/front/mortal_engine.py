"""Engines that a test steps and ends by hand; a token depends on prompt, seed and place alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from moebius.engine.client import (
    Deliver,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    StepOutput,
    TokenLogprob,
)
from moebius.engine.faults import failed
from moebius.errors import EngineError, MoebiusError, OverloadError
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams, ServingLimits

LIMITS = ServingLimits(vocab_size=1000, max_model_len=500)


def token(request: EngineRequest, place: int) -> int:
    key = repr((request.prompt_ids, request.seed, place)).encode()
    return int.from_bytes(blake2b(key, digest_size=4).digest(), "little") % 1000


def answer(request: EngineRequest) -> list[int]:
    """What any engine draws for it."""
    return [token(request, place) for place in range(request.max_tokens)]


def ask(id: str, max_tokens: int = 6, **params: int) -> EngineRequest:
    prompt = [1 + len(id), *id.encode()]
    asked = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return EngineRequest.create(id, prompt, asked, LIMITS, arrival=1.0, seed=len(id))


@dataclass
class _Row:
    request: EngineRequest
    drawn: int
    to_score: list[int]


@dataclass
class MortalEngine:
    """poison: how many tokens a request's output has when computing it ends the engine, by id.
    others: the engines whose experts it needs, one of which is ended instead."""

    number: int
    lost: Callable[[MoebiusError], None]
    poison: dict[str, int] = field(default_factory=dict)
    most: int = 1000
    others: Callable[[], list[MortalEngine]] = lambda: []

    def __post_init__(self) -> None:
        self.dead = False
        self.closed = False
        self.rows: dict[str, _Row] = {}
        self.taken: list[EngineRequest] = []
        self.most_at_once = 0
        self.steps = 0
        self._ended: list[StepOutput] = []
        self._deliver: Deliver = lambda outputs: None
        self._lock = threading.Lock()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(LIMITS, frozenset(), block_size=4, num_blocks=9, fingerprint="fp_mortal")

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver

    def submit(self, request: EngineRequest) -> None:
        if self.dead:
            raise EngineError("dead")
        with self._lock:
            assert request.id not in self.rows, "asked for twice"
            self.taken.append(request)
            if len(self.rows) >= self.most:
                self._ended.append(failed(request.id, OverloadError("full")))
                return
            scores = request.params.prompt_logprobs is not None
            to_score = list(request.prompt_ids[1:]) if scores else []
            self.rows[request.id] = _Row(request, len(request.output_ids), to_score)
            self.most_at_once = max(self.most_at_once, len(self.rows))

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self.rows.pop(request_id, None) is not None:
                error = EngineError("aborted")
                self._ended.append(
                    StepOutput(request_id, finish_reason=FinishReason.ABORT, error=error)
                )

    def advance(self, wanted: Callable[[], bool]) -> bool:
        return False

    def step(self) -> None:
        """Two prompt scores, or one token, for each request; or the end."""
        if self.dead or self.closed:
            return
        if any(self.poison.get(id) == row.drawn for id, row in list(self.rows.items())):
            (self.others() or [self])[0].die()
            return
        self.steps += 1
        with self._lock:
            outputs = self._ended
            self._ended = []
            for id, row in list(self.rows.items()):
                outputs.append(self._advance(row))
                if row.drawn == row.request.max_tokens:
                    del self.rows[id]
        self._deliver(outputs)

    def _advance(self, row: _Row) -> StepOutput:
        cached = 4 * len(row.request.output_ids)
        if row.to_score:
            now = row.to_score[:2]
            del row.to_score[:2]
            scores = tuple(TokenLogprob(id, -1.0, 1) for id in now)
            return StepOutput(row.request.id, prompt_logprobs=scores, num_cached_tokens=cached)
        drawn = token(row.request, row.drawn)
        row.drawn += 1
        last = row.drawn == row.request.max_tokens
        return StepOutput(
            row.request.id,
            (drawn,),
            finish_reason=FinishReason.LENGTH if last else None,
            num_cached_tokens=cached,
            scheduled=float(self.steps),
        )

    def die(self, reason: MoebiusError | None = None) -> None:
        self.dead = True
        self.rows.clear()
        self.lost(reason or EngineError(f"engine {self.number} was ended by its test"))

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.rows), generation_tokens=self.steps, total_blocks=9, ready=True
        )

    def expert_loads(self) -> ExpertLoads:
        return ExpertLoads()

    def close(self, timeout: float) -> None:
        self.closed = True
