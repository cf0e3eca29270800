"""What the scheduler knows of a model's layers: which of them keep the same of the past.

Layers that keep keys and values of the same tokens form a *group* and share one block table a
sequence. All groups take their blocks from one pool of equal blocks:

- It has one count of free blocks, one order of eviction and one rule of what fits, and no block can
  be in the wrong part of memory. The price is that where groups differ in their number of layers,
  the larger one is cut into several of as many layers as the smaller one (engine/kv_cache.py).
- A pool for each group would need no equal blocks, but its size would have to be guessed. Planned
  for 8,192 tokens, a model with five windowed layers of 512 tokens to each full one would leave two
  thirds of its memory idle under prompts of 1,024.

A recurrent *state* is nothing per token: a sequence has one of each state layer, all of them in
one slot. Slots are counted apart, because a state is as large as thousands of tokens are.
"""

from dataclasses import dataclass
from typing import NamedTuple

from moebius.errors import ConfigError

NO_BLOCK = -1
"""In a block table: a block that lies before the window, and was given back."""


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group of layers with a block table of its own.

    window   how many last tokens a row sees, itself included; None: all of them
    """

    window: int | None = None

    def first_block(self, position: int, block_size: int) -> int:
        """The first block of a table that rows from `position` on will read."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // block_size

    def most_blocks(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """Most blocks that a sequence of `num_tokens`, `chunk` of them a step, ever holds."""
        whole = -(-num_tokens // block_size)
        if self.window is None:
            return whole
        # A step reads and writes so many neighbouring tokens; they may begin at a block's last.
        tokens = self.window - 1 + chunk
        return min(whole, (tokens + block_size - 2) // block_size + 1)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Recurrent states: what a sequence has one of, and each of its tokens rewrites.

    num_slots   places for states: those of running sequences, and snapshots in all others
    scratch     places that a running sequence owns beside its state's own (for drafted tokens)
    interval    a snapshot is taken every so many blocks
    apart       blocks that a snapshot has to save to be worth that a step ends for it
    """

    num_slots: int
    scratch: int = 0
    interval: int = 64
    apart: int = 1

    @property
    def slots_per_sequence(self) -> int:
        return 1 + self.scratch


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """All that is kept of a sequence's past.

    blocks   the groups that have block tables
    states   where a state layer's past is; None: the model has no such layer
    """

    blocks: tuple[GroupSpec, ...] = (GroupSpec(),)
    states: StateSpec | None = None

    def __post_init__(self) -> None:
        if not self.blocks and self.states is None:
            raise ConfigError("a cache needs at least one group of layers, with blocks or states")
        for spec in self.blocks:
            if spec.window is not None and spec.window < 1:
                raise ConfigError(f"a window is {spec.window} tokens; it must be at least 1")
        states = self.states
        if states is not None:
            if states.scratch < 0 or min(states.interval, states.apart) < 1:
                raise ConfigError(
                    f"states have {states.scratch} scratch slots and a snapshot every "
                    f"{states.interval} blocks, {states.apart} apart; these must be at least 0, 1 "
                    "and 1"
                )
            if states.num_slots < states.slots_per_sequence:
                raise ConfigError(
                    f"{states.num_slots} slots for states are too few for one sequence, which "
                    f"needs {states.slots_per_sequence}"
                )

    @property
    def windowed(self) -> bool:
        return any(spec.window is not None for spec in self.blocks)

    def most_blocks(self, num_tokens: int, chunk: int, block_size: int) -> int:
        """Of all groups together: memory plan, refusal and admission all count with this."""
        return sum(spec.most_blocks(num_tokens, chunk, block_size) for spec in self.blocks)


class StateSlots(NamedTuple):
    """Where a chunk finds its sequence's state, and where it leaves it.

    slot      the state that the chunk's tokens rewrite. A chunk that starts at position 0 starts
              from a state of zeros
    scratch   the sequence's other slots
    restore   the snapshot to copy into `slot` before the step; None: the state is there already
    save      the slot to copy the state to after the step, as a snapshot; None: none is taken
    """

    slot: int
    scratch: tuple[int, ...] = ()
    restore: int | None = None
    save: int | None = None


class Lineage:
    """Who computed what lies in some blocks, and whose blocks it had read for that.

    Where a request's numbers went wrong, all that leads back to it is withdrawn from the cache.
    """

    __slots__ = ("parents", "publisher")

    def __init__(self, publisher: str, parents: frozenset["Lineage"] = frozenset()) -> None:
        self.publisher = publisher
        self.parents = parents


def tainted(lineages: set[Lineage], publisher: str) -> set[Lineage]:
    """Those of `lineages` that lead back to `publisher`. No recursion: chains are long."""
    verdicts: dict[Lineage, bool] = {}
    stack = list(lineages)
    while stack:
        lineage = stack[-1]
        unknown = [parent for parent in lineage.parents if parent not in verdicts]
        if lineage.publisher != publisher and unknown:
            stack += unknown
            continue
        stack.pop()
        verdicts[lineage] = lineage.publisher == publisher or any(
            verdicts[parent] for parent in lineage.parents
        )
    return {lineage for lineage in lineages if verdicts[lineage]}
