"""A KV cache on disk behind an engine's own: what requests leave is written, what they could start
from is read (docs/prefix-cache.md).

The engine's thread decides and puts into the cache what was read; files are read and written by
threads of their own. A failure anywhere is a miss: the request is computed.
"""

from functools import partial
from hashlib import blake2b

from moebius.engine.client import DiskStats
from moebius.engine.counters import Counters
from moebius.engine.disk_memory import MOST_LANDED_BYTES
from moebius.engine.disk_pace import Pace
from moebius.engine.disk_reader import DiskReader, Load, Read
from moebius.engine.disk_store import DiskStore
from moebius.engine.disk_writer import DiskWriter
from moebius.engine.kv_cache import KVCache
from moebius.engine.tracing import Tracing
from moebius.schedule.request import Request
from moebius.schedule.tiers import Kept, Missing, Piece, TieredScheduler

LEAST_TOKENS = 256
"""Shorter prefixes are computed sooner than files of them are looked for."""
_NAP_SECONDS = 0.002
_CLOSE_SECONDS = 3.0


class DiskTier:
    """Of the engine that has this scheduler and this cache.

    realm    names all that the bytes of a block depend on beside its prefix hash and its layout
    nap      seconds that a turn may wait for a file, where nothing else is to be computed
    least    tokens of the shortest prefix that is kept
    """

    def __init__(
        self,
        scheduler: TieredScheduler,
        cache: KVCache,
        store: DiskStore,
        realm: bytes,
        *,
        nap: float = _NAP_SECONDS,
        least: int = LEAST_TOKENS,
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._store = store
        self._nap = nap
        self._least = least
        self.pace = Pace()
        self.reader = DiskReader(store, cache, self.pace)
        self.writer = DiskWriter(store, self._kept_name, self._copied)
        groups: list[int | None] = list(range(len(scheduler.pool.groups.blocks)))
        if scheduler.pool.states is not None:
            groups.append(None)
        self._sizes = {group: cache.piece_bytes(group) for group in groups}
        self._realms = {group: _digest(realm, cache.describe(group)) for group in groups}
        self._added: list[Request] = []
        self._loads: dict[str, Load] = {}
        self._reads: dict[bytes, Read] = {}
        self._late = 0
        # When the last turn was, and how many tokens had been computed then.
        self._began = 0.0
        self._computed = 0
        scheduler.watcher = self

    def turn(self, now: float, counters: Counters, trace: Tracing) -> None:
        """See who came and who waits no longer, and put into the cache what was read."""
        self._measure(now, counters)
        added = self._added
        self._added = []
        for request in added:
            self._begin(request, now, trace)
        for load in list(self._loads.values()):
            if load.request.id not in self._scheduler.awaited:  # its time ran out
                self._late += 1
                self._drop(load)
        if self._reads:
            self._land(trace)
        if self._loads and not self._scheduler.num_running and self._nap:
            self.reader.wait(self._nap)
            self._land(trace)

    def stats(self) -> DiskStats:
        return self._store.stats() + DiskStats(late=self._late)

    def close(self) -> None:
        """Write what waits to be written, for three seconds at most, and let the folder go."""
        self._scheduler.watcher = None
        self.reader.close(_CLOSE_SECONDS)
        self.writer.close(_CLOSE_SECONDS)
        self._store.close()

    def added(self, request: Request) -> None:
        self._added.append(request)

    def ended(self, request: Request) -> None:
        """Keep what the cache has of its tokens, if they are enough."""
        load = self._loads.get(request.id)
        if load is not None:
            self._drop(load)
        if request.num_published_blocks * self._scheduler.pool.block_size < self._least:
            return
        self.writer.offer(list(self._scheduler.kept(request)))

    def _measure(self, now: float, counters: Counters) -> None:
        """How long the last step took, which began behind the last turn."""
        tokens = counters.tokens
        self.pace.computed(tokens - self._computed, counters.last_step - self._began)
        self._began = now
        self._computed = tokens

    def _begin(self, request: Request, now: float, trace: Tracing) -> None:
        """Ask for what a new request could start from, if that is worth it, and let it wait."""
        scheduler = self._scheduler
        if request.finished or request.num_tokens <= self._least:
            return
        missing = scheduler.missing(request, self._stored)
        tokens = (missing.end - missing.start) * scheduler.pool.block_size
        nbytes = sum(self._sizes[piece.group] for piece in missing.pieces)
        queued = sum(read.nbytes for read in self._reads.values())
        if not (
            missing.pieces and self._fits(missing) and self.pace.worth(tokens, nbytes + queued)
        ):
            return
        until = now + self.pace.patience(tokens)
        scheduler.expect(request.id, until)
        trace.record(lambda writer: writer.expect(request.id, until))
        self._ask(Load(request, tokens), missing)

    def _fits(self, missing: Missing) -> bool:
        """Whether all pieces have a place at once, and would not push out one another."""
        pool = self._scheduler.pool
        blocks = sum(piece.group is not None for piece in missing.pieces)
        slots = pool.states is None or blocks == len(missing.pieces) or pool.states.num_free > 0
        return blocks <= pool.num_free and slots

    def _ask(self, load: Load, missing: Missing) -> None:
        self._loads[load.request.id] = load
        fresh: list[Read] = []
        for piece in missing.pieces:
            name = self._name(piece.group, load.request.block_hashes[piece.number])
            read = self._reads.get(name)
            if read is None or read.useless:  # then it may be passed over
                read = self._reads[name] = Read(name, piece.group, self._sizes[piece.group])
                fresh.append(read)
            read.wanted.append((load, piece))
            load.left += 1
        self.reader.ask(fresh)

    def _land(self, trace: Tracing) -> None:
        """Put into the cache what was read: little at a time, as others may go on meanwhile."""
        for read in self.reader.take(MOST_LANDED_BYTES):
            if self._reads.get(read.name) is read:
                del self._reads[read.name]
            waiting = [(load, piece) for load, piece in read.wanted if not load.over]
            if read.memory is not None and waiting:
                load, piece = waiting[0]
                self._put(load.request.id, piece, read.memory, trace)
            for load, _ in waiting:
                load.left -= 1
                if read.memory is None or not load.left:
                    self._settle(load, trace)

    def _put(self, request_id: str, piece: Piece, memory: list[memoryview], trace: Tracing) -> None:
        fill = partial(self._cache.fill, piece.group, pieces=memory)
        self._scheduler.land(request_id, piece, fill)
        trace.record(lambda writer: writer.land(request_id, piece))

    def _settle(self, load: Load, trace: Tracing) -> None:
        """All is there that will come; or a piece is missing, and the others alone are of use."""
        if load.over:
            return
        self._drop(load)
        request_id = load.request.id
        self._scheduler.settle(request_id)
        trace.record(lambda writer: writer.settle(request_id))

    def _drop(self, load: Load) -> None:
        load.over = True
        del self._loads[load.request.id]

    def _stored(self, group: int | None, digest: bytes) -> bool:
        return self._name(group, digest) in self._store

    def _name(self, group: int | None, digest: bytes) -> bytes:
        """What a piece is kept under: a keyed digest, as prefix hashes are."""
        return self._scheduler.pool.hasher.digest(b"stored", self._realms[group], digest)

    def _kept_name(self, kept: Kept) -> bytes:
        return self._name(kept.piece.group, kept.digest)

    def _copied(self, kept: Kept) -> memoryview | None:
        """The piece's bytes, unless it has gone meanwhile; on the writer's thread."""
        if not self._scheduler.holds(kept):
            return None
        data = self._cache.sealed(kept.piece.group, kept.place)
        return data if self._scheduler.holds(kept) else None


def _digest(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()
