"""Bugs of snapshots: where they are taken, what they are found by, which goes first, who waits for
one, and how windows and states go together."""

from __future__ import annotations

from dataclasses import replace

from moebius.schedule.blocks import BlockPool
from moebius.schedule.groups import GroupSpec
from moebius.schedule.scheduler import Scheduler
from moebius.schedule.states import StatePool
from schedule.seeding import BUGS, bug, bug_of_states

__all__ = ["BUGS"]

# ----------------------------------------------------------------------------------------------------- where they are taken


@bug("the start of the generation prompt is not looked at", "all kinds")
class _(BlockPool):
    def _open_states(self, request, hit, states):
        asked = request.asked
        request.asked = replace(asked, generation_start=None)
        owned = super()._open_states(request, hit, states)
        request.asked = asked
        return owned


@bug("the next turn is to start at the end of the block, not at its beginning", "all kinds")
class _(BlockPool):
    def _open_states(self, request, hit, states):
        owned = super()._open_states(request, hit, states)
        if owned is not None:
            owned.turn += self.block_size
            owned.wanted = {owned.turn}
        return owned


@bug("the next turn is to start behind a prompt's last token", "all kinds")
class _(BlockPool):
    def _open_states(self, request, hit, states):
        owned = super()._open_states(request, hit, states)
        if owned is not None and request.asked.generation_start is None:
            owned.turn = len(request.prompt_ids) // self.block_size * self.block_size
            owned.wanted = {owned.turn}
        return owned


@bug("where the next turn starts is forgotten once a hit is found", "all kinds")
class _(BlockPool):
    def _open_states(self, request, hit, states):
        owned = super()._open_states(request, hit, states)
        if owned is not None and hit.num_blocks:
            owned.wanted = {hit.num_blocks * self.block_size}
        return owned


