"""What every run takes of a product: all of its pairs or values, and nothing of it is lost."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from _pytest.mark import ParameterSet

from covering import chosen, each_value, pairwise, rest

AXES = ("abcd", (1, 2, 3), (True, False), (None, 0.5))


def taken(cases: list[ParameterSet]) -> list[tuple[object, ...]]:
    return [case.values for case in cases if not case.marks]


@pytest.mark.parametrize("make", [pairwise, each_value])
def test_the_product_is_whole_and_in_order(make) -> None:
    assert [case.values for case in make(*AXES)] == list(product(*AXES))


def test_every_pair_of_values_is_among_what_every_run_takes() -> None:
    cases = taken(pairwise(*AXES))
    for i, j in combinations(range(len(AXES)), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(AXES[i], AXES[j]))
    assert len(cases) < 20 < 48, "of 48, of which 12 are the fewest that have all pairs"


def test_every_value_is_among_the_fewest_cases_that_have_all() -> None:
    cases = taken(each_value(*AXES))
    assert [set(values) for values in zip(*cases, strict=True)] == [set(axis) for axis in AXES]
    assert len(cases) == 4


def test_every_value_is_beside_those_of_the_first_axis_that_were_named() -> None:
    cases = each_value(*AXES, among="bd")
    assert [case.values for case in cases] == list(product(*AXES))
    found = [set(values) for values in zip(*taken(cases), strict=True)]
    assert found == [{"b", "d"}, {1, 2, 3}, {True, False}, {None, 0.5}]
    assert len(taken(cases)) == 3


def test_the_rest_is_marked() -> None:
    [plain, marked] = chosen([1, 2], lambda value: value == 1)
    assert plain == 1
    assert isinstance(marked, ParameterSet) and marked.values == (2,)
    assert [mark.name for mark in rest(1).marks] == ["exhaustive"]
