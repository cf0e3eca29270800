"""The real scheduler and pool under a virtual clock, with a fake model and random, hostile work,
checked at each step.

`make simulate STEPS=1000000 SEED=1` runs episodes with seeds 1, 2, 3, ...: each a new random
configuration (tiny pools, blocks of 1 to 16 tokens, chunking on or off, the layers of each family of
models: windows, recurrent states with few slots, both; slots a request; prompts that an encoder
reads) and workload (shared
prefixes, turns of chats, tenants, owners, priorities, deadlines, aborts in every state, failed steps,
numerical failures, several tokens a step, drafts of every kind, steps that begin before the tokens
of the ones before are known), ending when all is drained. A violation names the invariant, the episode's seed and the step,
and comes again from that seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cache
from random import Random
from timeit import default_timer  # the command's stop watch; the simulation's own clock is virtual

from moebius.engine.config import EngineConfig
from moebius.errors import OverloadError, RequestError
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams, ServingLimits
from moebius.request.share import Share
from moebius.schedule.blocks import BlockPool
from moebius.schedule.drafts import DraftingScheduler, StepCosts
from moebius.schedule.groups import NO_BLOCK, CacheGroups, GroupSpec, StateSpec
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Chunk, Scheduler, StepPlan
from schedule.checker import Checker, Violation, advance, draw
from schedule.guessers import KINDS

EPISODE_STEPS = 600
DRAIN_STEPS = 5_000
SEEDS_A_PROCESS = 1_000_000


@dataclass(slots=True)
class Stats:
    """Counts of what a simulation went through."""

    steps: int = 0
    episodes: int = 0
    requests: int = 0
    refused: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    expired: int = 0
    rollbacks: int = 0
    preemptions: int = 0
    prefix_waits: int = 0
    prefix_hits: int = 0
    blocks_passed: int = 0
    turns: int = 0
    snapshots: int = 0
    restores: int = 0
    computed_tokens: int = 0
    drafts: int = 0
    right_drafts: int = 0
    covered: int = 0

    def add(self, other: Stats) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass(frozen=True, slots=True)
class Mood:
    """How often things happen in one episode, as probabilities, and how large they are."""

    arrival: float
    burst: int
    abort: float
    rollback: float
    failure: float
    several: float
    nothing_drawn: float
    deadline: float
    score: float
    prompt_logprobs: float
    priorities: int
    tenants: int
    vocab: int
    prompt: int
    output: int

    @classmethod
    def random(cls, rng: Random) -> Mood:
        return cls(
            arrival=rng.choice((0.2, 0.6, 1.5)),
            burst=rng.choice((1, 1, 4, 10)),
            abort=rng.choice((0.0, 0.02, 0.1)),
            rollback=rng.choice((0.0, 0.02, 0.1)),
            failure=rng.choice((0.0, 0.0, 0.05)),
            several=rng.choice((0.0, 0.3)),
            nothing_drawn=rng.choice((0.0, 0.0, 0.05)),
            deadline=rng.choice((0.0, 0.1, 0.4)),
            score=rng.choice((0.0, 0.1)),
            prompt_logprobs=rng.choice((0.0, 0.15)),
            priorities=rng.choice((1, 1, 3)),
            tenants=rng.choice((1, 2)),
            vocab=rng.choice((2, 3, 50)),
            prompt=rng.choice((3, 24, 64)),
            output=rng.choice((4, 30, 60)),
        )


FAMILIES: dict[str, tuple[tuple[int | None, ...], bool]] = {
    "full attention": ((None,), False),
    "Mistral": ((5,), False),
    "gpt-oss": ((None, 4), False),
    "Gemma 4": ((None, 9, 9, 9, 9, 9), False),
    "two windows": ((3, 12), False),
    "unequal": ((None, 9, None), False),
    "Qwen3.5": ((None,), True),
    "windows and states": ((17, 1), True),
    "all kinds": ((None, 4), True),
    "recurrent": ((), True),
    "T5": ((None,), False),
}
"""What the layers of each family keep: the windows of its block tables, and whether there are
states beside them. Windows are shorter than those of the models, as prompts are."""
READING = frozenset({"T5"})
"""Those whose prompts an encoder reads, each in one step and for its own request alone."""


def random_groups(rng: Random, seqs: int, family: str) -> CacheGroups:
    """A family's, with few slots or many for its states."""
    windows, recurrent = FAMILIES[family]
    states = None
    if recurrent:
        scratch = rng.choice((0, 0, 2))
        spare = rng.randint(0, rng.choice((2, seqs * (1 + scratch), 40)))
        interval = rng.choice((1, 2, 4))
        states = StateSpec(1 + scratch + spare, scratch, interval, rng.choice((1, 1, 2)))
    return CacheGroups(tuple(map(GroupSpec, windows)), states)


