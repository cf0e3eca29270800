"""Which GPU a rank has, by what torch says there are."""

from __future__ import annotations

import pytest
import torch

from moebius.engine import wire
from moebius.engine.config import EngineConfig
from moebius.engine.rank_device import take_device
from moebius.errors import ConfigError


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPU that was made the process's own, of two."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    return found


def launch(ranks: int, here: int, device: str = "auto") -> wire.Launch:
    config = EngineConfig(ranks=ranks, device=device)  # type: ignore[arg-type]
    return wire.Launch(
        "model", config, b"", frozenset(), rank=here - 1, local_rank=here - 1, local_ranks=here
    )


def test_each_takes_the_one_of_its_number(taken: list[int]) -> None:
    take_device(launch(2, 2))
    take_device(launch(2, 2, "cpu"))
    assert taken == [1]


def test_more_ranks_than_gpus_and_other_hosts_are_refused(taken: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"--ranks 3: .* this host has 2; use --ranks 2"):
        take_device(launch(3, 3))
    with pytest.raises(ConfigError, match=r"1 of 2 ranks are on this host: .* use --device cpu"):
        take_device(launch(2, 1))
    assert not taken


def test_without_gpus_nothing_is_taken(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    take_device(launch(3, 1))
    assert not taken