@bug("a snapshot is taken inside a block", "all kinds")
class _(BlockPool):
    def _open_states(self, request, hit, states):
        owned = super()._open_states(request, hit, states)
        if owned is not None:
            owned.turn += 1
            owned.wanted = {owned.turn}
        return owned

    def state_slots(self, request, end):
        if request.states is None or end not in request.states.wanted:
            return super().state_slots(request, end)
        digest = self._hash_blocks(request, end // self.block_size)
        return self.states.place(request.states, "turn", digest[-1] if digest else b"")


@bug("no chunk ends for a snapshot", "all kinds")
class _(Scheduler):
    def _to_boundary(self, request, num_tokens):
        return num_tokens


@bug("chunks of running requests pass over snapshots", "all kinds")
class _(Scheduler):
    def _serve_running(self, step):
        self._to_boundary = lambda _, num_tokens: num_tokens
        super()._serve_running(step)
        del self._to_boundary


@bug_of_states("regular snapshots are counted from where the sequence starts")
class _(StatePool):
    def next_boundary(self, owned, position, known):
        start = min(at for at in owned.wanted | {position} if at <= position)
        shifted = replace(owned, wanted={at - start for at in owned.wanted})
        return start + super().next_boundary(shifted, position - start, known - start)


@bug_of_states("a chunk that begins at a snapshot ends there")
class _(StatePool):
    def next_boundary(self, owned, position, known):
        return super().next_boundary(owned, max(position - 1, 0), known)


@bug_of_states("the regular distance is one block too long")
class _(StatePool):
    def next_boundary(self, owned, position, known):
        spec, self.spec = self.spec, replace(self.spec, interval=self.spec.interval + 1)
        end = super().next_boundary(owned, position, known)
        self.spec = spec
        return end


@bug_of_states("a snapshot is taken behind every block")
class _(StatePool):
    def kind(self, owned, position):
        return super().kind(owned, position) or (None if position % self._block_size else "passing")


@bug_of_states("an answer has no snapshots")
class _(StatePool):
    def kind(self, owned, position):
        kind = super().kind(owned, position)
        return None if kind == "rolling" else kind


@bug_of_states("several tokens of an answer pass over the last full block")
class _(StatePool):
    def next_boundary(self, owned, position, known):
        return super().next_boundary(owned, position, min(known, owned.prompt - 1))


@bug("snapshots are taken although prefix caching is off", "all kinds")
class _(BlockPool):
    def state_slots(self, request, end):
        caching, self.enable_prefix_caching = self.enable_prefix_caching, True
        slots = super().state_slots(request, end)
        self.enable_prefix_caching = caching
        return slots


@bug("a request that read what was withdrawn goes on taking snapshots", "all kinds")
class _(BlockPool):
    def state_slots(self, request, end):
        publishes, request.publishes = request.publishes, True
        slots = super().state_slots(request, end)
        request.publishes = publishes
        return slots

    def publish(self, request, num_tokens):
        if self.states is not None and request.states is not None:
            self.states.settle(request.states, request.lineage)
        super().publish(request, num_tokens)


# ----------------------------------------------------------------------------------------------------- what they are found by


@bug("a snapshot is found by the hash of the block before", "all kinds")
class _(BlockPool):
    def state_slots(self, request, end):
        if request.states is None or end < 2 * self.block_size:
            return super().state_slots(request, end)
        kind = None
        if self.enable_prefix_caching and request.publishes:
            kind = self.states.kind(request.states, end)
        digest = self._hash_blocks(request, end // self.block_size)[end // self.block_size - 2]
        return self.states.place(request.states, kind, digest)


@bug("a snapshot is found by the sequence's last hash", "all kinds")
class _(BlockPool):
    def state_slots(self, request, end):
        slots = super().state_slots(request, end)
        if slots is not None and slots.save is not None:
            known = self._hash_blocks(request, request.num_tokens // self.block_size)
            request.states.digest = known[-1]
        return slots


@bug("a hit is the shortest that there is", "all kinds")
class _(BlockPool):
    def _resumable(self, hashes, limit):
        best = super()._resumable(hashes, limit)
        if self.states is None:
            return best
        shorter = (super(type(self), self)._resumable(hashes, count) for count in range(best))
        return next((count for count in shorter if count), best)


@bug("a hit looks at the first window only", "two windows")
class _(BlockPool):
    def _resumable(self, hashes, limit):
        windowed, self._windowed = self._windowed, self._windowed[:1]
        best = super()._resumable(hashes, limit)
        self._windowed = windowed
        return best


@bug("a hit with a snapshot looks at no window", "all kinds")
class _(BlockPool):
    def _resumable(self, hashes, limit):
        if self.states is None:
            return super()._resumable(hashes, limit)
        windowed, self._windowed = self._windowed, []
        best = super()._resumable(hashes, limit)
        self._windowed = windowed
        return best


@bug("what one window has passed is given back in all of them", "two windows")
class _(BlockPool):
    def leave(self, request):
        windowed = self._windowed
        if len({spec.window for _, spec in windowed}) > 1:
            least = min((spec for _, spec in windowed), key=lambda spec: spec.window)
            self._windowed = [(g, least) for g, _ in windowed]
        super().leave(request)
        self._windowed = windowed


@bug("of several windows only the first gives blocks back", "Gemma 4")
class _(BlockPool):
    def leave(self, request):
        windowed, self._windowed = self._windowed, self._windowed[:1]
        super().leave(request)
        self._windowed = windowed


@bug("a window is one token too short", "gpt-oss")
class _(BlockPool):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._windowed = [(g, GroupSpec(max(1, spec.window - 1))) for g, spec in self._windowed]


# ----------------------------------------------------------------------------------------------------- which goes, and when


@bug_of_states("all snapshots of an answer are kept")
class _(StatePool):
    def settle(self, owned, lineage):
        owned.rolling = b""
        super().settle(owned, lineage)


@bug_of_states("the new snapshot of an answer is dropped, and not the old one")
class _(StatePool):
    def settle(self, owned, lineage):
        if owned.save is not None and owned.kind == "rolling" and owned.rolling:
            owned.rolling = owned.digest
        super().settle(owned, lineage)


@bug_of_states("an answer takes the place of its prompt's snapshot")
class _(StatePool):
    def settle(self, owned, lineage):
        kind, digest = owned.kind, owned.digest
        saved = owned.save is not None and lineage is not None
        super().settle(owned, lineage)
        if saved and kind == "turn":
            owned.rolling = digest


@bug_of_states("an answer's last snapshot goes with its sequence")
class _(StatePool):
    def free(self, owned):
        self.drop(owned.rolling)
        super().free(owned)


@bug_of_states("the old snapshot of an answer is written over while it can be found")
class _(StatePool):
    def place(self, owned, kind, digest):
        old = self.snapshot(owned.rolling)
        slots = super().place(owned, kind, digest)
        if old is None or slots.save is None or kind != "rolling" or self._refs[old]:
            return slots
        self._release((slots.save,))
        self._share((old,))
        owned.save = old
        return slots._replace(save=old)


@bug_of_states("a snapshot that somebody starts from is free once it is replaced")
class _(StatePool):
    def _discard(self, place):
        self._forget(place)
        self._evictable.pop(place, None)
        self._free.append(place)


@bug("snapshots outlive the blocks before them", "all kinds")
class _(BlockPool):
    def _forget(self, place):
        states, self.states = self.states, None
        super()._forget(place)
        self.states = states


@bug_of_states("regular snapshots are kept as long as all others")
class _(StatePool):
    def settle(self, owned, lineage):
        if owned.kind == "passing":
            owned.kind = "parting"
        super().settle(owned, lineage)


@bug_of_states("the snapshots that were used last go first")
class _(StatePool):
    def _take(self):
        if not self._free:
            self._evictable.move_to_end(next(reversed(self._evictable)), last=False)
        return super()._take()


@bug_of_states("to start from a snapshot does not count as its use")
class _(StatePool):
    def settle(self, owned, lineage):
        restored = owned.restore
        super().settle(owned, lineage)
        if restored in self._evictable:
            self._evictable.move_to_end(restored, last=False)


@bug_of_states("a snapshot goes although a slot is free")
class _(StatePool):
    def _take(self):
        if self._evictable:
            self._free.append(self._evictable.popitem(last=False)[0])
            self._forget(self._free[-1])
        return super()._take()


@bug_of_states("a sequence starts with one slot, whatever it needs")
class _(StatePool):
    def open(self, start=b"", position=0, prompt=0, turn=0, behind=b""):
        spec, self.spec = self.spec, replace(self.spec, scratch=0)
        owned = super().open(start, position, prompt, turn, behind)
        self.spec = spec
        return owned


@bug_of_states("a snapshot is given back twice by who starts from it")
class _(StatePool):
    def settle(self, owned, lineage):
        if owned.restore is not None and self._refs[owned.restore] > 1:
            self._release((owned.restore,))
        super().settle(owned, lineage)


# ----------------------------------------------------------------------------------------------------- who waits for one


@bug("a request waits for a snapshot that was passed", "all kinds")
class _(BlockPool):
    def _ahead(self, request, states):
        found = super()._ahead(request, states)
        hashes = request.block_hashes[: self._readable_blocks(request)]
        owners = (self._claims.get(digest) for digest in reversed(hashes))
        return found or next((owner for owner in owners if owner is not None), None)


@bug("a request waits for one with other tokens", "all kinds")
class _(BlockPool):
    def _ahead(self, request, states):
        return super()._ahead(request, states) or next(iter(self._claims.values()), None)


@bug_of_states("a snapshot is asked for inside of a block")
class _(StatePool):
    def want(self, owned, position):
        end = super().want(owned, position)
        owned.wanted.add(end - 1)
        return end


@bug("who is waited for is not asked to stop there", "all kinds")
class _(BlockPool):
    def _ahead(self, request, states):
        want, states.want = states.want, lambda owned, position: position
        owner = super()._ahead(request, states)
        states.want = want
        return owner


# ----------------------------------------------------------------------------------------------------- what a chat has gone beyond


@bug_of_states("what a chat has gone beyond is kept as long as all others")
class _(StatePool):
    def _entered(self, owned, digest):
        if owned.kind != "turn":
            super()._entered(owned, digest)


@bug_of_states("what several sequences went on from goes with the first of them")
class _(StatePool):
    def _entered(self, owned, digest):
        self._followed.discard(owned.start)
        super()._entered(owned, digest)


@bug_of_states("of two snapshots of an answer only the one that was used goes first")
class _(StatePool):
    def _entered(self, owned, digest):
        self._twins.clear()
        super()._entered(owned, digest)


@bug_of_states("a sequence's new snapshot goes first, and not what it has gone beyond")
class _(StatePool):
    def _entered(self, owned, digest):
        super()._entered(owned, digest)
        if owned.kind == "turn":
            self._goes_first(digest)


@bug_of_states("where sequences part goes first once the next has gone on")
class _(StatePool):
    def _entered(self, owned, digest):
        if owned.kind != "parting":
            super()._entered(owned, digest)
