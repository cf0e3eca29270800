"""Slots of recurrent states, without the tensors: a running sequence's own, and snapshots.

A state cannot be undone token by token. So copies of it are kept at some block boundaries, each
under the hash of the tokens before it: *snapshots*. A prefix hit, or a preempted sequence, starts
again from the longest. A snapshot is never written again; it is evicted like a block, when a slot
is wanted and none is free.
"""

from dataclasses import dataclass

from moebius.schedule.groups import Lineage, StateSlots, StateSpec
from moebius.schedule.places import Places


@dataclass(slots=True)
class OwnedStates:
    """What one running sequence holds of the slots, for its next chunk or the one under way.

    restore and save are as in StateSlots; held so long as the step that copies them is under way.
    """

    slot: int
    scratch: tuple[int, ...]
    restore: int | None = None
    save: int | None = None
    digest: bytes = b""


class StatePool(Places):
    """`spec.num_slots` slots: of running sequences, and of snapshots."""

    def __init__(self, spec: StateSpec) -> None:
        super().__init__(spec.num_slots, 1)
        self.spec = spec

    def snapshot(self, digest: bytes) -> int | None:
        """The slot of the state behind the tokens of this hash."""
        return self._cached[0].get(digest)

    def open(self, snapshot: int | None) -> OwnedStates | None:
        """Slots for a sequence that starts from `snapshot`, or zeros; None if there are too few."""
        if snapshot is not None:
            self._share((snapshot,))  # nobody may take it before it was copied
        if self.num_free < self.spec.slots_per_sequence:
            self._release(() if snapshot is None else (snapshot,))
            return None
        slot = self._take()
        scratch = tuple(self._take() for _ in range(self.spec.scratch))
        return OwnedStates(slot, scratch, restore=snapshot)

    def place(self, owned: OwnedStates, digest: bytes | None) -> StateSlots:
        """The slots of the next chunk; with a `digest`, one for a snapshot, if it is to be had."""
        if digest is not None and digest not in self._cached[0] and self.num_free:
            owned.save = self._take()
            owned.digest = digest
        return StateSlots(owned.slot, owned.scratch, owned.restore, owned.save)

    def settle(self, owned: OwnedStates, lineage: Lineage | None) -> None:
        """The chunk's step is over: its snapshot can be found, or is given up without `lineage`."""
        if owned.restore is not None:
            self._release((owned.restore,))
            owned.restore = None
        if owned.save is not None:
            if lineage is not None:
                self._enter(0, owned.digest, owned.save, lineage)
            self._release((owned.save,))
            owned.save = None

    def free(self, owned: OwnedStates) -> None:
        self.settle(owned, None)
        self._release((owned.slot, *owned.scratch))
