"""Numbered places of equal size, whatever lies in them: who owns them, what can be found again.

A place is in exactly one of three states: *free*, *owned* (by one or several), or
*cached-evictable* (nobody owns it, but its content can be found by its hash). Blocks of keys and
values are such places (blocks.py), and so are the slots of recurrent states (states.py).
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from moebius.schedule.groups import NO_BLOCK, Lineage


class Entry(NamedTuple):
    """What a cached place is known by: its group, its hash, and what its content derives from."""

    group: int
    hash: bytes
    lineage: Lineage


class Places:
    """`num_places` places; what is cached is found by its group (one of `num_groups`) and hash."""

    def __init__(self, num_places: int, num_groups: int) -> None:
        self.num_places = num_places
        self._refs = [0] * num_places
        self._free = list(range(num_places - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._entries: list[Entry | None] = [None] * num_places
        self._cached: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        self.cached: tuple[Mapping[bytes, int], ...] = tuple(map(MappingProxyType, self._cached))
        """A group's hash -> place, owned or not, of all that can be found; read-only."""

    @property
    def num_free(self) -> int:
        """Places that can be had now: free ones and those whose cached content may be given up."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_places - self.num_free

    @property
    def num_cached(self) -> int:
        """Places without a user whose content can be found."""
        return len(self._evictable)

    def _take(self) -> int:
        if self._free:
            place = self._free.pop()
        else:
            place, _ = self._evictable.popitem(last=False)
            self._forget(place)
        self._refs[place] = 1
        return place

    def _share(self, places: Iterable[int]) -> None:
        """One more owner for each of these, which can all be found."""
        for place in places:
            if not self._refs[place]:
                del self._evictable[place]
            self._refs[place] += 1

    def _release(self, places: Iterable[int]) -> None:
        """Drop one owner of each, the first given up first: it will be evicted first."""
        for place in places:
            if place == NO_BLOCK:
                continue
            self._refs[place] -= 1
            if not self._refs[place]:
                if self._entries[place] is None:
                    self._free.append(place)
                else:
                    self._evictable[place] = None

    def _enter(self, group: int, digest: bytes, place: int, lineage: Lineage) -> None:
        """Let an owned place be found, unless its hash is taken: then it stays private."""
        if digest not in self._cached[group]:
            self._cached[group][digest] = place
            self._entries[place] = Entry(group, digest, lineage)

    def _forget(self, place: int) -> None:
        entry = self._entries[place]
        assert entry is not None
        del self._cached[entry.group][entry.hash]
        self._entries[place] = None

    def lineages(self, places: Iterable[int]) -> set[Lineage]:
        """What these cached places derive from."""
        entries = self._entries
        return {entry.lineage for place in places if (entry := entries[place]) is not None}

    def _withdraw(self, lineages: set[Lineage]) -> None:
        """Take all that derives from these out of the cache."""
        for place, entry in enumerate(self._entries):
            if entry is not None and entry.lineage in lineages:
                self._discard(place)

    def _discard(self, place: int) -> None:
        """Let a cached place not be found any more; it is free once nobody owns it."""
        self._forget(place)
        if place in self._evictable:
            del self._evictable[place]
            self._free.append(place)
