"""Which rank holds which expert: evenly in order, or balanced for measured loads.

Balanced means: replicate the busiest, then pack, both greedily, as DeepSeek's expert-parallel load
balancer does it (https://github.com/deepseek-ai/EPLB, 2025). An expert may have replicas, between
which its tokens are split evenly. Deterministic: ties go to the lowest expert and the lowest rank,
so that all ranks come to the same placement from the same loads.

Shapes: E experts, C rows of an owners table.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Self

import torch
from torch import Tensor

from moebius.errors import ConfigError

# Rows of an owners table at most: where replicas' numbers have a larger common multiple, they split
# tokens evenly but for one in so many.
MOST_OWNERS = 256


@dataclass(frozen=True, slots=True)
class Nodes:
    """What lies nearer to each other than to the rest: ranks of one host, experts of one group.

    sizes    how many ranks each host has, or each node of memory; ranks are numbered node by node.
             Empty where all ranks are as near to each other
    groups   in how many groups a layer's router has its experts, by the layer's number; 1 for those
             that are left out
    """

    sizes: tuple[int, ...] = ()
    groups: Mapping[int, int] = field(default_factory=dict)


ALIKE = Nodes()
"""All ranks are as near to each other."""


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

    @classmethod
    def of(cls, held: Sequence[Sequence[int]]) -> Self:
        """Of all experts that are held by some rank."""
        found = {e for experts in held for e in experts}
        return cls(1 + max(found, default=0), tuple(map(tuple, held)))

    def among(self, members: Sequence[int]) -> Self:
        """The same on these ranks alone, which are numbered anew in this order. Raises ConfigError
        where they don't hold every expert."""
        return type(self)(self.num_experts, tuple(self.held[rank] for rank in members))

    def near(self, other: Self, nodes: Sequence[int] = ()) -> Self:
        """The same shares, each at the rank that needs the fewest new experts for it.

        nodes: how many ranks each has. Greedily, by how much of `other` stays where it is; ties to
        the lowest rank. The shares of a node stay together: first each node gets those of one with
        as many ranks, then its ranks share them out.
        """
        sizes = nodes or (len(self.held),)
        before = other._of_nodes(sizes)
        after = self._of_nodes(sizes)
        held: list[tuple[int, ...]] = []
        for node, found in enumerate(_matched(before, after, sizes)):
            here = [[rank] for rank in before[node]]
            shares = [[rank] for rank in after[found]]
            held += [shares[share][0] for share in _matched(here, shares, [1] * len(shares))]
        return type(self)(self.num_experts, tuple(held))

    def _of_nodes(self, sizes: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
        """What each node's ranks hold."""
        ends = list(accumulate(sizes))
        return [self.held[end - size : end] for end, size in zip(ends, sizes, strict=True)]

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

    @property
    def held(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """What each rank holds of each layer."""
        return {layer: each.held for layer, each in self.layers.items()}

    @classmethod
    def of(cls, held: Mapping[int, Sequence[Sequence[int]]]) -> Self:
        """What `held` of a placement was."""
        return cls({layer: LayerPlacement.of(each) for layer, each in held.items()})

    def among(self, members: Sequence[int]) -> Self:
        """On these ranks alone: LayerPlacement.among, of every layer."""
        return type(self)({layer: each.among(members) for layer, each in self.layers.items()})

    @classmethod
    def linear(
        cls, experts: Mapping[int, int], ranks: int, spare: int = 0, nodes: Nodes = ALIKE
    ) -> Self:
        """In order, as evenly as it goes: of 7 experts on 3 ranks, 3, 2 and 2.

        experts: how many each layer has, by its number. spare: how many more a rank holds, those of
        the ranks behind it, which begin on another node where none has most of the ranks. Raises
        ConfigError for more ranks than experts.
        """
        ahead = max(nodes.sizes, default=1)
        return cls({layer: _linear(count, ranks, spare, ahead) for layer, count in experts.items()})

    @classmethod
    def balanced(
        cls,
        loads: Mapping[int, Sequence[float]],
        ranks: int,
        *,
        spare: int = 0,
        nodes: Nodes = ALIKE,
    ) -> Self:
        """So that ranks have equal loads, with room for `spare` replicas a rank.

        Where there is room for two of each expert, each has two, at different ranks, and on
        different nodes where none has so many ranks that the others lack the room: the others have
        every expert when a rank is lost, or a node. What is left goes to the busiest.

        loads: what each expert of each layer gets of the tokens, in any unit. nodes: see `place`.
        Raises ConfigError as `linear`.
        """
        layers = {}
        for layer, shares in loads.items():
            _check_ranks(ranks, len(shares))
            slots = _slots(len(shares), ranks, spare)
            if _twice_by_nodes(len(shares), slots, nodes.sizes):
                held = place_twice(shares, slots, nodes.sizes)
            else:
                groups = nodes.groups.get(layer, 1)
                least = 1 + (ranks > 1 and slots >= 2 * len(shares))
                held = place(shares, ranks, slots, groups=groups, nodes=nodes.sizes, least=least)
            layers[layer] = LayerPlacement(len(shares), tuple(map(tuple, held)))
        return cls(layers)

    def rebalanced(
        self, loads: Mapping[int, Sequence[float]], *, spare: int = 0, nodes: Nodes = ALIKE
    ) -> Self:
        """`balanced` for these layers' loads, with as few experts as it takes at other ranks than
        here."""
        best = type(self).balanced(loads, self.ranks, spare=spare, nodes=nodes)
        layers = {}
        for layer, placed in best.layers.items():
            slots = _slots(placed.num_experts, self.ranks, spare)
            by_nodes = _twice_by_nodes(placed.num_experts, slots, nodes.sizes) or _by_nodes(
                placed.num_experts, slots, nodes.groups.get(layer, 1), nodes.sizes
            )
            layers[layer] = placed.near(self.layers[layer], nodes.sizes if by_nodes else ())
        return type(self)(layers)

    def imbalance(self, loads: Mapping[int, Sequence[float]]) -> dict[int, float]:
        """Tokens of the busiest rank over the mean, for each layer; 1 is even, and no load is."""
        found = {}
        for layer, shares in loads.items():
            loads_R = rank_loads(torch.tensor(shares, dtype=torch.float64), self.layers[layer].held)
            mean = float(loads_R.mean())
            found[layer] = float(loads_R.max()) / mean if mean else 1.0
        return found


def _matched(
    before: Sequence[Sequence[Sequence[int]]],
    after: Sequence[Sequence[Sequence[int]]],
    sizes: Sequence[int],
) -> list[int]:
    """For each place, which of `after` it gets, of those that are as large: greedily, what has most
    in common with `before`; ties to the lowest place."""
    kept = {
        (place, share): len({*chain(*before[place])} & {*chain(*after[share])})
        for place in range(len(before))
        for share in range(len(after))
        if sizes[place] == sizes[share]
    }
    found: dict[int, int] = {}
    for place, share in sorted(kept, key=lambda pair: (-kept[pair], pair)):
        if place not in found and share not in found.values():
            found[place] = share
    return [found[place] for place in range(len(before))]


def _check_ranks(ranks: int, num_experts: int) -> None:
    if not 1 <= ranks <= num_experts:
        raise ConfigError(
            f"{ranks} ranks cannot share the {num_experts} experts of a layer; use 1 to "
            f"{num_experts} ranks"
        )


def _slots(num_experts: int, ranks: int, spare: int) -> int:
    """Room for experts at all ranks; more than one of each a rank is of no use."""
    return min(num_experts + spare * ranks, num_experts * ranks)


def _by_nodes(num_experts: int, slots: int, groups: int, sizes: Sequence[int]) -> bool:
    """Whether groups of experts can be packed onto nodes: a node's ranks have their even part of
    them and of the slots, and are enough for as many replicas as it gets of its experts."""
    ranks = sum(sizes)
    parts = all(n * size % ranks == 0 for n in (groups, slots) for size in sizes)
    even = len(sizes) > 1 and num_experts % groups == 0 and parts
    return even and slots <= num_experts * min(sizes)


def _node_rooms(slots: int, sizes: Sequence[int]) -> list[int]:
    """Each node's part of the slots, by its number of ranks."""
    ends = [slots * end // sum(sizes) for end in accumulate(sizes)]
    return [end - start for start, end in pairwise((0, *ends))]


def _twice_by_nodes(num_experts: int, slots: int, sizes: Sequence[int]) -> bool:
    """Whether there is room for two of each expert, on two of several nodes."""
    each = [min(room, num_experts) for room in _node_rooms(slots, sizes)]
    return len(sizes) > 1 and sum(each) >= 2 * num_experts


def _linear(num_experts: int, ranks: int, spare: int, ahead: int) -> LayerPlacement:
    """ahead: how many ranks on those are whose experts a rank has spares of."""
    _check_ranks(ranks, num_experts)
    rooms = _rooms(num_experts, ranks)
    firsts = [sum(rooms[:rank]) for rank in range(ranks)]
    held = []
    for rank, (first, size) in enumerate(zip(firsts, rooms, strict=True)):
        own = range(first, first + size)
        behind = firsts[(rank + ahead) % ranks]
        others = ((behind + e) % num_experts for e in range(num_experts))
        spares = [e for e in others if e not in own][:spare]
        held.append((*own, *spares))
    return LayerPlacement(num_experts, tuple(held))


def _rooms(items: int, ranks: int) -> list[int]:
    """How many of the items each rank takes, as evenly as it goes, larger numbers first."""
    return [items // ranks + (rank < items % ranks) for rank in range(ranks)]


def replicate(
    loads: Sequence[float], slots: int, most: int | None = None, least: int = 1
) -> list[int]:
    """The expert in each of `slots` >= least * E slots.

    `least` each, in order, then more of whichever has the busiest copies, of those that have fewer
    than `most`, while there are such.
    """
    assert slots >= least * len(loads), "every expert needs its slots"
    experts = [e for e in range(len(loads)) for _ in range(least)]
    copies = [least] * len(loads)
    for _ in range(slots - len(experts)):
        some = [e for e in range(len(loads)) if most is None or copies[e] < most]
        busiest = max(some or range(len(loads)), key=lambda e: loads[e] / copies[e])
        copies[busiest] += 1
        experts.append(busiest)
    return experts


def pack(
    loads: Sequence[float], sizes: Sequence[int], kinds: Sequence[int] | None = None
) -> list[list[int]]:
    """Items on ranks, or on nodes, each of which takes its part of them by its size: as many as one
    of that size, or one more.

    The heaviest first, each to where there is room and, with it, the least for its size. Items of
    one kind, where sizes are equal and there are no more of them than these, go to different ones.
    """
    kinds = range(len(loads)) if kinds is None else kinds
    least = [len(loads) * size // sum(sizes) for size in sizes]
    larger = len(loads) - sum(least)
    held: list[list[int]] = [[] for _ in sizes]

    def weight(rank: int, more: float = 0.0) -> float:
        return (sum(loads[item] for item in held[rank]) + more) / sizes[rank]

    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        one = sum(len(each) > few for each, few in zip(held, least, strict=True)) < larger
        open_ranks = [rank for rank, few in enumerate(least) if len(held[rank]) < few + one]
        without = [r for r in range(len(sizes)) if all(kinds[i] != kinds[item] for i in held[r])]
        new_to = [rank for rank in open_ranks if rank in without]
        lightest = min(new_to or open_ranks, key=partial(weight, more=loads[item]))
        held[lightest].append(item)
        if without and not new_to:
            _swap(held[lightest], held[min(without, key=weight)], kinds)
    return held


def _swap(held: list[int], other: list[int], kinds: Sequence[int]) -> None:
    """Give the last item to a rank without its kind, for one whose kind is not here.

    There is such a one: the other holds at least as many as were here before the last, not one of
    them of its kind, which is among these.
    """
    here = {kinds[item] for item in held}
    there = next(item for item in other if kinds[item] not in here)
    other[other.index(there)] = held[-1]
    held[-1] = there


def place(
    loads: Sequence[float],
    ranks: int,
    slots: int | None = None,
    *,
    groups: int = 1,
    nodes: Sequence[int] = (),
    least: int = 1,
) -> list[list[int]]:
    """The experts that each rank holds, balanced for `loads`.

    With more `slots` than experts some are held by several ranks, each by `least` of them. Where
    every node, of `nodes[n]` ranks, can have its part of a router's groups of experts and of the
    slots, each group stays on one node (its tokens' rows cross between nodes once), and replicas
    stay on theirs: groups are packed onto nodes, and then each node's experts are replicated and
    packed by themselves. Ranks are numbered node by node. Nodes of unequal numbers of ranks get
    groups in proportion, which goes beyond what EPLB does.
    """
    slots = slots or len(loads)
    if not _by_nodes(len(loads), slots, groups, nodes):
        groups = 1
        nodes = (ranks,)
    size = len(loads) // groups
    group_loads = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
    placed = []
    for here, packed in zip(nodes, pack(group_loads, nodes), strict=True):
        members = [e for g in packed for e in range(g * size, (g + 1) * size)]
        experts = replicate([loads[e] for e in members], slots * here // ranks, here, least)
        shares = [loads[members[e]] / experts.count(e) for e in experts]
        for rank in pack(shares, [1] * here, experts):
            placed.append([members[experts[slot]] for slot in rank])
    return placed


def place_twice(loads: Sequence[float], slots: int, sizes: Sequence[int]) -> list[list[int]]:
    """The experts that each rank holds, balanced for `loads`, each on two nodes at least, of
    `sizes` ranks, which have room for that.

    Experts are packed onto nodes, on two or more where they are busy. Then each node replicates its
    own to fill its room, and packs them onto its ranks.
    """
    rooms = _node_rooms(slots, sizes)
    nodes = _several_nodes(loads, [min(room, len(loads)) for room in rooms], sizes)
    held = []
    for node, room, size in zip(nodes, rooms, sizes, strict=True):
        own = replicate([loads[e] for e in node], min(room, size * len(node)), size)
        held.append([node[item] for item in own])
    copies = Counter(chain(*held))
    placed = []
    for experts, size in zip(held, sizes, strict=True):
        for rank in pack([loads[e] / copies[e] for e in experts], [1] * size, experts):
            placed.append([experts[slot] for slot in rank])
    return placed


def _several_nodes(
    loads: Sequence[float], rooms: Sequence[int], sizes: Sequence[int]
) -> list[list[int]]:
    """Nodes that are full of different experts, each of which is on two or more.

    The heaviest first, each on those that are lightest for their size, as long as the rest will
    find two each, else on the two with most room left. What is left goes to the busiest.
    """
    wanted = Counter(replicate(loads, sum(rooms), len(rooms), least=2))
    shares = [load / wanted[e] for e, load in enumerate(loads)]
    nodes: list[list[int]] = [[] for _ in rooms]

    def left(node: int) -> int:
        return rooms[node] - len(nodes[node])

    def weight(node: int) -> float:
        return sum(shares[e] for e in nodes[node]) / sizes[node]

    order = sorted(range(len(loads)), key=lambda e: -shares[e])
    for rest, e in zip(reversed(range(len(loads))), order, strict=True):
        free = [node for node in range(len(nodes)) if left(node)]
        found = sorted(free, key=weight)[: wanted[e]]
        # `rest` experts find two nodes each where no node counts for more of them than there are.
        if sum(min(left(n) - (n in found), rest) for n in range(len(nodes))) < 2 * rest:
            found = sorted(free, key=lambda node: -left(node))[:2]
        for node in found:
            nodes[node].append(e)
    _give_the_rest(nodes, loads, rooms, weight)
    return nodes


def _give_the_rest(
    nodes: list[list[int]],
    loads: Sequence[float],
    rooms: Sequence[int],
    weight: Callable[[int], float],
) -> None:
    """Fill nodes with further copies: each of the busiest expert that some node lacks, on the
    lightest of these."""
    copies = Counter(chain(*nodes))
    while free := [node for node, room in enumerate(rooms) if len(nodes[node]) < room]:
        lacking = {e: [n for n in free if e not in nodes[n]] for e in range(len(loads))}
        wanting = [e for e, places in lacking.items() if places]
        busiest = max(wanting, key=lambda e: loads[e] / copies[e])
        nodes[min(lacking[busiest], key=weight)].append(busiest)
        copies[busiest] += 1


def rank_loads(loads_E: Tensor, placement: Sequence[Sequence[int]]) -> Tensor:
    """What each rank does under a placement, in the loads' unit: (..., E) to float64 (..., R)."""
    num_experts = loads_E.shape[-1]
    held_RE = torch.zeros(len(placement), num_experts, dtype=torch.float64)
    for rank, experts in enumerate(placement):
        ids = torch.tensor(experts, dtype=torch.long)
        held_RE[rank] += torch.bincount(ids, minlength=num_experts)
    return loads_E.double() @ (held_RE / held_RE.sum(0)).T
