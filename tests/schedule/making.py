"""Short ways to make requests, pools and schedulers in tests."""

from __future__ import annotations

from collections.abc import Sequence

from moebius.engine.config import EngineConfig
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.schedule.blocks import BlockPool
from moebius.schedule.groups import CacheGroups
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan
from schedule.books import check_books

KEY = bytes(range(32))
LIMITS = ServingLimits(vocab_size=1000, max_model_len=4096, priorities=True)


def make_request(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = 4,
    min_tokens: int = 0,
    prompt_logprobs: int | None = None,
    arrival: float = 0.0,
    **fields,
) -> Request:
    return Request(
        make_asked(
            request_id,
            prompt,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            prompt_logprobs=prompt_logprobs,
            arrival=arrival,
            **fields,
        )
    )


def make_asked(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = 4,
    min_tokens: int = 0,
    prompt_logprobs: int | None = None,
    arrival: float = 0.0,
    **fields,
) -> EngineRequest:
    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs
    )
    return EngineRequest.create(request_id, prompt, params, LIMITS, arrival=arrival, **fields)


def make_scheduler(
    *,
    blocks: int = 64,
    size: int = 4,
    seqs: int = 8,
    budget: int = 64,
    length: int = 256,
    caching: bool = True,
    groups: CacheGroups | None = None,
    **config,
) -> Scheduler:
    pool = BlockPool(blocks, size, groups=groups, key=KEY, enable_prefix_caching=caching)
    bounds = EngineConfig(
        max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length, **config
    )
    return Scheduler(bounds, pool)


def step(scheduler: Scheduler, now: float = 0.0, token: int = 5) -> tuple[StepPlan, list[Request]]:
    """One step in which every chunk that samples draws `token`; the books are checked after each
    half."""
    plan = scheduler.plan(now)
    check_books(scheduler)
    finished = scheduler.update(
        plan, {chunk.request_id: [token] for chunk in plan.chunks if chunk.samples}
    )
    check_books(scheduler)
    return plan, finished


def drain(scheduler: Scheduler, limit: int = 1000) -> list[StepPlan]:
    plans = []
    while scheduler.has_work:
        plans.append(step(scheduler)[0])
        assert len(plans) < limit
    assert scheduler.drained
    return plans
