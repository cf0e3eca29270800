"""What an engine counts from its start on, and the snapshot of it that its clients see."""

from bisect import bisect_left
from collections.abc import Callable

from moebius.engine.client import STEP_TOKENS_BOUNDS, DiskStats, EngineStats
from moebius.request.params import MOST_DRAFTS
from moebius.schedule.scheduler import Scheduler


class Counters:
    """Counts that only grow; the engine's thread adds, any thread may read.

    last_step   when that was over
    tokens      computed so far, prompts' and drawn ones alike
    """

    def __init__(self, now: float, disk: Callable[[], DiskStats] = DiskStats) -> None:
        self._disk = disk
        self.last_step = now
        self._steps = 0
        self._prompt_tokens = 0
        self._prompt_tokens_cached = 0
        self._generation_tokens = 0
        self._drafts = 0
        self._draft_tokens = 0
        self._accepted = [0] * MOST_DRAFTS
        self._step_tokens = [0] * (len(STEP_TOKENS_BOUNDS) + 1)
        self.tokens = 0

    def step(self, now: float) -> None:
        """A step is over."""
        self._steps += 1
        self.last_step = now

    def computed(self, tokens: int) -> None:
        """A step computed so many tokens, prompts' and drawn ones alike."""
        self._step_tokens[bisect_left(STEP_TOKENS_BOUNDS, tokens)] += 1
        self.tokens += tokens

    def drawn(self, tokens: int, drafts: int = 0) -> None:
        """A request drew so many tokens; of `drafts` that it verified all but the last one's."""
        self._generation_tokens += tokens
        if drafts:
            self._drafts += 1
            self._draft_tokens += drafts
            for place in range(tokens - 1):
                self._accepted[place] += 1

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt was computed, or `cached` of its tokens were found."""
        self._prompt_tokens += tokens
        self._prompt_tokens_cached += cached

    def stats(self, scheduler: Scheduler, now: float) -> EngineStats:
        """These and the scheduler's own."""
        pool = scheduler.pool
        states = pool.states
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            deferred=scheduler.num_deferred,
            used_blocks=pool.num_used,
            total_blocks=pool.num_blocks,
            most_running=scheduler.config.max_num_seqs,
            cached_blocks=pool.num_cached,
            used_states=0 if states is None else states.num_used,
            cached_states=0 if states is None else states.num_cached,
            total_states=0 if states is None else states.num_places,
            steps=self._steps,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_cached=self._prompt_tokens_cached,
            generation_tokens=self._generation_tokens,
            drafts=self._drafts,
            draft_tokens=self._draft_tokens,
            accepted_tokens=sum(self._accepted),
            accepted_per_place=tuple(self._accepted),
            step_tokens=tuple(self._step_tokens),
            step_tokens_sum=self.tokens,
            last_step=self.last_step,
            now=now,
            ready=True,
            disk=self._disk(),
        )
