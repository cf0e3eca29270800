"""Placement against the published example of DeepSeek's load balancer, worked by hand, and against
brute force."""

import random
from collections.abc import Callable, Sequence
from itertools import permutations

import msgspec
import pytest
import torch

from moebius.errors import ConfigError
from moebius.moe.placement import (
    LayerPlacement,
    Nodes,
    Placement,
    place,
    rank_loads,
    replicate,
)

LOADS = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]


def test_the_published_example() -> None:
    """12 experts in 4 groups, 16 replicas, 2 nodes of 4 ranks: what its README prints.

    By hand for the first layer: groups weigh 262, 330, 116, 325. 330 and 325 go first, 262 to 325
    and 116 to 330: nodes of experts 3 to 8 and 0 to 2 with 9 to 11. In the first, 165 then 104 are
    doubled: 82.5 82.5 73 61 take a rank each, then 52 the lightest, 61, 52 the next, 73, and 39 and
    4 the two of 82.5.
    """
    printed = {
        tuple(LOADS): [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27): [
            7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1,
        ],
    }  # fmt: skip
    for loads, slots in printed.items():
        held = place(loads, ranks=8, slots=16, groups=4, nodes=(4, 4))
        assert [e for rank in held for e in rank] == slots


def test_groups_that_nodes_do_not_divide_are_placed_as_one() -> None:
    flat = place(LOADS, 8, 16)
    assert place(LOADS, 8, 16, groups=3, nodes=(4, 4)) == flat
    assert place(LOADS, 8, 16, groups=4, nodes=(5, 3)) == flat
    assert place(LOADS, 7, 14, groups=4, nodes=(4, 3)) == place(LOADS, 7, 14)
    assert place(LOADS, 8, 16, groups=4, nodes=(4, 4)) != flat


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
    """By one at most, so that none is without, whatever the loads."""
    held = place([1.0] * 7, 3)
    assert sorted(map(len, held)) == [2, 2, 3] and sorted(e for rank in held for e in rank) == list(
        range(7)
    )
    draw = random.Random(1)
    for ranks in range(1, 9):
        for loads in ([0.0] * 8, [9.0] + [0.0] * 7, [draw.random() for _ in range(8)]):
            for slots in (8, 9, 8 + ranks):
                found = [len(experts) for experts in place(loads, ranks, slots)]
                assert sum(found) == slots and max(found) - min(found) <= 1


def test_a_copy_goes_to_a_rank_that_has_none() -> None:
    """4 of 9 copies of expert 0 weigh 25 each; the lightest rank with room would hold two."""
    held = place([100, 8, 8, 8, 8, 8], ranks=3, slots=9)
    assert all(len(set(experts)) == 3 for experts in held)
    assert [0 in experts for experts in held] == [True] * 3


def test_the_usual_placement_is_even_and_in_order() -> None:
    made = Placement.linear({1: 7, 4: 3}, 3)
    assert made.ranks == 3 and made.experts == {1: 7, 4: 3}
    assert made.layers[1].held == ((0, 1, 2), (3, 4), (5, 6))
    assert made.layers[4].held == ((0,), (1,), (2,))
    for home in range(3):
        assert made.layers[1].owners(home).tolist() == [[0, 0, 0, 1, 1, 2, 2]]


def test_a_placement_crosses_to_another_process_as_what_it_is() -> None:
    made = Placement.balanced({2: [3.0, 2.0, 1.0], 5: [1.0] * 4}, 2, spare=1)
    frame = msgspec.msgpack.encode(made)
    assert msgspec.msgpack.decode(frame, type=Placement) == made
    bare = msgspec.msgpack.encode({"layers": {0: {"num_experts": 2, "held": [[0], [0]]}}})
    with pytest.raises(msgspec.ValidationError, match="expert 1 is at no rank"):
        msgspec.msgpack.decode(bare, type=Placement)


