"""Blocks before a window are given back while a sequence runs: what others write there, NaN too, is
never seen; on every instruction set and on plain PyTorch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from covering import pairwise
from moebius.ops import Ops
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from ops.levels import LEVELS, bits, level
from ops.paged import as_is, empty_cache

NO_BLOCK = -1
HEADS, KV_HEADS = 4, 2

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(params=[*LEVELS, "reference"])
def backend(request: pytest.FixtureRequest) -> Ops:
    return ReferenceOps() if request.param == "reference" else level(request.param, 2)


def attend(
    ops: Ops,
    keys: Tensor,
    values: Tensor,
    q_THN: Tensor,
    starts: Sequence[int],
    window: int,
    block_size: int,
    *,
    freed: bool,
    kv_dtype: torch.dtype | None = None,
) -> Tensor:
    """One step whose sequences all have these keys and values, and begin at `starts`. With `freed`,
    no block before a window is in a table, and all of them are full of NaN."""
    length = len(keys)
    count = -(-length // block_size)
    blocks = torch.randperm(
        count * len(starts), generator=torch.Generator().manual_seed(block_size)
    ).view(len(starts), count)
    tables = blocks.tolist()
    cache = empty_cache(
        ops, blocks.numel(), block_size, KV_HEADS, keys.shape[2], kv_dtype or keys.dtype
    )
    for table in tables:
        whole = StepInputs.build([[0] * length], [0], [table], block_size)
        as_is(ops, cache, keys, values, whole.slot_mapping)
    for table, start in zip(tables, starts, strict=True):
        for i in range(max(0, start - window + 1) // block_size if freed else 0):
            for part in ops.block_memory(cache, table[i]):
                part.view(-1).view(torch.uint8).fill_(255)
            table[i] = NO_BLOCK
    step = StepInputs.build([[0] * (length - s) for s in starts], starts, tables, block_size)
    return ops.paged_attention(q_THN, cache, ops.plan_attention(step, block_size, window), 0.3)


@pytest.mark.parametrize(
    ("head_dim", "kv_dtype", "dtype"),
    pairwise([64, 33], [None, torch.int8], [torch.bfloat16, torch.float32]),
    ids=str,
)
def test_what_lies_in_a_freed_block_changes_no_bit(
    backend: Ops, dtype: torch.dtype, kv_dtype: torch.dtype | None, head_dim: int
) -> None:
    rng = random.Random(head_dim)
    for block_size in (1, 3, 8, 16, 24, 32, 64):
        for window in rng.sample((1, 5, 17, 64, 67), 3):
            length = rng.randint(window + 1, window + 140)
            starts = [length - 1, length - rng.randint(2, 40), length - rng.randint(1, length)]
            starts = [max(0, start) for start in starts]
            keys, values = (torch.randn(length, KV_HEADS, head_dim).to(dtype) for _ in range(2))
            rows = sum(length - start for start in starts)
            q_THN = torch.randn(rows, HEADS, head_dim).to(dtype)
            case = (backend, keys, values, q_THN, starts, window, block_size)
            kept, freed = (attend(*case, freed=freed, kv_dtype=kv_dtype) for freed in (False, True))
            assert not freed.isnan().any(), f"window {window}, blocks of {block_size}"
            assert torch.equal(bits(kept), bits(freed)), f"window {window}, blocks of {block_size}"


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_freed_blocks_of_long_contexts(
    backend: Ops, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    """One decode alone: its keys are summed in splits, each by a thread of its own."""
    for length, window in ((2500, 1100), (2048, 1024), (2100, 77)):
        keys, values = (torch.randn(length, KV_HEADS, 32).to(dtype) for _ in range(2))
        q_THN = torch.randn(1, HEADS, 32).to(dtype)
        for block_size in (7, 16):
            case = (backend, keys, values, q_THN, [length - 1], window, block_size)
            kept, freed = (attend(*case, freed=freed, kv_dtype=kv_dtype) for freed in (False, True))
            assert torch.equal(bits(kept), bits(freed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("isa", LEVELS)
def test_where_a_window_starts_in_a_block_changes_no_bit(isa: str, dtype: torch.dtype) -> None:
    """Promise P1: the same keys in blocks of any size, freed or not, alone or among other rows."""
    ops = level(isa, 2)
    length, window = 150, 50
    keys, values = (torch.randn(length, KV_HEADS, 64).to(dtype) for _ in range(2))
    q_THN = torch.randn(40, HEADS, 64).to(dtype)
    together = [
        attend(ops, keys, values, q_THN, [length - 40], window, block_size, freed=True)
        for block_size in (1, 3, 8, 16, 24, 32, 64)
    ]
    assert all(torch.equal(bits(out), bits(together[0])) for out in together)
    for row in range(40):
        end = length - 39 + row
        case = (ops, keys[:end], values[:end], q_THN[row : row + 1], [end - 1], window, 16)
        assert torch.equal(bits(attend(*case, freed=True)), bits(together[0][row : row + 1]))
