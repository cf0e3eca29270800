"""A scheduler beside a second tier of the prefix cache, such as a disk: what can be fetched from
there for a request, and which requests wait for it.

Whoever has the tier says between two steps what it does. `missing` tells what would lengthen a
request's prefix, `expect` lets the request wait, `land` puts a piece that was fetched into a place
of its own and then lets it be found, and `settle` ends the wait. So no step ever waits, nothing is
held between two steps, and a request that waits too long is computed as if there were no tier.
These calls are plain data, and a trace that has them makes the same decisions again.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from moebius.request.finish import FinishReason
from moebius.schedule.blocks import BlockPool
from moebius.schedule.config import SchedulerConfig
from moebius.schedule.groups import Lineage
from moebius.schedule.places import Entry, Places
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan, UnfinishedPlan, WaitReason

FETCHED = Lineage("")
"""What comes from a tier derives from no request that could still fail: see `kept`."""


class Piece(NamedTuple):
    """A block of a request's prefix, by its group and its number; or, where the group is None, the
    snapshot of its states behind the block of that number."""

    group: int | None
    number: int


@dataclass(frozen=True, slots=True)
class Missing:
    """What would lengthen a request's cached prefix from `start` to `end` blocks, in order."""

    start: int
    end: int
    pieces: tuple[Piece, ...]


class Kept(NamedTuple):
    """A piece that the cache holds: its prefix hash, where it lies, and since which entry."""

    piece: Piece
    digest: bytes
    place: int
    entry: Entry


Stored = Callable[[int | None, bytes], bool]
"""Whether a tier has the piece of this group, or state, under this prefix hash."""


class Watcher(Protocol):
    """Is told of requests that come and go; changes nothing of what it is told."""

    def added(self, request: Request) -> None:
        """It is queued, and was never planned."""

    def ended(self, request: Request) -> None:
        """It is over, and about to give back all that it holds."""