def test_what_no_placement_can_be() -> None:
    wrong: dict[str, Callable[[], object]] = {
        "5 ranks cannot share the 4 experts of a layer": lambda: Placement.linear({0: 4}, 5),
        "0 ranks cannot share": lambda: Placement.linear({0: 4}, 0),
        "5 ranks cannot share the 4": lambda: Placement.balanced({0: [1.0] * 4}, 5),
        "no layer has experts": lambda: Placement.linear({}, 2),
        "expert 2 is at no rank": lambda: LayerPlacement(3, ((0,), (1,))),
        "expert 3 does not exist": lambda: LayerPlacement(3, ((0, 1), (2, 3))),
        "rank 1 of 2 holds no expert": lambda: LayerPlacement(3, ((0, 1, 2), ())),
        r"different numbers of ranks: \[1, 2\]": lambda: Placement(
            {0: LayerPlacement(2, ((0, 1),)), 1: LayerPlacement(2, ((0,), (1,)))}
        ),
    }
    for message, make in wrong.items():
        with pytest.raises(ConfigError, match=message):
            make()


def test_replicas_share_rows_evenly() -> None:
    """Of many rows of one home, of one row each of many homes, and of one row's many experts."""
    placed = LayerPlacement(3, ((0, 1), (0, 2), (0, 1)))
    tables = [placed.owners(home) for home in range(6)]
    for owners in tables:
        assert owners.dtype == torch.int32 and owners.shape == (6, 3)  # 3 and 2 replicas
        assert torch.bincount(owners[:, 0], minlength=3).tolist() == [2, 2, 2]
        assert torch.bincount(owners[:, 1], minlength=3).tolist() == [3, 0, 3]
        assert owners[:, 2].tolist() == [1] * 6
    assert sorted(int(owners[0, 0]) for owners in tables) == [0, 0, 1, 1, 2, 2]
    everywhere = LayerPlacement(4, ((0, 1, 2, 3), (0, 1, 2, 3)))
    assert torch.bincount(everywhere.owners(0)[0]).tolist() == [2, 2]


def test_an_expert_held_twice_by_a_rank_gets_two_shares() -> None:
    owners = LayerPlacement(1, ((0, 0),)).owners(0)
    assert owners.unique().tolist() == [0]
    uneven = LayerPlacement(2, ((0, 0, 1), (0,)))
    assert torch.bincount(uneven.owners(0)[:, 0]).tolist() == [2, 1]


def test_the_table_stays_small() -> None:
    """Replicas in numbers whose common multiple is 27,720: even but for one row in a hundred."""
    held: list[list[int]] = [[] for _ in range(12)]
    for e, copies in enumerate((5, 7, 8, 9, 11)):
        for rank in range(copies):
            held[rank].append(e)
    held[11] += range(5, 12)
    owners = LayerPlacement(12, tuple(map(tuple, held))).owners(3)
    assert owners.shape == (256, 12)
    for e, copies in enumerate((5, 7, 8, 9, 11)):
        rows = torch.bincount(owners[:, e])
        assert len(rows) == copies and int(rows.max() - rows.min()) <= 1


def test_balanced_is_better_than_in_order_and_replicas_better_still() -> None:
    loads = {0: [float(load) for load in LOADS], 3: [100.0] + [1.0] * 11}
    ways = {
        "in order": Placement.linear({0: 12, 3: 12}, 4),
        "balanced": Placement.balanced(loads, 4),
        "spare": Placement.balanced(loads, 4, spare=2),
    }
    found = {name: placement.imbalance(loads) for name, placement in ways.items()}
    # In order ranks get 262, 330, 116 and 325 of 1,033; the hot expert's 102 of 111.
    assert found["in order"] == pytest.approx({0: 330 / (1033 / 4), 3: 102 / (111 / 4)})
    assert found["in order"][0] > found["balanced"][0] > found["spare"][0] >= 1
    assert found["in order"][3] == found["balanced"][3]  # one expert is at one rank
    assert found["spare"][3] < 1.2
    assert ways["spare"].imbalance({0: [0.0] * 12, 3: [1.0] * 12})[0] == 1
    for layer in ways["spare"].layers.values():
        assert {len(experts) for experts in layer.held} == {5}


def test_there_is_never_more_than_one_copy_of_each_a_rank_at_most() -> None:
    placed = Placement.balanced({0: [3.0, 2.0, 1.0]}, 3, spare=9)
    assert [sorted(experts) for experts in placed.layers[0].held] == [[0, 1, 2]] * 3


