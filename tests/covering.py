"""Which cases of a large product every run takes; `pytest -m exhaustive` runs the rest of it.

A fault in one of several things that are combined shows with each of its values once; one in how
two of them work together shows with each pair of values. That is what every run has. Faults that
need three certain values at once are rarer, and wait for the whole product.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations, product
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

T = TypeVar("T")


def rest(*values: object) -> ParameterSet:
    """A case that only -m exhaustive runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def chosen(cases: Iterable[T], choose: Callable[[T], bool]) -> list[T | ParameterSet]:
    """All cases, one value each; every run takes those that `choose` is true of."""
    return [case if choose(case) else rest(case) for case in cases]


def pairwise(*axes: Iterable[Hashable]) -> list[ParameterSet]:
    """The whole product of the axes; every run takes cases that have each pair of values of two
    axes, chosen one after the other by how many new pairs they bring."""
    cases = list(product(*map(tuple, axes)))
    taken = _pairwise(cases)
    return [pytest.param(*case) if case in taken else rest(*case) for case in cases]


def each_value(*axes: Iterable[Hashable]) -> list[ParameterSet]:
    """The whole product of the axes; every run takes as many cases as the longest axis has values,
    the others' values in turn."""
    lists = [tuple(axis) for axis in axes]
    taken = {
        tuple(values[i % len(values)] for values in lists) for i in range(max(map(len, lists)))
    }
    return [pytest.param(*case) if case in taken else rest(*case) for case in product(*lists)]


def _pairwise(cases: Sequence[tuple[Hashable, ...]]) -> set[tuple[Hashable, ...]]:
    pairs = {case: set(_pairs(case)) for case in cases}
    missing = set().union(*pairs.values())
    taken = set()
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        taken.add(best)
        missing -= pairs[best]
    return taken


def _pairs(case: tuple[Hashable, ...]) -> Iterable[Hashable]:
    """Every two of its values, with their places."""
    return combinations(enumerate(case), 2)
