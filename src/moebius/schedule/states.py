"""Slots of recurrent states, without the tensors: a running sequence's own, and snapshots.

A state cannot be undone token by token. So copies of it are kept at some block boundaries, each
under the hash of the tokens before it: *snapshots*. A prefix hit, or a preempted sequence, starts
again from the longest. Where they are taken, and which goes first: docs/prefix-cache.md.

lasting   where the next turn of a chat will begin, and where prompts part: least recently used
passing   every so many tokens of a prompt: the first to go, until somebody has started from it
rolling   the last full block of an answer, so far: the next takes its place
"""

from dataclasses import dataclass
from typing import Literal

from moebius.schedule.groups import Lineage, StateSlots, StateSpec
from moebius.schedule.places import Places

Kind = Literal["lasting", "passing", "rolling"]


@dataclass(slots=True)
class OwnedStates:
    """What one running sequence holds of the slots, for its next chunk or the one under way.

    prompt     tokens of its prompt
    wanted     positions at which a snapshot is lasting
    rolling    the hash of its rolling snapshot
    restore and save are as in StateSlots; held so long as the step that copies them is under way.
    """

    slot: int
    scratch: tuple[int, ...]
    prompt: int
    wanted: set[int]
    restore: int | None = None
    save: int | None = None
    digest: bytes = b""
    kind: Kind | None = None
    rolling: bytes = b""


class StatePool(Places):
    """`spec.num_slots` slots: of running sequences, and of snapshots at ends of blocks."""

    def __init__(self, spec: StateSpec, block_size: int) -> None:
        super().__init__(spec.num_slots, 1)
        self.spec = spec
        self._block_size = block_size

    def snapshot(self, digest: bytes) -> int | None:
        """The slot of the state behind the tokens of this hash."""
        return self._cached[0].get(digest)

    def open(
        self, snapshot: int | None, position: int = 0, prompt: int = 0, turn: int = 0
    ) -> OwnedStates | None:
        """Slots for a sequence that starts at `position` from `snapshot`, or from zeros; None if
        there are too few. The next turn of its chat will start at `turn`."""
        if snapshot is not None:
            self._share((snapshot,))  # nobody may take it before it was copied
        if self.num_free < self.spec.slots_per_sequence:
            self._release(() if snapshot is None else (snapshot,))
            return None
        slot = self._take()
        scratch = tuple(self._take() for _ in range(self.spec.scratch))
        owned = OwnedStates(slot, scratch, prompt, {position, turn}, restore=snapshot)
        entry = None if snapshot is None else self._entries[snapshot]
        if entry is not None and position >= prompt:  # it was preempted: this is its own
            owned.rolling = entry.hash
        return owned

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
            return "lasting"
        if position >= owned.prompt:
            return "rolling"
        return None if position % (self.spec.interval * self._block_size) else "passing"

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
        if entered and owned.kind == "passing":
            self._evictable.move_to_end(slot, last=False)
        elif entered and owned.kind == "rolling":
            self.drop(owned.rolling)
            owned.rolling = owned.digest

    def drop(self, digest: bytes) -> None:
        """Forget the snapshot of this hash, if there is one: it is of no more use."""
        slot = self._cached[0].get(digest)
        if slot is not None:
            self._discard(slot)

    def free(self, owned: OwnedStates) -> None:
        self.settle(owned, None)
        self._release((owned.slot, *owned.scratch))
