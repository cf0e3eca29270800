"""Placement against the published example of DeepSeek's load balancer, worked by hand, and against
brute force."""

import random
from itertools import permutations

import torch

from moebius.moe.placement import pack, place, rank_loads, replicate

LOADS = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]


def test_the_published_example_by_hand() -> None:
    """12 experts in 4 groups on 2 nodes of 4 ranks, 16 slots: groups to nodes, then each node by
    itself.

    Groups weigh 262, 330, 116, 325. 330 and 325 go first, 262 to 325 and 116 to 330: nodes of
    experts 3 to 8 and 0 to 2 with 9 to 11. In the first, 165 then 104 are doubled: 82.5 82.5 73 61
    take a rank each, then 52 the lightest, 61, 52 the next, 73, and 39 and 4 the two of 82.5.
    """
    groups = [sum(LOADS[g : g + 3]) for g in range(0, 12, 3)]
    assert pack(groups, 2) == [[1, 2], [3, 0]]
    placed = []
    for node in ([3, 4, 5, 6, 7, 8], [0, 1, 2, 9, 10, 11]):
        placed += [
            [node[i] for i in rank] for rank in place([LOADS[e] for e in node], ranks=4, slots=8)
        ]
    assert placed == [[5, 6], [5, 7], [8, 4], [3, 4], [10, 9], [10, 2], [0, 1], [11, 1]]


def test_replicas_go_where_a_copy_carries_most() -> None:
    """10 halves to 5, then 6 to 3, then 5 and 5 to 10/3."""
    assert replicate([6, 10, 1], 6) == [0, 1, 2, 1, 0, 1]
    steps = torch.tensor([[6, 10, 1], [2, 4, 4]])
    assert rank_loads(steps, [[0, 1], [1, 2]]).tolist() == [[11, 6], [4, 6]]
    assert rank_loads(steps, [[0, 0], [1, 2]]).tolist() == [[6, 11], [2, 8]]


def test_packing_is_complete_and_near_the_best() -> None:
    draw = random.Random(0)
    for _ in range(30):
        loads = [draw.randint(1, 50) for _ in range(6)]
        held = place(loads, 3)
        assert sorted(e for rank in held for e in rank) == list(range(6)) and {
            len(rank) for rank in held
        } == {2}
        best = min(
            max(loads[p[i]] + loads[p[i + 1]] for i in (0, 2, 4)) for p in permutations(range(6))
        )
        assert max(rank_loads(torch.tensor(loads), held).tolist()) <= 1.2 * best


def test_ranks_may_hold_unequal_numbers() -> None:
    held = place([1.0] * 7, 3)
    assert sorted(map(len, held)) == [2, 2, 3] and sorted(e for rank in held for e in rank) == list(
        range(7)
    )