@cache
def most_blocks(window: int, chunk: int, size: int) -> int:
    """Blocks that window and chunk can touch, wherever they begin: counted one by one."""
    tokens = window - 1 + chunk
    return max(
        len({position // size for position in range(first, first + tokens)})
        for first in range(size)
    )


class Owners:
    """Whose requests are: those of one, or of several who take turns."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        several = [Share("a", 0.5), Share("b", 1.0), Share("c", 3.0), Share()]
        self._shares = rng.choice(([Share()], several[:2], several))

    def draw(self) -> Share:
        """One of them brings most requests."""
        if self._rng.random() < 0.5:
            return self._shares[0]
        return self._rng.choice(self._shares)


class Episode:
    """One random configuration and workload, from one seed."""

    def __init__(
        self,
        seed: int,
        *,
        family: str | None = None,
        scheduler_class: type[Scheduler] | None = None,
        pool_class: type[BlockPool] = BlockPool,
    ) -> None:
        """scheduler_class: None: one that drafts in half of the episodes."""
        self.rng = rng = Random(seed)
        self.mood = Mood.random(rng)
        self.stats = Stats(episodes=1)
        self.now = 0.0
        size = rng.choice((1, 2, 3, 4, 8, 16))
        num_blocks = rng.randint(3, 12) if size >= 8 else rng.randint(6, 40)
        seqs = rng.randint(1, 8)
        longest = min(64, size * num_blocks + 4)
        drawn = rng.choice((*FAMILIES, *["full attention"] * 4))
        groups = random_groups(rng, seqs, family or drawn)
        self.start_ids = (1,) if (family or drawn) in READING else ()
        num_blocks *= len(groups.blocks) * rng.choice((1, 1, 3) if groups.states else (1,))
        self.config = EngineConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=rng.randint(max(seqs, 4), rng.choice((12, 64))),
            max_model_len=rng.choice((longest, rng.randint(6, longest))),
            enable_chunked_prefill=rng.random() < 0.75,
            max_queue_requests=rng.choice((3, 20)),
            max_queue_tokens=rng.choice((60, 1000)),
        )
        key = rng.randbytes(32)
        caching = rng.random() < 0.9 and not self.start_ids
        pool = pool_class(num_blocks, size, groups=groups, enable_prefix_caching=caching, key=key)
        # Of its own, as that of owners below.
        self.draft_rng = Random(f"drafts {seed}")
        self.scheduler = self._make_scheduler(pool, scheduler_class)
        self.checker = Checker(self.scheduler, key, self.mood.vocab, seed)
        self.limits = ServingLimits(self.mood.vocab, self.config.max_model_len + 4, priorities=True)
        self.texts = [[rng.randrange(self.mood.vocab) for _ in range(longest)] for _ in range(3)]
        self.done: list[str] = []
        # Of its own, so that what else happens does not depend on it.
        self.ahead_rng = Random(f"before {seed}")
        self.ahead = self.ahead_rng.random() < 0.25
        self.owners = Owners(Random(f"owners {seed}"))
        self.turns: list[Request] = []

    def _make_scheduler(
        self, pool: BlockPool, scheduler_class: type[Scheduler] | None
    ) -> Scheduler:
        rng = self.draft_rng
        if scheduler_class is None:
            scheduler_class = rng.choice((Scheduler, DraftingScheduler))
        if not issubclass(scheduler_class, DraftingScheduler):
            return scheduler_class(self.config, pool)
        if pool.states is not None:
            return Scheduler(self.config, pool)
        costs = StepCosts([(1, 1.0), (8, rng.choice((1.0, 2.0))), (64, rng.choice((2.0, 16.0)))])
        most_rows = self.config.max_num_seqs + rng.choice((0, 3, 100))
        expected = lambda request: self.checker.tracks[request.id].expected  # noqa: E731
        kind = rng.choice(KINDS)
        return scheduler_class(
            self.config, pool, costs, most_rows, lambda: kind(rng, expected, self.mood.vocab)
        )

    def run(self, steps: int) -> Stats:
        """At most `steps` steps with new work, then as many as it takes to drain; all of them are
        counted."""
        checker = self.checker
        try:
            while checker.step < steps:
                self._arrivals()
                self._turn()
            self.mood = replace(self.mood, abort=0, rollback=0, failure=0, nothing_drawn=0)
            while self.scheduler.has_work:
                self._turn()
                if checker.step > steps + DRAIN_STEPS:
                    checker.broken("I8", f"{len(checker.tracks)} requests do not end")
            checker.quiet()
        except Violation:
            raise
        except (
            Exception
        ) as error:  # the scheduler's own assertions, and whatever a bug makes it stumble on
            checker.broken("crash", f"{type(error).__name__}: {error}")
        self.stats.steps = checker.step
        self.stats.preemptions = self.scheduler.preemptions
        self.stats.prefix_hits = self.scheduler.prefix_hits
        assert self.scheduler.pool.idle
        return self.stats

    def _turn(self) -> None:
        """One step: plan, disturb, compute, disturb, update or roll back; everything is checked in
        between."""
        rng, checker, scheduler = self.rng, self.checker, self.scheduler
        checker.step += 1
        self.now += rng.random() * 0.1
        self._maybe_abort()
        plan = scheduler.plan(self.now)
        checker.planned(plan, self.now)
        covered = checker.ahead.planned(plan)
        checker.books()
        self.stats.expired += len(plan.expired)
        self.stats.prefix_waits += sum(
            reason == "prefix_in_flight" for reason in plan.waiting.values()
        )
        if plan.chunks and rng.random() < self.mood.rollback:
            self._maybe_abort()
            self._roll_back(plan)
        else:
            self._compute(plan, covered)
        checker.books()

    def _roll_back(self, plan: StepPlan) -> None:
        self.scheduler.rollback(plan)
        self.checker.rolled_back(plan)
        self.stats.rollbacks += 1

    def _compute(self, plan: StepPlan, covered: Collection[str]) -> None:
        values = self.checker.computed(plan, covered)
        self.stats.covered += len(covered)
        ahead: dict[str, int] | None = None
        drawing = all(chunk.samples and not chunk.drafts for chunk in plan.chunks)
        if self.ahead and plan.chunks and drawing:
            ahead = self._compute_ahead(plan, values)
            self.checker.books()
            if self.ahead_rng.random() < self.mood.rollback:
                self._roll_back(plan)
                return
        self._maybe_abort()
        if plan.chunks and self.rng.random() < self.mood.failure:
            first = plan.chunks[0]  # others may have read what it has computed
            self._fail(self.rng.choice((first, *plan.chunks)).request_id)
        drawn: dict[str, list[int]] = (
            {id: [token] for id, token in ahead.items() if id in self.checker.tracks}
            if ahead is not None
            else {c.request_id: self._draw(c, values) for c in plan.chunks if c.samples}
        )
        self.stats.drafts += sum(len(chunk.drafts) for chunk in plan.chunks)
        finished = self.scheduler.update(plan, drawn)
        self.checker.updated(plan, drawn, finished)
        self.done += [request.id for request in finished]
        self.turns = (self.turns + finished)[-6:]
        self.stats.finished += len(finished)
        self.stats.computed_tokens += plan.num_tokens
        groups = self.scheduler.pool.groups
        if groups.windowed:
            self.stats.blocks_passed += sum(
                table.count(NO_BLOCK) for chunk in plan.chunks for table in chunk.tables
            )
        if groups.states is not None:
            slots = [chunk.states for chunk in plan.chunks if chunk.states is not None]
            self.stats.snapshots += sum(one.save is not None for one in slots)
            self.stats.restores += sum(one.restore is not None for one in slots)

    def _compute_ahead(self, plan: StepPlan, values: dict[str, int]) -> dict[str, int]:
        """The step behind this one, of the tokens that this one draws, which are returned."""
        tracks = self.checker.tracks
        tokens = {
            id: draw(tracks[id].secret, value, self.mood.vocab) for id, value in values.items()
        }
        self.checker.computed_ahead(plan, self.scheduler.following(plan), tokens)
        return tokens

    def _draw(self, chunk: Chunk, values: dict[str, int]) -> list[int]:
        """One token, now and then several or none; from what the cache holds and from the request's
        secret."""
        track = self.checker.tracks.get(chunk.request_id)
        if track is None or self.rng.random() < self.mood.nothing_drawn:
            return []
        value, tokens = values[chunk.request_id], []
        if chunk.drafts:
            return self._verify(chunk.drafts, track.secret, value)
        for _ in range(self.rng.randint(2, 5) if self.rng.random() < self.mood.several else 1):
            tokens.append(draw(track.secret, value, self.mood.vocab))
            value = advance(value, tokens[-1])
        return tokens

    def _verify(self, drafts: Sequence[int], secret: int, value: int) -> list[int]:
        """A token behind the last one, and behind each right draft; now and then fewer, as where a
        later row cannot be drawn from yet."""
        tokens = [draw(secret, value, self.mood.vocab)]
        for draft in drafts:
            if tokens[-1] != draft or self.draft_rng.random() < 0.05:
                break
            self.stats.right_drafts += 1
            value = advance(value, draft)
            tokens.append(draw(secret, value, self.mood.vocab))
        return tokens

    def _arrivals(self) -> None:
        if self.rng.random() < self.mood.arrival / self.mood.burst:
            for _ in range(self.rng.randint(1, self.mood.burst)):
                self._arrive()

    def _arrive(self) -> None:
        request, secret = self._make_request()
        hopeless, full = self._hopeless(request), self._full(request)
        try:
            self.scheduler.add(request)
        except RequestError as error:
            if not hopeless:
                self.checker.broken("I8", f"a request that fits was refused: {error}")
        except OverloadError as error:
            if not full or hopeless or not 0 < error.retry_after <= 60:
                self.checker.broken("I8", f"refused without cause: {error}")
        else:
            if hopeless or full:
                self.checker.broken(
                    "I8",
                    f"{request.id} was let in, but {'cannot run' if hopeless else 'is too much'}",
                )
            self.checker.admitted(request, secret)
            self.stats.requests += 1
            return
        self.stats.refused += 1

    def _make_request(self) -> tuple[Request, int]:
        rng, mood = self.rng, self.mood
        longest = self.config.max_model_len
        prompt, salt = self._prompt()
        prompt = prompt[: longest + 3]
        generation_start = None
        if rng.random() < 0.6:
            generation_start = max(0, len(prompt) - rng.choice((0, 1, 2, 5, len(prompt))))
        room = longest + 4 - len(prompt)
        max_tokens = 0 if rng.random() < mood.score else rng.randint(1, min(room, mood.output))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.2 else 0,
            prompt_logprobs=1 if rng.random() < mood.prompt_logprobs else None,
        )
        request = Request(
            EngineRequest.create(
                f"r{self.stats.requests + self.stats.refused}",
                prompt,
                params,
                self.limits,
                arrival=round(self.now, 1),
                eos_ids=frozenset((0,)) if rng.random() < 0.3 else frozenset(),
                priority=rng.randrange(mood.priorities),
                deadline=self.now + rng.random() * 2 if rng.random() < mood.deadline else None,
                salt=salt,
                share=self.owners.draw(),
                generation_start=generation_start,
            ),
            self.start_ids,
        )
        secret = rng.getrandbits(32)
        if rng.random() < 0.05:  # a replay: some of its tokens were drawn by an engine that is gone
            output, _ = self.checker.solo(request, secret)
            request.output_ids[:] = output[: rng.randint(0, max(0, len(output) - 1))]
        return request, secret

    def _prompt(self) -> tuple[list[int], bytes]:
        """A new text, which may begin as others do; or the next turn of a chat that went before:
        behind its answer, or, where the template drops that, from where its answer began."""
        rng, mood = self.rng, self.mood
        last = rng.choice(self.turns) if self.turns else None
        if last and last.num_tokens < self.config.max_model_len - 8 and rng.random() < 0.4:
            start = last.asked.generation_start
            prompt = [*last.prompt_ids, *last.output_ids]
            if start is not None and rng.random() < 0.5:
                prompt = prompt[:start]
            self.stats.turns += 1
            salt = last.asked.salt
        else:
            shared = rng.randint(0, min(mood.prompt, self.config.max_model_len))
            prompt = rng.choice(self.texts)[:shared]
            salt = bytes([rng.randrange(mood.tenants)])
        return prompt + [rng.randrange(mood.vocab) for _ in range(rng.randint(1, 6))], salt

    def _hopeless(self, request: Request) -> bool:
        """Whether the request, alone in an empty pool, could not be served to its end."""
        config, pool, prompt = self.config, self.scheduler.pool, len(request.prompt_ids)
        if prompt > config.max_model_len or (
            prompt == config.max_model_len and request.max_tokens > 0
        ):
            return True
        whole = request.source if config.enable_chunked_prefill else prompt
        if whole > config.max_num_batched_tokens:
            return True
        last_computed = max(prompt, min(prompt + request.max_tokens, config.max_model_len) - 1)
        size = pool.block_size
        whole = -(-last_computed // size)
        needed = 0
        for spec in pool.groups.blocks:
            most = whole
            if spec.window is not None:
                most = min(whole, most_blocks(spec.window, config.max_num_batched_tokens, size))
            needed += most
        return needed > pool.num_blocks

    def _full(self, request: Request) -> bool:
        """Whether the queue has no room: for anybody, or beside what its owner has there."""
        queue = [t.request for t in self.checker.tracks.values() if t.start is None]
        if not queue:
            return False
        mine = [each for each in queue if each.asked.share.account == request.asked.share.account]
        requests = self.config.max_queue_requests - len(queue)
        tokens = self.config.max_queue_tokens - sum(each.num_tokens for each in queue)
        size = request.num_tokens
        if requests < 1 or tokens < size:
            return True
        if not request.asked.share.account or not mine:
            return False
        owned = sum(each.num_tokens for each in mine)
        return len(mine) + 1 > 8 * (requests - 1) or owned + size > 8 * (tokens - size)

    def _maybe_abort(self) -> None:
        """End some request by force: waiting, running, preempted or, to no effect, over."""
        if self.rng.random() >= self.mood.abort:
            return
        over = not self.checker.tracks or self.rng.random() < 0.1
        request_id = (
            self.rng.choice((*self.done[-5:], "nobody"))
            if over
            else self.rng.choice([*self.checker.tracks])
        )
        request = self.scheduler.abort(request_id)
        if (request is None) != (request_id not in self.checker.tracks):
            self.checker.broken("I10", f"abort of {request_id} returned {request}")
        if request is not None:
            self.checker.ended(request, FinishReason.ABORT)
            self.done.append(request_id)
            self.stats.aborted += 1

    def _fail(self, request_id: str) -> None:
        request = self.scheduler.fail(request_id)
        if (request is None) != (request_id not in self.checker.tracks):
            self.checker.broken("I10", f"failure of {request_id} returned {request}")
        if request is not None:
            self.checker.ended(request, FinishReason.ERROR)
            self.done.append(request_id)
            self.stats.failed += 1


def simulate(
    steps: int,
    seed: int,
    *,
    family: str | None = None,
    scheduler_class: type[Scheduler] | None = None,
    pool_class: type[BlockPool] = BlockPool,
) -> Stats:
    """At least `steps` checked steps, in episodes with seeds from `seed` on, of one family of
    models or of all. Raises Violation."""
    total = Stats()
    while total.steps < steps:
        episode = Episode(
            seed + total.episodes,
            family=family,
            scheduler_class=scheduler_class,
            pool_class=pool_class,
        )
        total.add(episode.run(min(EPISODE_STEPS, steps - total.steps)))
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m schedule.simulate", description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=100_000, help="steps in all, over all processes"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the first episode")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args(argv)
    began = default_timer()
    seeds = [args.seed + i * SEEDS_A_PROCESS for i in range(args.processes)]
    total = Stats()
    print(f"seeds {seeds}, {args.steps} steps", flush=True)
    with ProcessPoolExecutor(args.processes) as executor:
        jobs = [executor.submit(simulate, -(-args.steps // args.processes), seed) for seed in seeds]
        try:
            for job in jobs:
                total.add(job.result())
        except Violation as violation:
            print(violation)
            return 1
    rate = total.steps / (default_timer() - began)
    print("  ".join(f"{f.name} {getattr(total, f.name):,}" for f in fields(total)))
    print(f"no violation; {rate:,.0f} steps/s, {rate / args.processes:,.0f} a process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
