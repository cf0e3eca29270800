"""Ranks that meet at a file. Exchanges that were made so pass the tests of all others
(test_collective.py, and test_nccl.py on a GPU); here is what making one finds out."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from moebius.errors import ConfigError, PeerError
from moebius.parallel import process_group
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.process_group import join_process_group

SPEC = ExchangeSpec(1, tokens=4, hidden=8, top_k=2, dtype=torch.bfloat16)


class Damaging:
    """A process group of one rank that changes the last byte of the rows of its `faulty`-th
    message."""

    def __init__(self, group: Any, faulty: int) -> None:
        self._group = group
        self._left = faulty

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def alltoall_base(self, output: Tensor, sent: Tensor, *counts: list[int]) -> Work:
        work: Work = self._group.alltoall_base(output, sent, *counts)
        work.wait()
        if sent.dtype == torch.uint8:
            self._left -= 1
            if self._left == 0:
                output.view(-1)[15] ^= 1
        return work


@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_rows_that_arrive_as_others_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: int
) -> None:
    """On the way there, or on the way back; or nowhere."""

    def group(file: Path, *_: object) -> Damaging:
        store = dist.FileStore(str(file), 1)  # type: ignore[attr-defined]
        return Damaging(dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=5)), faulty)

    monkeypatch.setattr(process_group, "_group", group)

    def join() -> None:
        device = torch.device("cpu")
        epoch = Epoch("test", 1)
        join_process_group(tmp_path / "store", SPEC, 0, epoch, timeout=5, device=device).close()

    if not faulty:
        join()
        return
    with pytest.raises(ConfigError, match="came as others; use --ranks 1"):
        join()


def test_what_nccl_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sockets are this host's alone, and a rank that is lost does not end the others."""
    told: dict[str, Any] = {}

    class Nccl:
        class Options:
            _timeout = timedelta(0)

        def __init__(self, store: object, rank: int, size: int, options: Options) -> None:
            told.update(
                rank=rank, size=size, timeout=options._timeout, environment=dict(os.environ)
            )
            raise RuntimeError("no GPUs found")

    for name in ("NCCL_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "")  # afterwards it is as it was
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    with pytest.raises(PeerError, match="no GPUs found"):
        join_process_group(
            tmp_path / "store", SPEC, 0, Epoch("test", 1), timeout=5, device=torch.device("cuda")
        )
    environment = told.pop("environment")
    assert told == {"rank": 0, "size": SPEC.size, "timeout": timedelta(seconds=5)}
    assert environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


@pytest.mark.skipif(dist.is_nccl_available(), reason="this torch has NCCL")
def test_a_torch_without_nccl_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"NCCL, which torch .* built without; use --ranks 1"):
        join_process_group(
            tmp_path / "store", SPEC, 0, Epoch("test", 1), timeout=5, device=torch.device("cuda")
        )
