"""Which rank holds which expert: evenly in order, or balanced for measured loads.

Balanced means: replicate the busiest, then pack, both greedily, as DeepSeek's expert-parallel load
balancer does it (https://github.com/deepseek-ai/EPLB, 2025). An expert may have replicas, between
which its tokens are split evenly. Deterministic: ties go to the lowest expert and the lowest rank,
so that all ranks come to the same placement from the same loads.

Shapes: E experts, C rows of an owners table.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import ConfigError

# Rows of an owners table at most: where replicas' numbers have a larger common multiple, they split
# tokens evenly but for one in so many.
MOST_OWNERS = 256


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """Where one layer's experts lie.

    num_experts   E
    held          for each rank the experts that it holds; one that it holds twice gets two shares
                  of its tokens. Every expert lies somewhere, and every rank holds one at least

    Raises ConfigError where that is not so.
    """

    num_experts: int
    held: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = len(self.held)
        _check_ranks(ranks, self.num_experts)
        found = {e for experts in self.held for e in experts}
        odd = sorted(found ^ set(range(self.num_experts)))
        if odd:
            what = "is at no rank" if odd[0] in range(self.num_experts) else "does not exist"
            raise ConfigError(
                f"experts 0 to {self.num_experts - 1} are to be placed; expert {odd[0]} {what}"
            )
        bare = [rank for rank, experts in enumerate(self.held) if not experts]
        if bare:
            raise ConfigError(f"rank {bare[0]} of {ranks} holds no expert; it needs at least one")

    def holders(self) -> list[list[int]]:
        """The ranks of each expert, a rank as often as it holds it."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(self.held):
            for e in experts:
                found[e].append(rank)
        return found

    def owners(self, home: int) -> Tensor:
        """Who computes what of rank `home`'s rows: (C, E) int32, expert e of row t at [t % C, e].

        An expert's replicas take rows in turn, so that they share one long prompt as well as many
        short ones. Which of them is first depends on home and on the expert: steps of few rows, as
        decoding has them, are spread too.
        """
        holders = self.holders()
        cycle = min(math.lcm(*map(len, holders)), MOST_OWNERS)
        turns = [
            [ranks[(t + home + e) % len(ranks)] for e, ranks in enumerate(holders)]
            for t in range(cycle)
        ]
        return torch.tensor(turns, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rank holds which experts, for each layer that has a router, by the layer's number.

    Raises ConfigError for layers on different numbers of ranks.
    """

    layers: Mapping[int, LayerPlacement]

    def __post_init__(self) -> None:
        counts = {len(each.held) for each in self.layers.values()}
        if not counts:
            raise ConfigError("no layer has experts; there is nothing to spread over ranks")
        if len(counts) > 1:
            raise ConfigError(f"layers are placed on different numbers of ranks: {sorted(counts)}")

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(next(iter(self.layers.values())).held)

    @property
    def experts(self) -> dict[int, int]:
        """How many each layer has, by its number."""
        return {layer: each.num_experts for layer, each in self.layers.items()}

    @classmethod
    def linear(cls, experts: Mapping[int, int], ranks: int) -> "Placement":
        """In order, as evenly as it goes: of 7 experts on 3 ranks, 3, 2 and 2.

        experts: how many each layer has, by its number. Raises ConfigError for more ranks than
        experts.
        """
        return cls({layer: _linear(count, ranks) for layer, count in experts.items()})

    @classmethod
    def balanced(
        cls,
        loads: Mapping[int, Sequence[float]],
        ranks: int,
        *,
        spare: int = 0,
        groups: int = 1,
        nodes: int = 1,
    ) -> "Placement":
        """So that ranks have equal loads, with room for `spare` replicas a rank.

        loads: what each expert of each layer gets of the tokens, in any unit. groups, nodes: see
        `place`. Raises ConfigError as `linear`.
        """
        layers = {}
        for layer, shares in loads.items():
            _check_ranks(ranks, len(shares))
            slots = min(len(shares) + spare * ranks, len(shares) * ranks)
            held = place(shares, ranks, slots, groups=groups, nodes=nodes)
            layers[layer] = LayerPlacement(len(shares), tuple(map(tuple, held)))
        return cls(layers)

    def imbalance(self, loads: Mapping[int, Sequence[float]]) -> dict[int, float]:
        """Tokens of the busiest rank over the mean, for each layer; 1 is even, and no load is."""
        found = {}
        for layer, shares in loads.items():
            loads_R = rank_loads(torch.tensor(shares, dtype=torch.float64), self.layers[layer].held)
            mean = float(loads_R.mean())
            found[layer] = float(loads_R.max()) / mean if mean else 1.0
        return found


def _check_ranks(ranks: int, num_experts: int) -> None:
    if not 1 <= ranks <= num_experts:
        raise ConfigError(
            f"{ranks} ranks cannot share the {num_experts} experts of a layer; use 1 to "
            f"{num_experts} ranks"
        )


def _linear(num_experts: int, ranks: int) -> LayerPlacement:
    _check_ranks(ranks, num_experts)
    cuts = [0]
    for size in _rooms(num_experts, ranks):
        cuts.append(cuts[-1] + size)
    held = tuple(tuple(range(cuts[rank], cuts[rank + 1])) for rank in range(ranks))
    return LayerPlacement(num_experts, held)


def _rooms(items: int, ranks: int) -> list[int]:
    """How many of the items each rank takes, as evenly as it goes, larger numbers first."""
    return [items // ranks + (rank < items % ranks) for rank in range(ranks)]


def replicate(loads: Sequence[float], slots: int, most: int | None = None) -> list[int]:
    """The expert in each of `slots` >= E slots.

    One each, in order, then more of whichever has the busiest copies, of those that have fewer than
    `most`, while there are such.
    """
    assert slots >= len(loads), "every expert needs a slot"
    experts = list(range(len(loads)))
    copies = [1] * len(loads)
    for _ in range(slots - len(loads)):
        some = [e for e in range(len(loads)) if most is None or copies[e] < most]
        busiest = max(some or range(len(loads)), key=lambda e: loads[e] / copies[e])
        copies[busiest] += 1
        experts.append(busiest)
    return experts


def pack(loads: Sequence[float], ranks: int, kinds: Sequence[int] | None = None) -> list[list[int]]:
    """Items on `ranks` ranks, whose numbers of items differ by one at most.

    The heaviest first, each to the lightest rank with room; of those, where there are any, to one
    that holds none of the item's kind.
    """
    least = len(loads) // ranks
    larger = len(loads) % ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        full = least + (sum(len(each) > least for each in held) < larger)
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < full]
        if kinds is not None:
            kind = kinds[item]
            new_to = [r for r in open_ranks if all(kinds[each] != kind for each in held[r])]
            open_ranks = new_to or open_ranks
        lightest = min(open_ranks, key=lambda rank: total[rank])
        held[lightest].append(item)
        total[lightest] += loads[item]
    return held


def place(
    loads: Sequence[float],
    ranks: int,
    slots: int | None = None,
    *,
    groups: int = 1,
    nodes: int = 1,
) -> list[list[int]]:
    """The experts that each rank holds, balanced for `loads`.

    With more `slots` than experts some are held twice. Where a router's groups of experts divide
    evenly among the nodes, and so do ranks and slots, each group stays on one node (its tokens'
    rows cross between nodes once), and replicas stay on theirs: groups are packed onto nodes, and
    then each node's experts are replicated and packed by themselves. Ranks are numbered node by
    node.
    """
    slots = slots or len(loads)
    whole = len(loads) % groups == 0 and not any(n % nodes for n in (groups, ranks, slots))
    if not whole:
        groups = nodes = 1
    size = len(loads) // groups
    group_loads = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
    placed = []
    for packed in pack(group_loads, nodes):
        members = [e for g in packed for e in range(g * size, (g + 1) * size)]
        experts = replicate([loads[e] for e in members], slots // nodes, ranks // nodes)
        shares = [loads[members[e]] / experts.count(e) for e in experts]
        for rank in pack(shares, ranks // nodes, experts):
            placed.append([members[experts[slot]] for slot in rank])
    return placed


def rank_loads(loads_E: Tensor, placement: Sequence[Sequence[int]]) -> Tensor:
    """What each rank does under a placement, in the loads' unit: (..., E) to float64 (..., R)."""
    num_experts = loads_E.shape[-1]
    held_RE = torch.zeros(len(placement), num_experts, dtype=torch.float64)
    for rank, experts in enumerate(placement):
        ids = torch.tensor(experts, dtype=torch.long)
        held_RE[rank] += torch.bincount(ids, minlength=num_experts)
    return loads_E.double() @ (held_RE / held_RE.sum(0)).T
