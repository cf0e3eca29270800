"""The checker, checked: the simulation finds every bug that is seeded into the scheduler or the
pool."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from moebius.schedule.blocks import BlockPool
from schedule.checker import Violation
from schedule.seeded_bugs import BUGS
from schedule.seeding import FAMILIES
from schedule.simulate import simulate

# The trace that coverage needs makes a search three times as slow.
pytestmark = pytest.mark.no_cover
MAX_STEPS = 200_000
SEED = 500_000
# Where each bug was last found, which only saves time: made anew by running this file.
FOUND = Path(__file__).parent / "found.json"
# How a bug ends that names what is not there: it was not found, it never ran.
MISSPELT = re.compile("AttributeError|NameError|TypeError")


def search(description: str, steps: int, seed: int) -> Violation | None:
    cls = BUGS[description]
    classes = {"pool_class" if issubclass(cls, BlockPool) else "scheduler_class": cls}
    try:
        simulate(steps, seed, family=FAMILIES.get(description), **classes)
    except Violation as violation:
        return violation
    return None


def find(description: str) -> Violation | None:
    """In the episode that showed it once, where it still does; else in any within MAX_STEPS.

    What shows between two steps is noted with the first of them.
    """
    seed, step = found_at().get(description, (SEED, 0))
    return search(description, step + 1, seed) or search(description, MAX_STEPS, SEED)


@functools.cache
def found_at() -> dict[str, tuple[int, int]]:
    """The episode's seed and the step in it, by the bug's description."""
    return json.loads(FOUND.read_text()) if FOUND.exists() else {}


def test_there_are_enough_bugs():
    assert len(BUGS) >= 140


@pytest.mark.timeout(1200)  # where nothing is found where it was, some four minutes
def test_simulation_finds_every_seeded_bug(capsys):
    missed = []
    for description in BUGS:
        violation = find(description)
        if violation is None or MISSPELT.search(str(violation)):
            missed.append(description)
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


def main() -> None:
    """Search for every bug from the first episode on, and note where each is found."""
    found = {description: search(description, MAX_STEPS, SEED) for description in BUGS}
    places = [f"{json.dumps(name)}: [{at.seed}, {at.step}]" for name, at in found.items() if at]
    FOUND.write_text("{\n" + ",\n".join(places) + "\n}\n")


if __name__ == "__main__":
    main()
