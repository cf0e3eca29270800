"""The KV cache's blocks, without the tensors: who owns them, who shares them, which may be reused.

A block is `block_size` consecutive token positions of one group of layers and is in exactly one of
three states (places.py). "Block" as in the PagedAttention paper (arXiv 2309.06180). A sequence has
a block table for each group; entry i is the block of positions i * block_size onward, or NO_BLOCK
once these lie before the group's window.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from moebius.errors import ConfigError
from moebius.request.hashes import BlockHasher
from moebius.schedule.groups import NO_BLOCK, CacheGroups, Lineage, StateSlots, tainted
from moebius.schedule.places import Places
from moebius.schedule.request import Request
from moebius.schedule.states import OwnedStates, StatePool


class Hit(NamedTuple):
    """A cached prefix of `num_blocks` blocks behind which every group can resume.

    tables     each group's blocks of it, NO_BLOCK before the group's window
    snapshot   the hash of the state at its end, where the model has states; empty: from zeros
    seen       blocks that somebody has computed, with a snapshot behind them or without
    """

    num_blocks: int
    tables: "tuple[array[int], ...]"
    snapshot: bytes = b""
    seen: int = 0


class BlockPool(Places):
    """`num_blocks` blocks of `block_size` tokens, for all `groups` of layers together.

    `states` has the slots of recurrent states. `key` and `namespace` are the BlockHasher's.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        groups: CacheGroups | None = None,
        enable_prefix_caching: bool = True,
        key: bytes,
        namespace: bytes = b"",
    ) -> None:
        groups = CacheGroups() if groups is None else groups
        if num_blocks < len(groups.blocks) or block_size < 1:
            raise ConfigError(
                f"num_blocks = {num_blocks} and block_size = {block_size} must be at least "
                f"{len(groups.blocks)} (one for each group of layers) and 1"
            )
        super().__init__(num_blocks, len(groups.blocks))
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.groups = groups
        self.enable_prefix_caching = enable_prefix_caching
        self.hasher = BlockHasher(key, namespace, block_size)
        self.states = None if groups.states is None else StatePool(groups.states, block_size)
        self._windowed = [(g, spec) for g, spec in enumerate(groups.blocks) if spec.window]
        self._full = [g for g, spec in enumerate(groups.blocks) if spec.window is None]
        self._claims: dict[bytes, Request] = {}

    @property
    def idle(self) -> bool:
        """Nothing is held by anyone."""
        return not self.num_used and (self.states is None or not self.states.num_used)

    def blocks_for(self, num_tokens: int) -> int:
        """Entries of a block table of `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def most_blocks(self, num_tokens: int, chunk: int) -> int:
        """Most blocks that such a sequence, computed by at most `chunk` a step, ever holds."""
        return self.groups.most_blocks(num_tokens, chunk, self.block_size)

    def fits(self, num_tokens: int, chunk: int, *, held: int = 0, free: int | None = None) -> bool:
        """Whether `held` blocks plus `free` others (None: an empty pool's) hold `num_tokens`.

        The one rule behind refusal, admission and allocation.
        """
        needed = self.most_blocks(num_tokens, chunk) - held
        return needed <= (self.num_blocks if free is None else free)

    def match(self, request: Request) -> Hit:
        """The request's longest cached prefix; takes nothing of it.

        At most (num_tokens - 1) // block_size blocks, so that the last token is always computed and
        no shared block is ever written. A request that wants prompt log-probabilities needs every
        position computed and matches nothing.
        """
        limit = self._readable_blocks(request)
        hashes = self._hash_blocks(request, limit)
        for group in self._full:
            cached = self._cached[group]
            limit = next((i for i in range(limit) if hashes[i] not in cached), limit)
        seen = limit if self._full else 0
        if self._windowed or self.states is not None:
            limit = self._resumable(hashes, limit)
        tables = []
        for cached, spec in zip(self._cached, self.groups.blocks, strict=True):
            first = spec.first_block(limit * self.block_size, self.block_size)
            found = [cached[digest] for digest in islice(hashes, first, limit)]
            tables.append(array("i", [NO_BLOCK] * first + found))
        snapshot = hashes[limit - 1] if self.states is not None and limit else b""
        return Hit(limit, tuple(tables), snapshot, seen)

    def _resumable(self, hashes: Sequence[bytes], limit: int) -> int:
        """The last of `limit` boundaries with all windows cached, and a snapshot of states."""
        size = self.block_size
        best = 0
        windows = [(self._cached[g], spec) for g, spec in self._windowed]
        runs = [0] * len(windows)  # neighbouring cached blocks up to here, of each window's group
        for count, digest in enumerate(islice(hashes, limit), 1):
            good = self.states is None or self.states.snapshot(digest) is not None
            for w, (cached, spec) in enumerate(windows):
                runs[w] = runs[w] + 1 if digest in cached else 0
                good = good and runs[w] >= count - spec.first_block(count * size, size)
            if good:
                best = count
        return best

    def claimant(self, request: Request) -> Request | None:
        """The running request that is about to compute what this waiting request could use next.

        Looks only at blocks beyond those found the last time, so that a wait costs O(1) a step;
        where there are only windows, or states, at all of its blocks. With states the running one
        is asked to stop where both part.
        """
        limit = self._readable_blocks(request)
        if not (limit and self._claims):
            return None
        hashes = self._hash_blocks(request, limit)
        if self.states is not None:
            return self._ahead(request, self.states) if self.states.num_free else None
        if not self._full:
            claimed = (self._claims.get(digest) for digest in islice(hashes, limit))
            return next((owner for owner in claimed if owner is not None), None)
        cached = self._cached[self._full[0]]
        while request.num_awaited_blocks < limit and hashes[request.num_awaited_blocks] in cached:
            request.num_awaited_blocks += 1
        if request.num_awaited_blocks == limit:
            return None
        return self._claims.get(hashes[request.num_awaited_blocks])

    def _ahead(self, request: Request, states: StatePool) -> Request | None:
        """Who goes along with this request for longest, if a snapshot where they part saves enough,
        and can still be had."""
        hashes = request.block_hashes
        for shared in range(self._readable_blocks(request), 0, -1):
            owner = self._claims.get(hashes[shared - 1])
            if owner is None:
                continue
            saved = shared - self.match(request).num_blocks
            end = shared * self.block_size
            assert owner.states is not None, "only running requests claim"
            if saved < states.spec.apart or end < owner.num_computed_tokens:
                return None
            if end > owner.num_computed_tokens:
                end = states.want(owner.states, end)
            taken = owner.states.save is not None and end == owner.num_computed_tokens
            return owner if taken or end > owner.num_computed_tokens else None
        return None

    def open(self, request: Request, hit: Hit, chunk: int, *, reserved: int = 0) -> bool:
        """Start the request's tables with `hit`, if all its tokens fit, or else change nothing.

        `reserved` blocks of those that are free are promised to others. Claims the blocks it is
        going to compute.
        """
        held = [block for table in hit.tables for block in table if block != NO_BLOCK]
        free = self.num_free - sum(not self._refs[block] for block in held) - reserved
        if not self.fits(request.num_tokens, chunk, held=len(held), free=free):
            return False
        lineages = self.lineages(held)
        if self.states is not None:
            request.states = self._open_states(request, hit, self.states)
            if request.states is None:
                return False
            if request.states.restore is not None:
                lineages |= self.states.lineages((request.states.restore,))
        self._share(held)
        request.tables = hit.tables
        request.num_passed = [table.count(NO_BLOCK) for table in hit.tables]
        request.num_published_blocks = hit.num_blocks
        request.lineage = Lineage(request.id, frozenset(lineages))
        if self.enable_prefix_caching:
            self._claim(request, hit.num_blocks)
        return True

    def _open_states(self, request: Request, hit: Hit, states: StatePool) -> OwnedStates | None:
        """Slots, and where snapshots are wanted: where the next turn of the chat will start (or the
        same prompt again), and where others went on with other tokens."""
        size = self.block_size
        start = hit.num_blocks * size
        prompt = len(request.prompt_ids)
        given = request.asked.generation_start
        turn = min(prompt - 1, prompt if given is None else given) // size * size
        behind = self._hash_blocks(request, turn // size)[turn // size - 1] if turn else b""
        owned = states.open(hit.snapshot, start, prompt, turn, behind)
        if owned is not None:
            states.want(owned, hit.seen * size)
        return owned

    def _claim(self, request: Request, first: int) -> None:
        """Tell others what will be found soon, or, with states, could be."""
        known = request.num_tokens // self.block_size
        hashes = self._hash_blocks(request, known)
        for i in range(first, known):
            self._claims.setdefault(hashes[i], request)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Grow the request's tables to `num_tokens` tokens, evicting, or else change nothing."""
        tables = request.tables
        if not tables or num_tokens <= len(tables[0]) * self.block_size:
            return True
        missing = self.blocks_for(num_tokens) - len(tables[0])
        if missing * len(tables) > self.num_free:
            return False
        request.tables = tuple(
            table + array("i", [self._take() for _ in range(missing)]) for table in tables
        )
        return True

    def leave(self, request: Request) -> None:
        """Give back the blocks that lie before the windows of all tokens still to be computed."""
        for g, spec in self._windowed:
            first = spec.first_block(request.num_computed_tokens, self.block_size)
            passed = request.num_passed[g]
            if first > passed:
                tables = list(request.tables)
                self._release(tables[g][passed:first])
                tables[g] = array("i", [NO_BLOCK]) * first + tables[g][first:]
                request.tables = tuple(tables)
                request.num_passed[g] = first

    def trim(self, request: Request, num_tokens: int) -> None:
        """Shrink the request's tables to `num_tokens` tokens: a failed step wrote nothing."""
        keep = self.blocks_for(num_tokens)
        self._release_tables(tuple(table[keep:] for table in request.tables))
        request.tables = tuple(table[:keep] for table in request.tables)

    def free(self, request: Request) -> None:
        """Give back all that the request holds; what has a hash stays findable until evicted."""
        self._drop_claims(request)
        self._release_tables(request.tables)
        request.tables = ()
        request.num_passed = []
        request.num_published_blocks = 0
        request.num_awaited_blocks = 0
        request.publishes = True
        request.lineage = None
        if self.states is not None and request.states is not None:
            self.states.free(request.states)
            request.states = None

    def publish(self, request: Request, num_tokens: int) -> None:
        """Make the full ones of `num_tokens` computed tokens' blocks, and the snapshot, findable.

        Where a hash is taken already, the request keeps its own block private.
        """
        if self.states is not None and request.states is not None:
            self.states.settle(request.states, request.lineage if request.publishes else None)
        end = num_tokens // self.block_size
        first = request.num_published_blocks
        if end <= first or not (self.enable_prefix_caching and request.publishes):
            return
        hashes = self._hash_blocks(request, end)
        assert request.lineage is not None, "what is published was computed by somebody"
        for i in range(first, end):
            digest = hashes[i]
            if self._claims.get(digest) is request:
                del self._claims[digest]
            for group, table in enumerate(request.tables):
                self._enter(group, digest, table[i], request.lineage)
        request.num_published_blocks = end

    def withdraw(self, request: Request, running: Iterable[Request]) -> None:
        """Take from the cache what the request published and what derives from it.

        Of the `running` requests, those that have read such blocks go on but publish no more.
        """
        running = list(running)
        known = {other.lineage for other in running if other.lineage is not None}
        known |= self.lineages(range(self.num_places))
        if self.states is not None:
            known |= self.states.lineages(range(self.states.num_places))
        doomed = tainted(known, request.id)
        self._withdraw(doomed)
        if self.states is not None:
            self.states._withdraw(doomed)
        for other in running:
            if other.lineage in doomed:
                self._drop_claims(other)
                other.publishes = False

    def state_slots(self, request: Request, end: int) -> StateSlots | None:
        """Where the request's chunk up to `end` finds and leaves its state, if it has one."""
        if self.states is None:
            return None
        assert request.states is not None, "a running request has slots"
        kind = None
        digest = b""
        if self.enable_prefix_caching and request.publishes:
            kind = self.states.kind(request.states, end)
        if kind is not None:
            count = end // self.block_size
            digest = self._hash_blocks(request, count)[count - 1]
        return self.states.place(request.states, kind, digest)

    def _forget(self, place: int) -> None:
        entry = self._entries[place]
        super()._forget(place)
        if self.states is not None and entry is not None:
            self.states.drop(entry.hash)  # nobody can resume behind a block that is gone

    def _readable_blocks(self, request: Request) -> int:
        if not self.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return 0
        return (request.num_tokens - 1) // self.block_size

    def _hash_blocks(self, request: Request, count: int) -> list[bytes]:
        """The request's hashes, the first `count` at least, each computed once, or by the front."""
        hashes = request.block_hashes
        given = request.asked.prompt_hashes
        if not hashes and given is not None and given.key_id == self.hasher.key_id:
            hashes.extend(given.hashes)
        missing = count - len(hashes)
        if missing > 0:
            start = len(hashes) * self.block_size
            self.hasher.extend(
                hashes, request.asked.salt, request.tokens(start, start + missing * self.block_size)
            )
        return hashes

    def _release_tables(self, tables: "Sequence[array[int]]") -> None:
        """The last blocks first, of all groups alike: a prefix is then evicted from its end."""
        for blocks in zip(*map(reversed, tables), strict=True):
            self._release(blocks)

    def _drop_claims(self, request: Request) -> None:
        for digest in islice(request.block_hashes, request.num_published_blocks, None):
            if self._claims.get(digest) is request:
                del self._claims[digest]
