"""Slots of recurrent states, without the tensors: a running sequence's own, and snapshots.

A state cannot be undone token by token. So copies of it are kept at some block boundaries, each
under the hash of the tokens before it: *snapshots*. A prefix hit, or a preempted sequence, starts
again from the longest. docs/prefix-cache.md says where they are taken, which goes first, and why.

turn      where the next turn of a chat will start, if its template drops the answer's beginning
rolling   the last full block of the answer so far; the next takes its place
parting   where several sequences part
passing   every so many tokens: the first to go, until somebody has started from it
"""

from dataclasses import dataclass
from typing import Literal

from moebius.schedule.groups import Lineage, StateSlots, StateSpec
from moebius.schedule.places import Places

Kind = Literal["turn", "rolling", "parting", "passing"]


@dataclass(slots=True)
class OwnedStates:
    """What one running sequence holds of the slots, for its next chunk or the one under way.

    prompt   tokens of its prompt
    turn     position of its snapshot of that kind
    wanted   positions of all snapshots but rolling and passing ones, and where it started
    start, behind, rolling   hashes of what is before its start, before `turn`, and of its answer
    restore and save are as in StateSlots; held so long as the step that copies them is under way.
    """

    slot: int
    scratch: tuple[int, ...]
    prompt: int
    turn: int
    wanted: set[int]
    start: bytes = b""
    behind: bytes = b""
    rolling: bytes = b""
    restore: int | None = None
    save: int | None = None
    digest: bytes = b""
    kind: Kind | None = None


class StatePool(Places):
    """`spec.num_slots` slots: of running sequences, and of snapshots at ends of blocks."""

    def __init__(self, spec: StateSpec, block_size: int) -> None:
        super().__init__(spec.num_slots, 1)
        self.spec = spec
        self._block_size = block_size
        self._followed: set[bytes] = set()  # a sequence went on from them, or several will
        self._twins: dict[bytes, bytes] = {}  # before and behind an answer: one of two is of use

    def snapshot(self, digest: bytes) -> int | None:
        """The slot of the state behind the tokens of this hash."""
        return self._cached[0].get(digest)

    def open(
        self,
        start: bytes = b"",
        position: int = 0,
        prompt: int = 0,
        turn: int = 0,
        behind: bytes = b"",
    ) -> OwnedStates | None:
        """Slots for a sequence that starts at `position` from the snapshot of this hash, or from
        zeros; None if there are too few. The rest is as in OwnedStates."""
        snapshot = self.snapshot(start)
        evictable = snapshot in self._evictable
        if self.num_free - evictable < self.spec.slots_per_sequence:
            return None
        if snapshot is not None:
            self._share((snapshot,))  # nobody may take it before it was copied
        slot = self._take()
        scratch = tuple(self._take() for _ in range(self.spec.scratch))
        wanted = {position, turn}
        return OwnedStates(slot, scratch, prompt, turn, wanted, start, behind, restore=snapshot)

    def want(self, owned: OwnedStates, position: int) -> int:
        """Ask a sequence for a snapshot at `position`, and get to know where there will be one: a
        little before, where one is wanted already."""
        near = max((at for at in owned.wanted if at <= position), default=0)
        if position - near < self.spec.apart * self._block_size:
            return near
        owned.wanted.add(position)
        return position

    def next_boundary(self, owned: OwnedStates, position: int, known: int) -> int:
        """Where the chunk that begins at `position` of `known` tokens has to end at the latest."""
        stride = self.spec.interval * self._block_size
        ends = [at for at in owned.wanted if at > position]
        ends.append((position // stride + 1) * stride)
        last = known // self._block_size * self._block_size
        if last > position and last >= owned.prompt:
            ends.append(last)
        return min(ends)

    def kind(self, owned: OwnedStates, position: int) -> Kind | None:
        """Which kind of snapshot is taken at `position`."""
        if position % self._block_size:
            return None
        if position in owned.wanted:
            return "turn" if position == owned.turn else "parting"
        if not position % (self.spec.interval * self._block_size):
            return "passing"
        return "rolling" if position >= owned.prompt else None

    def place(self, owned: OwnedStates, kind: Kind | None, digest: bytes) -> StateSlots:
        """The slots of the next chunk; with a `kind`, one for a snapshot, if it is to be had."""
        if kind is not None and digest not in self._cached[0]:
            if kind == "rolling" and not self._free:
                self.drop(owned.rolling)
            if self.num_free:
                owned.save = self._take()
                owned.digest = digest
                owned.kind = kind
        return StateSlots(owned.slot, owned.scratch, owned.restore, owned.save)

    def settle(self, owned: OwnedStates, lineage: Lineage | None) -> None:
        """The chunk's step is over: its snapshot can be found, or is given up without `lineage`."""
        if owned.restore is not None:
            self._release((owned.restore,))
            owned.restore = None
        if owned.save is None:
            return
        slot = owned.save
        owned.save = None
        if lineage is not None:
            self._enter(0, owned.digest, slot, lineage)
        entered = self._entries[slot] is not None
        self._release((slot,))
        if entered:
            self._entered(owned, owned.digest)

    def _entered(self, owned: OwnedStates, digest: bytes) -> None:
        """What the sequence's new snapshot makes of those that it has gone beyond."""
        if owned.kind == "passing":
            self._goes_first(digest)
        elif owned.kind == "parting":
            self._followed.add(digest)
        elif owned.kind == "rolling":
            self.drop(owned.rolling)
            owned.rolling = digest
            if owned.behind in self._cached[0]:
                self._twins.update({digest: owned.behind, owned.behind: digest})
        elif owned.start in self._cached[0] and owned.start not in self._followed:
            self._followed.add(owned.start)
            self._goes_first(owned.start)
            self._goes_first(self._twins.get(owned.start, b""))

    def _goes_first(self, digest: bytes) -> None:
        slot = self._cached[0].get(digest)
        if slot is not None and slot in self._evictable:
            self._evictable.move_to_end(slot, last=False)

    def _forget(self, place: int) -> None:
        entry = self._entries[place]
        super()._forget(place)
        assert entry is not None
        self._followed.discard(entry.hash)
        self._twins.pop(entry.hash, None)

    def drop(self, digest: bytes) -> None:
        """Forget the snapshot of this hash, if there is one: it is of no more use."""
        slot = self._cached[0].get(digest)
        if slot is not None:
            self._discard(slot)

    def free(self, owned: OwnedStates) -> None:
        self.settle(owned, None)
        self._release((owned.slot, *owned.scratch))
