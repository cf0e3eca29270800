"""The checker, checked: the simulation finds every bug that is seeded into the scheduler or the
pool."""

from __future__ import annotations

import re

import pytest

from moebius.schedule.blocks import BlockPool
from schedule.checker import Violation
from schedule.seeded_bugs import BUGS
from schedule.seeding import FAMILIES
from schedule.simulate import simulate

MAX_STEPS = 200_000
SEED = 500_000
# How a bug ends that names what is not there: it was not found, it never ran.
MISSPELT = re.compile("AttributeError|NameError|TypeError")


def find(description: str) -> Violation | None:
    cls = BUGS[description]
    classes = {"pool_class" if issubclass(cls, BlockPool) else "scheduler_class": cls}
    try:
        simulate(MAX_STEPS, SEED, family=FAMILIES.get(description), **classes)
    except Violation as violation:
        return violation
    return None


def test_there_are_enough_bugs():
    assert len(BUGS) >= 140


@pytest.mark.timeout(1200)  # some four minutes on a slow processor
def test_simulation_finds_every_seeded_bug(capsys):
    missed = []
    for description in BUGS:
        violation = find(description)
        if violation is None or MISSPELT.search(str(violation)):
            missed.append(description)
        with capsys.disabled():
            print(f"\n  {description}: {violation or 'MISSED'}", end="")
    with capsys.disabled():
        print(
            f"\n  found {len(BUGS) - len(missed)} of {len(BUGS)} seeded bugs within {MAX_STEPS} "
            "steps each"
        )
    assert not missed


@pytest.mark.parametrize(
    "description", ["the salt is left out of the hash", "a failed step is not rolled back"]
)
def test_violation_comes_again_from_its_seed(description):
    cls = BUGS[description]
    first = find(description)
    assert first is not None
    classes = {"pool_class" if issubclass(cls, BlockPool) else "scheduler_class": cls}
    with pytest.raises(Violation) as again:
        simulate(first.step, first.seed, **classes)
    assert str(again.value) == str(first)
