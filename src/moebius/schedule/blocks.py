"""The KV cache's blocks, without the tensors: who owns them, who shares them, which may be reused.

A block is `block_size` consecutive token positions of the cache and is in exactly one of three
states: *free*, *owned* (one or more tables hold it), or *cached-evictable* (no table holds it, but
its content can be found by its prefix hash). "Block" as in the PagedAttention paper (arXiv
2309.06180).
"""

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

from moebius.errors import ConfigError
from moebius.schedule.hashes import BlockHasher
from moebius.schedule.request import Request


class _Entry(NamedTuple):
    """What a cached block is known by: its hash, that of the block before it (None: it is the
    first), and by whom."""

    hash: bytes
    parent: bytes | None
    publisher: str


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens; `key` and `namespace` are the BlockHasher's."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        key: bytes,
        namespace: bytes = b"",
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"num_blocks = {num_blocks} and block_size = {block_size} must both be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.hasher = BlockHasher(key, namespace, block_size)
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._entries: list[_Entry | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._claims: dict[bytes, Request] = {}
        self.cached: Mapping[bytes, int] = MappingProxyType(self._cached)
        """Prefix hash -> block, owned or not, of all that can be found; read-only."""

    @property
    def num_free(self) -> int:
        """Blocks that can be had now: free ones and those whose cached content may be given up."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits(self, num_tokens: int, *, held: int = 0, free: int | None = None) -> bool:
        """Whether `num_tokens` find place in `held` blocks plus `free` others (None: an empty
        pool's).

        The one rule behind refusal, admission and allocation.
        """
        return self.blocks_for(num_tokens) - held <= (self.num_blocks if free is None else free)

    def match(self, request: Request) -> list[int]:
        """The cached blocks of the request's longest cached prefix; takes none of them.

        At most (num_tokens - 1) // block_size, so that the last token is always computed and no
        shared block is ever written. A request that wants prompt log-probabilities needs every
        position computed and matches nothing.
        """
        blocks: list[int] = []
        limit = self._readable_blocks(request)
        for digest in islice(self._hash_blocks(request, limit), limit):
            block = self._cached.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def claimant(self, request: Request) -> Request | None:
        """The running request that is about to compute this waiting request's first block not in
        the cache.

        Looks only at blocks beyond those found the last time, so that a wait costs O(1) a step.
        """
        limit = self._readable_blocks(request)
        hashes = self._hash_blocks(request, limit)
        while (
            request.num_awaited_blocks < limit
            and hashes[request.num_awaited_blocks] in self._cached
        ):
            request.num_awaited_blocks += 1
        if request.num_awaited_blocks == limit:
            return None
        return self._claims.get(hashes[request.num_awaited_blocks])

    def open(self, request: Request, hit: Sequence[int], *, reserved: int = 0) -> bool:
        """Start the request's table with the blocks of `hit`, if all its tokens fit; else change
        nothing.

        `reserved` blocks of those that are free are promised to others. Claims the blocks it is
        going to compute.
        """
        idle = sum(not self._refs[block] for block in hit)
        if not self.fits(request.num_tokens, held=len(hit), free=self.num_free - idle - reserved):
            return False
        for block in hit:
            if not self._refs[block]:
                del self._evictable[block]
            self._refs[block] += 1
        request.block_ids = array("i", hit)
        request.num_published_blocks = len(hit)
        if self.enable_prefix_caching:
            known = request.num_tokens // self.block_size
            for digest in self._hash_blocks(request, known)[len(hit) : known]:
                self._claims.setdefault(digest, request)
        return True

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Grow the request's table to hold `num_tokens` tokens, evicting where needed; else change
        nothing."""
        held = len(request.block_ids)
        if num_tokens <= held * self.block_size:
            return True
        missing = self.blocks_for(num_tokens) - held
        if not self.fits(num_tokens, held=held, free=self.num_free):
            return False
        request.block_ids = request.block_ids + array("i", [self._take() for _ in range(missing)])
        return True

    def trim(self, request: Request, num_tokens: int) -> None:
        """Shrink the request's table to what `num_tokens` tokens need: a step that failed wrote
        nothing."""
        keep = self.blocks_for(num_tokens)
        self._release(request.block_ids[keep:])
        request.block_ids = request.block_ids[:keep]

    def free(self, request: Request) -> None:
        """Give the request's blocks back. Those with a hash stay findable until they are
        evicted."""
        self._drop_claims(request)
        self._release(request.block_ids)
        request.block_ids = array("i")
        request.num_published_blocks = 0
        request.num_awaited_blocks = 0
        request.publishes = True

    def publish(self, request: Request, num_tokens: int) -> None:
        """Make the full blocks among the request's first `num_tokens`, all computed, findable by
        their hash.

        Where a hash is taken already, the request keeps its own block private: no two blocks share
        a hash.
        """
        end = num_tokens // self.block_size
        first = request.num_published_blocks
        if end <= first or not (self.enable_prefix_caching and request.publishes):
            return
        hashes = self._hash_blocks(request, end)
        for i in range(first, end):
            digest = hashes[i]
            if self._claims.get(digest) is request:
                del self._claims[digest]
            if digest not in self._cached:
                block = request.block_ids[i]
                self._cached[digest] = block
                self._entries[block] = _Entry(digest, hashes[i - 1] if i else None, request.id)
        request.num_published_blocks = end

    def withdraw(self, request: Request, running: Iterable[Request]) -> None:
        """Take from the cache what the request published and what was chained on it: its numbers
        are not to be trusted.

        A cached block whose chain cannot be followed to its start goes too, because it may hang on
        a withdrawn one. Of the `running` requests, those that hold a withdrawn block keep what they
        have but publish no more.
        """
        children: defaultdict[bytes | None, list[_Entry]] = defaultdict(list)
        for block in self._cached.values():
            entry = self._entries[block]
            assert entry is not None
            children[entry.parent].append(entry)
        sound: set[bytes] = set()
        found = children[None]
        while found:
            entry = found.pop()
            if entry.publisher != request.id:
                sound.add(entry.hash)
                found.extend(children[entry.hash])
        doomed = {block for digest, block in self._cached.items() if digest not in sound}
        for block in doomed:
            self._forget(block)
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)
        for other in running:
            if not doomed.isdisjoint(other.block_ids):
                self._drop_claims(other)
                other.publishes = False

    def _readable_blocks(self, request: Request) -> int:
        if not self.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return 0
        return (request.num_tokens - 1) // self.block_size

    def _hash_blocks(self, request: Request, count: int) -> list[bytes]:
        """The request's hashes, at least the first `count`, each computed once."""
        hashes = request.block_hashes
        if not hashes:
            self._take_prompt_hashes(request)
        missing = count - len(hashes)
        if missing > 0:
            start = len(hashes) * self.block_size
            self.hasher.extend(
                hashes, request.salt, request.tokens(start, start + missing * self.block_size)
            )
        return hashes

    def _take_prompt_hashes(self, request: Request) -> None:
        """Start with the front's hashes, if they were made as this pool makes them."""
        given = request.prompt_hashes
        if given is not None and given.key_id == self.hasher.key_id:
            request.block_hashes.extend(given.hashes)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        self._refs[block] = 1
        return block

    def _release(self, blocks: Sequence[int]) -> None:
        """Drop one reference each, the last block first: of a chain, the tail is then evicted
        before the head."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                if self._entries[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def _forget(self, block: int) -> None:
        entry = self._entries[block]
        assert entry is not None
        del self._cached[entry.hash]
        self._entries[block] = None

    def _drop_claims(self, request: Request) -> None:
        for digest in islice(request.block_hashes, request.num_published_blocks, None):
            if self._claims.get(digest) is request:
                del self._claims[digest]