class TieredScheduler(Scheduler):
    """A scheduler whose waiting requests may wait for a prefix that is fetched.

    watcher   is told of requests, where there is one
    awaited   until when each of those that wait does so at most, on the clock of `plan`; read-only
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        super().__init__(config, pool)
        self.watcher: Watcher | None = None
        self._awaited: dict[str, float] = {}
        self.awaited: Mapping[str, float] = MappingProxyType(self._awaited)

    def missing(self, request: Request, stored: Stored) -> Missing:
        """What a tier that has `stored` can add to the request's prefix; takes nothing."""
        pool = self.pool
        here = pool.match(request).num_blocks
        limit = pool._readable_blocks(request)
        hashes = pool._hash_blocks(request, limit)[:limit]

        def has(group: int | None, digest: bytes) -> bool:
            return digest in self._found(group) or stored(group, digest)

        end = _reach(pool, hashes, has)
        if end <= here:
            return Missing(here, here, ())
        size = pool.block_size
        firsts = [spec.first_block(end * size, size) for spec in pool.groups.blocks]
        pieces = [
            Piece(group, i)
            for i in range(end)
            for group, first in enumerate(firsts)
            if i >= first and hashes[i] not in pool.cached[group]
        ]
        if pool.states is not None and pool.states.snapshot(hashes[end - 1]) is None:
            pieces.append(Piece(None, end - 1))
        return Missing(here, end, tuple(pieces))

    def expect(self, request_id: str, until: float) -> None:
        """Let a waiting request wait for what is fetched, at most until then. What is cached of its
        prefix is evicted last from now on, as if it had been used."""
        request = self._requests[request_id]
        self.pool._hash_blocks(request, self.pool._readable_blocks(request))  # what lands has them
        self._touch(request)
        self._awaited[request_id] = until

    def land(self, request_id: str, piece: Piece, write: Callable[[int], None]) -> bool:
        """Have a piece of this request's prefix written to a place of its own, then let it be
        found.

        False where the request is over, the piece can be found already, or has no place: nothing is
        written then. What `write` raises goes through, and nothing can be found.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        digest = request.block_hashes[piece.number]
        places = self._places(piece.group)
        if digest in self._found(piece.group) or not places.num_free:
            return False
        if piece.group is None and not all(digest in cached for cached in self.pool.cached):
            return False  # it goes with the block before it, which has gone
        place = places._take()
        try:
            write(place)
            places._enter(piece.group or 0, digest, place, FETCHED)
        finally:
            places._release((place,))
        return True

    def settle(self, request_id: str) -> None:
        """Nothing more comes for this request, if it still waits."""
        if self._awaited.pop(request_id, None) is not None:
            self._touch(self._requests[request_id])

    def kept(self, request: Request) -> Iterator[Kept]:
        """What the cache holds of a request that has ended, from its beginning on.

        Without what derives from a request that is unfinished: it may fail yet, and what a tier has
        is withdrawn from nobody. It is kept when that request has ended.
        """
        groups: list[int | None] = list(range(len(self.pool.groups.blocks)))
        if self.pool.states is not None:
            groups.append(None)
        unfinished = self._requests.keys() - {request.id}
        sound: set[Lineage] = set()
        for number in range(request.num_published_blocks):
            digest = request.block_hashes[number]
            for group in groups:
                place = self._found(group).get(digest)
                entry = None if place is None else self._places(group)._entries[place]
                if place is None or entry is None or _derives(entry.lineage, unfinished, sound):
                    continue
                yield Kept(Piece(group, number), digest, place, entry)

    def holds(self, kept: Kept) -> bool:
        """Whether that piece has lain there ever since; safe to ask from any thread."""
        return self._places(kept.piece.group)._entries[kept.place] is kept.entry

    def add(self, request: Request) -> None:
        super().add(request)
        if self.watcher is not None:
            self.watcher.added(request)

    def plan(self, now: float) -> StepPlan:
        for request_id in [name for name, until in self._awaited.items() if until <= now]:
            del self._awaited[request_id]
        return super().plan(now)

    def _admit(self, request: Request, promised: int, step: UnfinishedPlan) -> WaitReason | None:
        if request.id in self._awaited:
            return "prefix_on_disk"
        return super()._admit(request, promised, step)

    def _finish(self, request: Request, reason: FinishReason) -> Request:
        self._awaited.pop(request.id, None)
        if self.watcher is not None:
            self.watcher.ended(request)
        return super()._finish(request, reason)

    def _places(self, group: int | None) -> Places:
        if group is not None:
            return self.pool
        assert self.pool.states is not None, "a snapshot is of a model with states"
        return self.pool.states

    def _found(self, group: int | None) -> Mapping[bytes, int]:
        return self._places(group).cached[group or 0]

    def _touch(self, request: Request) -> None:
        """All blocks of its prefix that nobody holds are evicted last, of them its end first."""
        evictable = self.pool._evictable
        for digest in reversed(request.block_hashes[: self.pool._readable_blocks(request)]):
            for cached in self.pool.cached:
                place = cached.get(digest)
                if place is not None and place in evictable:
                    evictable.move_to_end(place)


def _derives(lineage: Lineage, publishers: Container[str], sound: set[Lineage]) -> bool:
    """Whether a lineage leads back to one of these; `sound` are known to lead to none, and grow."""
    seen: set[Lineage] = set()
    stack = [lineage]
    while stack:
        each = stack.pop()
        if each.publisher in publishers:
            return True
        if each not in sound and each not in seen:
            seen.add(each)
            stack += each.parents
    sound |= seen
    return False


def _reach(pool: BlockPool, hashes: Sequence[bytes], has: Stored) -> int:
    """The last boundary, in blocks, behind which every group and the states can resume."""
    size = pool.block_size
    specs = pool.groups.blocks
    runs = [0] * len(specs)  # neighbouring blocks up to here, of each group
    best = 0
    for count, digest in enumerate(hashes, 1):
        runs = [run + 1 if has(group, digest) else 0 for group, run in enumerate(runs)]
        if any(spec.window is None and run < count for spec, run in zip(specs, runs, strict=True)):
            break
        firsts = (spec.first_block(count * size, size) for spec in specs)
        good = all(run >= count - first for run, first in zip(runs, firsts, strict=True))
        if good and (pool.states is None or has(None, digest)):
            best = count
    return best
