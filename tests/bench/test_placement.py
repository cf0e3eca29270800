"""The benchmark of placement, on counts whose imbalance can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import placement

RECORD = Path(placement.__file__).parent / "placement.json"


def test_imbalance_before_and_after() -> None:
    """Four experts get 10 and four 2 of a step's 48. In order two ranks have 40 and 8, four 20 and
    4, eight 10 or 2; placed, two have 24 each, four 12, and eight are as before, until each expert
    is at two of them: 5 and 1."""
    step_ME = torch.tensor([[10, 10, 10, 10, 2, 2, 2, 2]])
    rows = placement.judge([3], torch.stack([step_ME] * 4))
    found = {(row["ranks"], row["spare_experts"]): row for row in rows}
    assert [found[ranks, 0]["before"][3] for ranks in (2, 4, 8)] == [
        pytest.approx(5 / 3, abs=1e-4)
    ] * 3
    assert [found[ranks, 0]["after"][3] for ranks in (2, 4)] == [1.0, 1.0]
    assert found[8, 0]["after"] == found[8, 0]["before"]
    assert found[8, 1]["after"][3] == 1.0


def test_the_record_shows_that_placing_helps() -> None:
    record = json.loads(RECORD.read_text())
    for row in record["placements"]:
        assert row["worst_before"] == max(row["before"].values())
        assert row["worst_after"] == max(row["after"].values())
        assert row["worst_after"] < row["worst_before"]
