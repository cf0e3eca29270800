"""The simulation beside a second tier: a disk in a dictionary, slow, forgetful and late at random.

What it is told to keep it copies later, or never; what it is asked for comes in part, out of order
between requests, damaged or too late. The checker looks at all that lands, and at every step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random

from moebius.schedule.request import Request
from moebius.schedule.tiers import Kept, Piece, TieredScheduler
from schedule.checker import Held
from schedule.simulate import Episode, Stats


@dataclass(slots=True)
class Fetch:
    """Pieces of a request's prefix that are on their way."""

    request: Request
    pieces: deque[Piece]


class Tier:
    """Pieces by group and prefix hash, and what is on its way in either direction."""

    def __init__(self, episode: TieredEpisode, rng: Random) -> None:
        self.episode = episode
        self.scheduler: TieredScheduler = episode.scheduler
        self.rng = rng
        self.files: dict[tuple[int | None, bytes], Held] = {}
        self.fresh: list[Request] = []
        self.writes: deque[Kept] = deque()
        self.fetches: dict[str, Fetch] = {}
        self.landed = 0
        self.late = 0
        self.torn = 0
        # How often a write, a read and a request get on, and how often a read fails.
        self.speed = rng.choice((0.6, 0.95, 1.0))
        self.failure = rng.choice((0.0, 0.0, 0.1))
        self.most = rng.choice((10, 100, 1000))
        # How often the memory forgets what nobody holds, as it does in a restart.
        self.forgetting = rng.choice((0.0, 0.05, 0.2))
        self.scheduler.watcher = self

    def added(self, request: Request) -> None:
        self.fresh.append(request)

    def ended(self, request: Request) -> None:
        self.fetches.pop(request.id, None)
        self.writes += self.scheduler.kept(request)

    def turn(self, now: float) -> None:
        """What happens between two steps."""
        self._copy()
        if self.rng.random() < self.forgetting:
            self._forget()
        for fetch in list(self.fetches.values()):
            if fetch.request.id not in self.scheduler.awaited:
                self.late += 1
                del self.fetches[fetch.request.id]
            else:
                self._land(fetch)
        for request in self.fresh:
            self._ask(request, now)
        self.fresh.clear()
        self.episode.checker.fetched()

    def _forget(self) -> None:
        pool = self.scheduler.pool
        for places in (pool, pool.states):
            for place in [] if places is None else list(places._evictable):
                if place in places._evictable:  # it may have gone with the block before it
                    places._discard(place)

    def _copy(self) -> None:
        checker = self.episode.checker
        while self.writes and self.rng.random() < self.speed:
            kept = self.writes.popleft()
            held = checker.held(kept.piece.group, kept.place)
            if not self.scheduler.holds(kept):
                self.torn += 1
                continue
            self.files[kept.piece.group, kept.digest] = held
            while len(self.files) > self.most:
                del self.files[next(iter(self.files))]

    def _ask(self, request: Request, now: float) -> None:
        if request.finished:
            return
        missing = self.scheduler.missing(request, lambda *piece: piece in self.files)
        if not missing.pieces:
            return
        until = now + self.rng.choice((0.05, 0.5, 5.0))
        self.scheduler.expect(request.id, until)
        self.episode.checker.fetching[request.id] = until
        self.fetches[request.id] = Fetch(request, deque(missing.pieces))

    def _land(self, fetch: Fetch) -> None:
        while fetch.pieces and self.rng.random() < self.speed:
            piece = fetch.pieces.popleft()
            key = (piece.group, fetch.request.block_hashes[piece.number])
            if key not in self.files or self.rng.random() < self.failure:
                self.files.pop(key, None)
                fetch.pieces.clear()
            else:
                self.landed += self._put(fetch.request.id, piece, self.files[key])
        if not fetch.pieces:
            self.scheduler.settle(fetch.request.id)
            self.episode.checker.fetching.pop(fetch.request.id, None)
            del self.fetches[fetch.request.id]

    def _put(self, request_id: str, piece: Piece, held: Held) -> bool:
        checker = self.episode.checker
        return self.scheduler.land(
            request_id, piece, lambda place: checker.landed(piece.group, place, held)
        )


class TieredEpisode(Episode):
    """An episode whose scheduler has a second tier."""

    scheduler: TieredScheduler

    def __init__(
        self,
        seed: int,
        *,
        family: str | None = None,
        scheduler_class: type[TieredScheduler] = TieredScheduler,
    ) -> None:
        super().__init__(seed, family=family, scheduler_class=scheduler_class)
        self.tier = Tier(self, Random(f"tier {seed}"))

    def run(self, steps: int) -> Stats:
        stats = super().run(steps)
        if self.scheduler.awaited:
            self.checker.broken("I12", f"{[*self.scheduler.awaited]} are over, and still awaited")
        return stats

    def _turn(self) -> None:
        self.tier.turn(self.now)
        super()._turn()