def test_copies_are_at_different_ranks_whatever_the_loads() -> None:
    draw = random.Random(2)
    for _ in range(200):
        ranks = draw.randint(1, 6)
        count = draw.randint(ranks, 12)
        loads = [draw.choice((0.0, 1.0, draw.random(), 50 * draw.random())) for _ in range(count)]
        slots = draw.randint(count, count * ranks)
        held = place(loads, ranks, slots)
        assert sum(map(len, held)) == slots and {e for each in held for e in each} == {
            *range(count)
        }
        assert all(len(set(experts)) == len(experts) for experts in held)
        assert max(map(len, held)) - min(map(len, held)) <= 1


def test_two_of_each_survive_the_loss_of_any_rank() -> None:
    draw = random.Random(3)
    for _ in range(50):
        ranks = draw.randint(2, 5)
        count = draw.randint(ranks, 12)
        loads = {0: [draw.random() ** 4 for _ in range(count)]}
        enough = -(-count // ranks)
        for made in (
            Placement.balanced(loads, ranks, spare=enough),
            Placement.linear({0: count}, ranks, spare=enough),
        ):
            for lost in range(ranks):
                others = made.among([rank for rank in range(ranks) if rank != lost])
                assert others.ranks == ranks - 1 and others.experts == {0: count}


def test_ranks_that_lack_an_expert_cannot_go_on() -> None:
    placed = Placement.linear({2: 8}, 4, spare=1)
    assert placed.layers[2].held == ((0, 1, 2), (2, 3, 4), (4, 5, 6), (6, 7, 0))
    with pytest.raises(ConfigError, match="expert 5 is at no rank"):
        placed.among([0, 1, 3])
    more = Placement.linear({2: 8}, 4, spare=2)
    assert more.among([3, 1]).layers[2].held == ((6, 7, 0, 1), (2, 3, 4, 5))


def test_a_placement_crosses_as_what_each_rank_holds() -> None:
    placed = Placement.linear({1: 7, 4: 3}, 3)
    assert Placement.of(
        {layer: [list(e) for e in each] for layer, each in placed.held.items()}
    ) == (placed)
    with pytest.raises(ConfigError, match="expert 1 is at no rank"):
        Placement.of({0: [[0], [2]]})


def test_shares_go_where_most_of_them_is() -> None:
    """By hand: rank 1 keeps 3, 4, 5 whole, rank 0 two of three; what is left goes to rank 2."""
    before = LayerPlacement(9, ((0, 1, 2), (3, 4, 5), (6, 7, 8)))
    after = LayerPlacement(9, ((3, 4, 5), (2, 6, 8), (0, 1, 7)))
    assert after.near(before).held == ((0, 1, 7), (3, 4, 5), (2, 6, 8))
    assert before.near(before) == before


def crossing(
    placed: LayerPlacement, chosen: list[list[int]], node_of: Sequence[int]
) -> tuple[int, int]:
    """Of tokens at every rank that choose these experts: how many leave their home's node, and in
    how many rows, one for each rank that gets any."""
    tokens = 0
    rows = 0
    for home in range(len(placed.held)):
        owners = placed.owners(home).tolist()
        for row, experts in enumerate(chosen):
            ranks = {owners[row % len(owners)][e] for e in experts}
            away = [rank for rank in ranks if node_of[rank] != node_of[home]]
            tokens += bool(away)
            rows += len(away)
    return tokens, rows


def test_groups_stay_on_a_node_and_less_crosses() -> None:
    """16 experts in 4 groups on 2 nodes of 2 ranks; a token's experts are of one group. Where that
    is at one node, a token leaves two of its four homes, and no other one."""
    draw = random.Random(4)
    groups = [[*range(g * 4, g * 4 + 4)] for g in range(4)]
    chosen = [sorted(draw.sample(draw.choice(groups), 2)) for _ in range(400)]
    pairs: list[float] = [sum(e in each for each in chosen) * (1 + e % 3) for e in range(16)]
    by_group = Placement.balanced({5: pairs}, 4, nodes=Nodes((2, 2), {5: 4})).layers[5]
    at = {e: rank // 2 for rank, experts in enumerate(by_group.held) for e in experts}
    assert all(len({at[e] for e in group}) == 1 for group in groups)
    flat = Placement.balanced({5: pairs}, 4).layers[5]
    tokens, rows = crossing(by_group, chosen, [0, 0, 1, 1])
    flat_tokens, flat_rows = crossing(flat, chosen, [0, 0, 1, 1])
    assert tokens == 2 * 400 < flat_tokens and rows < flat_rows


def test_hosts_with_unequal_ranks_get_groups_in_proportion() -> None:
    """The published loads on a node of three ranks and one of one. By hand: 330 and 325 weigh less
    on three ranks, 110 and 218 each, than on one; 262 would make these 306 each, so it goes to the
    one, and 116 where there is room. On the three 183, 165 and 104 begin. 86 joins 104, 73 joins
    165, 61 joins 183, 56 the 190 and 39 the 238, which are full then, and 4 the 244."""
    held = place(LOADS, 4, groups=4, nodes=(3, 1))
    assert [*map(set, held)] == [{10, 3, 7}, {5, 8, 6}, {4, 11, 9}, {0, 1, 2}]
    assert rank_loads(torch.tensor(LOADS), held).tolist() == [248, 277, 246, 262]
    one_first = place(LOADS, 4, groups=4, nodes=(1, 3))
    assert one_first == [held[3], *held[:3]]
    busy = rank_loads(torch.tensor(LOADS), held)
    assert busy.max() <= 1.2 * busy.mean()


def test_unequal_hosts_keep_groups_and_less_crosses() -> None:
    """8 groups on hosts of two ranks, one and one, with room for replicas and without; which moves
    to other loads keeps so."""
    draw = random.Random(7)
    near = Nodes((2, 1, 1), {0: 8})
    node_of = [0, 0, 1, 2]
    groups = [[*range(g * 2, g * 2 + 2)] for g in range(8)]
    chosen = [list(draw.choice(groups)) for _ in range(400)]
    now = Placement.linear({0: 16}, 4, 0, near)
    for _ in range(8):
        loads = {0: [draw.random() ** 2 for _ in range(16)]}
        now = now.rebalanced(loads, nodes=near)
        held = now.layers[0].held
        at = {e: node_of[rank] for rank, experts in enumerate(held) for e in experts}
        assert all(len({at[e] for e in group}) == 1 for group in groups)
        assert [len(experts) for experts in held] == [4] * 4
        flat = Placement.balanced(loads, 4).layers[0]
        assert crossing(now.layers[0], chosen, node_of) < crossing(flat, chosen, node_of)
    assert now.rebalanced(loads, nodes=near) == now
    replicas = Placement.balanced({0: [9.0] + [1.0] * 23}, 5, spare=1, nodes=Nodes((3, 2)))
    assert all(len({*each}) == len(each) for each in replicas.layers[0].held)


def test_only_hosts_of_as_many_ranks_change_places() -> None:
    """By hand: what node 1 held goes to a node of one rank again, the other one."""
    before = LayerPlacement(8, ((0, 1), (2, 3), (4, 5), (6, 7)))
    after = LayerPlacement(8, ((4, 0), (5, 1), (6, 7), (2, 3)))
    assert after.near(before, (2, 1, 1)).held == ((4, 0), (5, 1), (2, 3), (6, 7))


def test_what_moves_keeps_groups_on_nodes_and_most_experts_where_they_are() -> None:
    """By hand: nodes of experts 0 to 3 and 4 to 7 change places and no rank's share is whole; then
    node by node, rank by rank, what has most in common stays."""
    before = LayerPlacement(8, ((0, 1), (2, 3), (4, 5), (6, 7)))
    after = LayerPlacement(8, ((7, 4), (5, 6), (3, 0), (1, 2)))
    assert after.near(before, nodes=(2, 2)).held == ((3, 0), (1, 2), (7, 4), (5, 6))
    draw = random.Random(5)
    now = Placement.linear({0: 16}, 4)
    for spare in (0, 2, 0, 2):
        loads = {0: [draw.random() ** 3 for _ in range(16)]}
        now = now.rebalanced(loads, spare=spare, nodes=Nodes((2, 2), {0: 4}))
        held = now.layers[0].held
        for group in range(4):
            experts = range(4 * group, 4 * group + 4)
            assert len({r // 2 for r, each in enumerate(held) for e in each if e in experts}) == 1
    assert now.rebalanced(loads, spare=2, nodes=Nodes((2, 2), {0: 4})) == now


def test_replicas_that_do_not_fit_on_a_node_go_anywhere() -> None:
    """One rank a node: a replica that stayed on its expert's node would be at the same rank."""
    for spare in (1, 4):
        alone = Placement.balanced(
            {0: [9.0] + [1.0] * 7}, 2, spare=spare, nodes=Nodes((1, 1), {0: 4})
        )
        assert all(len({*each}) == len(each) for each in alone.layers[0].held)


def without(placed: Placement, node: int, sizes: Sequence[int]) -> Placement:
    """On the ranks of the other nodes."""
    node_of = [n for n, size in enumerate(sizes) for _ in range(size)]
    return placed.among([rank for rank, n in enumerate(node_of) if n != node])


@pytest.mark.parametrize(
    ("sizes", "count", "more"),
    [
        ((2, 2), 8, 0),
        ((3, 3), 7, 1),
        ((2, 2, 2), 12, 2),
        ((1, 1, 1, 1), 4, 1),
        ((2, 1, 1), 16, 0),
        ((2, 2, 1), 20, 1),
        ((1, 3, 2), 13, 0),
    ],
)
def test_two_of_each_survive_the_loss_of_any_node(
    sizes: tuple[int, ...], count: int, more: int
) -> None:
    draw = random.Random(6)
    ranks = sum(sizes)
    near = Nodes(sizes, {0: 2})
    spare = -(-count // ranks) + more
    now = Placement.linear({0: count}, ranks, spare, near)
    for _ in range(10):
        for lost in range(len(sizes)):
            assert without(now, lost, sizes).experts == {0: count}
        loads = {0: [draw.random() ** 4 for _ in range(count)]}
        now = now.rebalanced(loads, spare=spare, nodes=near)
        assert all(len({*each}) == len(each) for each in now.layers[0].held)
        assert max(map(len, now.layers[0].held)) <= -(-count // ranks) + spare


def test_a_node_that_the_others_have_no_room_for() -> None:
    """6 experts, two of each, on two ranks and one: at the one there is room for four. With room
    for all of them at each rank it is as even as can be."""
    loads = {0: [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]}
    near = Nodes((2, 1))
    few = Placement.balanced(loads, 3, spare=2, nodes=near)
    assert all(few.among([r for r in range(3) if r != lost]).ranks == 2 for lost in range(3))
    with pytest.raises(ConfigError, match="is at no rank"):
        few.among([2])
    all_of_them = Placement.balanced(loads, 3, spare=4, nodes=near)
    assert [{*each} for each in all_of_them.layers[0].held] == [{*range(6)}] * 3
    assert all_of_them.imbalance(loads) == {0: 1.0}


def test_what_is_on_two_nodes_is_balanced_too() -> None:
    """Within a tenth of even on four hosts of two ranks, with loads of which a few are hot."""
    draw = random.Random(8)
    for _ in range(5):
        loads = {0: [draw.random() ** 4 for _ in range(32)]}
        placed = Placement.balanced(loads, 8, spare=8, nodes=Nodes((2, 2, 2, 2)))
        assert placed.imbalance(loads)[0] < 1.1


def test_spares_in_order_are_the_next_nodes() -> None:
    near = Nodes((2, 2))
    assert Placement.linear({0: 8}, 4, 2, near).held[0] == (
        (0, 1, 4, 5),
        (2, 3, 6, 7),
        (4, 5, 0, 1),
        (6, 7, 2, 3),
    )
    assert Placement.linear({0: 8}, 4, 1, near).held[0][3] == (6, 7, 2)
    assert Placement.linear({0: 8}, 4, 9, near) != Placement.linear({0: 8}, 4, 9)
