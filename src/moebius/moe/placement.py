"""Which rank holds which expert: replicate the busiest, then pack, both greedily.

It is how DeepSeek's expert-parallel load balancer does it.

Method: https://github.com/deepseek-ai/EPLB (2025). An expert may have replicas, between which its
tokens are split evenly; a rank has room for equally many. Deterministic: ties go to the lowest
expert and the lowest rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def replicate(loads: Sequence[float], slots: int) -> list[int]:
    """The expert in each of `slots` >= E slots.

    One each, in order, then more of whichever has the busiest copies.
    """
    assert slots >= len(loads), "every expert needs a slot"
    experts = list(range(len(loads)))
    copies = [1] * len(loads)
    for _ in range(slots - len(loads)):
        busiest = max(range(len(loads)), key=lambda e: loads[e] / copies[e])
        copies[busiest] += 1
        experts.append(busiest)
    return experts


def pack(loads: Sequence[float], ranks: int) -> list[list[int]]:
    """Items on `ranks` ranks of ceil(n / ranks) places each.

    The heaviest first, each to the lightest rank with room.
    """
    room = math.ceil(len(loads) / ranks)
    held: list[list[int]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < room]
        lightest = min(open_ranks, key=lambda rank: total[rank])
        held[lightest].append(item)
        total[lightest] += loads[item]
    return held


def place(loads: Sequence[float], ranks: int, slots: int | None = None) -> list[list[int]]:
    """The experts that each rank holds, balanced for `loads`.

    With more `slots` than experts some are held twice.
    """
    experts = replicate(loads, slots or len(loads))
    shares = [loads[e] / experts.count(e) for e in experts]
    return [[experts[slot] for slot in rank] for rank in pack(shares, ranks)]


def rank_loads(loads_E: Tensor, placement: Sequence[Sequence[int]]) -> Tensor:
    """What each rank does under a placement, in the loads' unit: (..., E) to float64 (..., R)."""
    num_experts = loads_E.shape[-1]
    held_RE = torch.zeros(len(placement), num_experts, dtype=torch.float64)
    for rank, experts in enumerate(placement):
        ids = torch.tensor(experts, dtype=torch.long)
        held_RE[rank] += torch.bincount(ids, minlength=num_experts)
    return loads_E.double() @ (held_RE / held_RE.sum(0)).T
