"""Which scheduler an engine has: one that drafts measures first what this model's steps cost.

Whether drafts pay is a matter of the model and the machine: where a step is bound by its weights'
bytes a few more rows cost little; where it is bound by operations, or other rows choose other
experts, each costs what a token costs. So steps of several sizes are made when the model is loaded.
"""

import logging
import sys
import time
from collections.abc import Callable

from moebius.engine.config import EngineConfig
from moebius.engine.runner import Runner
from moebius.engine.step_memory import logit_rows
from moebius.engine.trace import TraceWriter
from moebius.models.config import ModelConfig
from moebius.ops.steps import StepInputs
from moebius.schedule.blocks import BlockPool
from moebius.schedule.drafts import DraftingScheduler, StepCosts
from moebius.schedule.groups import CacheGroups
from moebius.schedule.scheduler import Scheduler
from moebius.schedule.tiered_drafts import TieredDraftingScheduler
from moebius.schedule.tiers import TieredScheduler

log = logging.getLogger(__name__)

_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
_ROUNDS = 6
_ROUNDS_OF_MANY = 2
"""Of more than `_LEAST` rows, whose steps take longer and vary less."""
_SECONDS = 2.0
"""What is not measured by then is not: a step of a large model takes long, and so would this."""
_LEAST = 8
"""Up to so many rows are measured, however long they take."""


def why_not(model: ModelConfig, groups: CacheGroups) -> str:
    """Why requests of this model cannot draft; empty where they can."""
    if groups.states is not None:
        return "the state of a recurrent layer cannot be taken back to the last right draft"
    if model.encoder_layers:
        return "what steps of a decoder beside an encoder cost is not measured"
    if model.vocab_size > sys.maxunicode + 1:
        return f"drafts are looked up among {sys.maxunicode + 1:,} token ids at most"
    return ""


def scheduler_for(
    config: EngineConfig,
    model: ModelConfig,
    pool: BlockPool,
    runner: Runner,
    trace: TraceWriter | None = None,
    *,
    tiered: bool = False,
) -> Scheduler:
    """A scheduler of the engine's; where its requests draft, with what steps of its runner cost.

    tiered: it is beside a second tier of the prefix cache.
    """
    plain = TieredScheduler if tiered else Scheduler
    if config.speculative == "none":
        return plain(config, pool)
    reason = why_not(model, pool.groups)
    if reason:
        log.warning("--speculative %s is off: %s", config.speculative, reason)
        return plain(config, pool)
    most = logit_rows(config)
    costs = step_costs(runner, pool.num_blocks, min(most, config.max_num_batched_tokens))
    one = costs.of(1)
    told = ", ".join(f"{rows} rows {costs.of(rows) / one:.2f}" for rows in (2, 4, 8, 16, 64))
    log.info("drafts: a step of one row takes %.2f ms; over it take %s", 1e3 * one, told)
    drafting = TieredDraftingScheduler if tiered else DraftingScheduler
    scheduler = drafting(config, pool, costs, most)
    if trace is not None:
        trace.drafting(scheduler)
    return scheduler


def step_costs(
    runner: Runner, num_blocks: int, most: int, clock: Callable[[], float] = time.perf_counter
) -> StepCosts:
    """Seconds of steps of up to `most` rows, with the best token of each.

    The rows are one sequence of various tokens, which choose various experts, at the beginning of
    the cache: nothing else may lie there. Each size counts by the fastest of some steps.
    """
    cache = runner.cache
    groups = max(len(cache.layout.windows), 1)
    most = min(most, num_blocks // groups * cache.block_size)
    best: dict[int, float] = {}
    began = clock()
    for number in range(_ROUNDS):
        for rows in _ROWS:
            late = clock() - began > _SECONDS or number >= _ROUNDS_OF_MANY
            if rows > most or (late and rows > _LEAST):
                break
            if rows in best and clock() - began > _SECONDS:
                break
            seconds = _timed(runner, rows, groups, clock)
            best[rows] = min(seconds, best.get(rows, seconds))
    runner.expert_counts.clear()
    measured = []
    cost = 0.0
    for rows, seconds in best.items():
        cost = max(cost, seconds)  # more rows cost no less: what says so is the clock's noise
        measured.append((rows, cost))
    return StepCosts(measured)


def _timed(runner: Runner, rows: int, groups: int, clock: Callable[[], float]) -> float:
    size = runner.cache.block_size
    vocab = runner.model.config.vocab_size
    tables = [
        [[block * groups + group for block in range(-(-rows // size))]] for group in range(groups)
    ]
    tokens = [(rows * 7919 + row * 104_729) % vocab for row in range(rows)]
    first, *others = tables
    inputs = StepInputs.build([tokens], [0], first, size, runner.device, others=others)
    began = clock()
    runner.execute(inputs)
    runner.ops.argmax(runner.logits(range(rows)))
    return clock() - began
