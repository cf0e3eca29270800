"""What a model's cache is made of, and how its memory is divided between blocks and states."""

from dataclasses import dataclass

from moebius.schedule.groups import StateSpec

# Of a sequence that runs, or is over: before its generation prompt, and behind its answer. Its
# chat's next turn starts from one of the two.
SNAPSHOTS_A_SEQUENCE = 2
# A step that ends early for a snapshot costs about what so many tokens do.
WORTH_TOKENS = 256


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """What a model's cache is made of, in bytes.

    windows   of each block table that a sequence has; None: the whole past
    block     one block of one table
    state     one slot for recurrent states; `scratch` more of them a sequence
    """

    windows: tuple[int | None, ...]
    block: int
    state: int = 0
    scratch: int = 0

    @property
    def own_slots(self) -> int:
        """Those that a running sequence rewrites."""
        return 1 + self.scratch

    def useful_slots(self, sequences: int, *, caching: bool) -> int:
        """Slots for states that so many sequences can use at once, with their snapshots."""
        snapshots = SNAPSHOTS_A_SEQUENCE if caching else 0
        return sequences * (self.own_slots + snapshots) if self.state else 0

    def affordable_slots(self, budget: int, useful: int, needed: int) -> int:
        """Of `useful` slots those that are kept in a cache of `budget` bytes.

        Where there are blocks, half of it at most, and what `needed` bytes of blocks leave. A slot
        serves a sequence or a snapshot, whichever is asked for, so that with fewer of them fewer
        sequences run at once; but one always can.
        """
        if not self.state:
            return 0
        room = min(budget // 2, budget - needed) if self.block else budget
        return max(self.own_slots, min(useful, room // self.state))

    def snapshots(self, slots: int, sequences: int) -> tuple[int, int]:
        """How many sequences have the snapshots that they can use, and how many each has."""
        running = max(1, min(sequences, slots // (self.own_slots + SNAPSHOTS_A_SEQUENCE)))
        return running, slots // running - self.own_slots

    def state_spec(
        self, slots: int, sequences: int, block_size: int, *, chunk: int, length: int
    ) -> StateSpec:
        """Slots as the scheduler counts them, and where it takes snapshots.

        They are so far apart that they take no more than the blocks between them, that a prompt of
        `length` tokens fills half of the slots that are no running sequence's, and that a prompt's
        chunks of `chunk` tokens mostly end there anyway.
        """
        running, each = self.snapshots(slots, sequences)
        a_token = len(self.windows) * self.block
        weighed = -(-self.state * block_size // a_token) if a_token else 0
        tokens = max(weighed, -(-2 * length // max(1, running * each)))
        tokens = -(-tokens // chunk) * chunk
        interval = -(-tokens // block_size)
        return StateSpec(slots, self.scratch, interval, -(-WORTH_TOKENS // block_size))

    def snapshot_words(self, spec: StateSpec, sequences: int, block_size: int) -> str:
        """What the slots are for, in a plan's words."""
        running, each = self.snapshots(spec.num_slots, sequences)
        words = f"{running:,} sequence{'s' * (running > 1)}, {each} snapshots each"
        return f"{words}, and one every {spec.interval * block_size:,} tokens"
