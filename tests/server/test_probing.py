"""What a tenant could tell of another's prompts through the prefix cache: a few of the probes that
benchmarks/probing.py makes by the hundred, whose times mean something."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import probing
from serving import serving


def test_another_key_tells_no_hit_from_a_miss_and_the_same_key_does(tiny_model: Path) -> None:
    keys = (probing.VICTIM, probing.PROBER)
    with serving(tiny_model, "tiny", api_keys=keys, max_model_len=1024) as address:
        rng = random.Random(0)
        other = asyncio.run(probing.probes(address, probing.PROBER, 8, rng, range(1, 300)))
        same = asyncio.run(probing.probes(address, probing.VICTIM, 8, rng, range(1, 300)))
    assert [each.cached for each in other] == [0] * 8
    assert {each.cached > 400 for each in same if each.hit} == {True}
    assert {each.cached for each in same if not each.hit} == {0}


@pytest.mark.parametrize(
    ("hits", "misses", "wanted"),
    [([3, 4], [1, 2], 1.0), ([1, 2], [3, 4], 0.0), ([1, 1], [1, 1], 0.5), ([1, 3], [2, 4], 0.25)],
)
def test_the_area_under_the_curve(hits: list[float], misses: list[float], wanted: float) -> None:
    """Worked out by hand: of the pairs, how many say that a hit is a hit."""
    assert probing.auc(hits, misses) == wanted
