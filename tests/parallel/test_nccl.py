"""The exchange between GPUs, as far as one GPU goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moebius.parallel.exchange import Epoch, ExchangeSpec
from parallel import rank_side
from parallel.naive import cases, check
from parallel.rank_side import Meeting
from parallel.ranks import ranks, together

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and dist.is_nccl_available()), reason="needs a GPU with NCCL"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_pairs(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = ExchangeSpec(1, 6, 10, 3, dtype)
    with ranks(1) as members:
        meeting = Meeting("nccl", str(tmp_path / "store"), spec, Epoch("test", 1))
        together(members, rank_side.join, meeting)
        check(members, spec, cases(1, 6))
        assert together(members, rank_side.agree, (5, -7)) == [[[(5, -7)]]]
