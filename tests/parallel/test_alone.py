"""A rank that has no group yet: as the others' tokens and answers were nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moebius.parallel.alone import Alone
from moebius.parallel.exchange import ExchangeSpec
from parallel.naive import wanted
from parallel.rank_side import Case, Gathering, bits, gathered, layer

SPEC = ExchangeSpec(3, 6, 10, 3, torch.bfloat16)


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_its_own_rows_and_pairs_are_those_of_a_group_in_which_nobody_else_has_any(
    rank: int, splits: int, tokens: int
) -> None:
    counts = tuple(tokens if other == rank else 0 for other in range(3))
    case = Case(7, counts, experts=7, splits=splits)
    found = layer(Alone(SPEC, rank), case)
    right = wanted(case, SPEC, rank)
    assert torch.equal(found.rows_RD, right.rows_RD) and torch.equal(found.ids_RK, right.ids_RK)
    assert found.untouched
    owners = case.owners_CE()
    for t, ids in enumerate(case.ids_TK(rank, SPEC).tolist()):
        for k, expert in enumerate(ids):
            here = owners[t % splits, expert] == rank
            answer = right.back_TKD[t, k] if here else torch.zeros_like(right.back_TKD[t, k])
            assert torch.equal(found.back_TKD[t, k], answer), (t, k)


def test_it_agrees_with_itself_and_sends_nothing() -> None:
    one = Alone(SPEC, 2)
    assert one.agree((3, 4)) == [(3, 4)]
    layer(one, Case(1, (0, 0, 6), 7))
    assert one.traffic.bytes_out == one.traffic.bytes_in == 0
    one.close()


def test_gathered_rows_are_its_own_and_others_columns_zero() -> None:
    spec = replace(SPEC, gathered=4, width=70)
    case = Gathering(1, (0, 3, 0))
    found, untouched, back = gathered(Alone(spec, 1), case)
    assert untouched and torch.equal(found, bits(case.x_GD(1, spec)))
    own = spec.columns(1)
    right = torch.zeros(3, 70)
    right[:, own.start : own.stop] = case.results_GV(1, spec)[:, own.start : own.stop]
    assert torch.equal(back, right)


def test_what_a_group_would_refuse_it_refuses() -> None:
    one = Alone(replace(SPEC, tokens=2), 0)
    with pytest.raises(ValueError, match="x has 6 rows; the group was made for 2 a rank"):
        layer(one, Case(1, (6, 0, 0), 7))
