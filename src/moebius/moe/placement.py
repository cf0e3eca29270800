"""Which rank holds which expert: greedy replication and packing, as DeepSeek's expert-parallel load
balancer does it.

Method: https://github.com/deepseek-ai/EPLB (2025). An expert may have replicas, between which its
tokens are split evenly; a rank has room for equally many. Deterministic: ties go to the lowest
expert and the lowest rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def replicate(loads: Sequence[float], slots: int) -> list[int]:
    """The expert in each of `slots` >= E slots: one each, in order, then more of whichever has the
    busiest copies."""
    assert slots >= len(loads), "every expert needs a slot"
    experts, copies = list(range(len(loads))), [1] * len(loads)
    for _ in range(slots - len(loads)):
        busiest = max(range(len(loads)), key=lambda e: loads[e] / copies[e])
        copies[busiest] += 1
        experts.append(busiest)
    return experts


def pack(loads: Sequence[float], ranks: int) -> list[list[int]]:
    """Items on `ranks` ranks of ceil(n / ranks) places each: the heaviest first, each to the
    lightest with room."""
    room, held, total = -(-len(loads) // ranks), [[] for _ in range(ranks)], [0.0] * ranks  # type: ignore[var-annotated]
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        lightest = min((r for r in range(ranks) if len(held[r]) < room), key=lambda r: total[r])
        held[lightest].append(item)
        total[lightest] += loads[item]
    return held


def place(loads: Sequence[float], ranks: int, slots: int | None = None) -> list[list[int]]:
    """The experts that each rank holds, balanced for `loads`; with more `slots` than experts some
    are held twice."""
    experts = replicate(loads, slots or len(loads))
    shares = [loads[e] / experts.count(e) for e in experts]
    return [[experts[slot] for slot in rank] for rank in pack(shares, ranks)]


def rank_loads(loads_E: Tensor, placement: Sequence[Sequence[int]]) -> Tensor:
    """What each rank does under a placement, in the unit of the loads (..., E): float64 (...,
    R)."""
    held_RE = torch.zeros(len(placement), loads_E.shape[-1], dtype=torch.float64)
    for rank, experts in enumerate(placement):
        held_RE[rank] += torch.bincount(
            torch.tensor(experts, dtype=torch.long), minlength=loads_E.shape[-1]
        )
    return loads_E.double() @ (held_RE / held_RE.sum(0)).T
