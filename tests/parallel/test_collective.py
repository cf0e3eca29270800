"""What is particular to process groups: meeting, and what a group may not be."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.parallel.collective import CollectiveExchange
from moebius.parallel.exchange import Epoch, ExchangeSpec
from parallel import rank_side
from parallel.rank_side import Meeting
from parallel.ranks import ranks

SPEC = ExchangeSpec(1, 6, 10, 3, torch.bfloat16)
EPOCH = Epoch("collective", 3)


@pytest.mark.parametrize("other", ["epoch", "tokens", "dtype"])
def test_ranks_that_differ_are_refused(tmp_path: Path, other: str) -> None:
    """Where a group is given that brought them together all the same."""
    spec = replace(SPEC, size=2)
    theirs = {
        "epoch": (spec, Epoch("collective", 4)),
        "tokens": (replace(spec, tokens=7), EPOCH),
        "dtype": (replace(spec, dtype=torch.float16), EPOCH),
    }
    place = str(tmp_path / "store")
    with ranks(2) as members:
        members[0].start(rank_side.join, Meeting("gloo", place, spec, EPOCH))
        members[1].start(rank_side.join, Meeting("gloo", place, *theirs[other]))
        for own, rank in enumerate(members):
            error = rank.error()
            assert error.kind is ConfigError, error
            assert f"ranks {own} and {1 - own} differ in {other}" in error.text


class Group:
    """One of one rank, whose operations are done just after the first wait for them has ended."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self._size = size
        self._rank = rank
        self.waits = 0

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def alltoall_base(self, output: Tensor, given: Tensor, *counts: list[int]) -> Group:
        output.copy_(given)
        self.waits = 0
        return self

    def wait(self, timeout: timedelta | None = None) -> None:
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")

    def is_completed(self) -> bool:
        return True


def test_what_comes_as_a_wait_for_it_ends_has_come() -> None:
    exchange = CollectiveExchange(Group(), SPEC, 0, EPOCH, timeout=30)
    assert exchange.agree((5,)) == [(5,)]


def test_a_group_of_other_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank 0 of 1 was given .* it is rank 2 of 3"):
        CollectiveExchange(Group(3, 2), SPEC, 0, EPOCH, timeout=1)
