"""Which cases of a large product every run takes; `pytest -m exhaustive` runs the rest of it.

A fault in one of several things that are combined shows with each of its values once; one in how
two of them work together shows with each pair of values. That is what every run has. Faults that
need three certain values at once are rarer, and wait for the whole product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
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


def pairwise(*axes: Iterable[object]) -> list[ParameterSet]:
    """The whole product of the axes; every run takes cases that have each pair of values of two
    axes, chosen one after the other by how many new pairs they bring."""
    places = list(product(*(range(len(axis)) for axis in _lists(axes))))
    pairs = {place: set(combinations(enumerate(place), 2)) for place in places}
    missing = set().union(*pairs.values())
    taken = set()
    while missing:
        best = max(places, key=lambda place: len(pairs[place] & missing))
        taken.add(best)
        missing -= pairs[best]
    return _product(axes, taken)


def each_value(
    *axes: Iterable[object], among: Collection[object] | None = None
) -> list[ParameterSet]:
    """The whole product of the axes; every run takes as many cases as the longest axis has values,
    the others' values in turn; of the first axis those `among` which it is told to choose."""
    lists = _lists(axes)
    places = [range(len(axis)) for axis in lists]
    if among is not None:
        places[0] = [i for i in places[0] if lists[0][i] in among]
    turns = range(max(map(len, places)))
    return _product(lists, {tuple(place[i % len(place)] for place in places) for i in turns})


def _lists(axes: Iterable[Iterable[object]]) -> list[list[object]]:
    return [list(axis) for axis in axes]


def _product(
    axes: Iterable[Iterable[object]], taken: Collection[tuple[int, ...]]
) -> list[ParameterSet]:
    """Of which those at the places `taken` are no rest."""
    cases = product(*(enumerate(axis) for axis in _lists(axes)))
    made = []
    for case in cases:
        place, values = zip(*case, strict=True)
        made.append(pytest.param(*values) if place in taken else rest(*values))
    return made
