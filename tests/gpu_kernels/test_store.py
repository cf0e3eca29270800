"""Heads normed, rotated and written to the cache in Triton beside plain PyTorch, which has the same
layout of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops.cache_spec import key_value_spec
from moebius.ops.config import PLAIN_HEADS, HeadRows
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation
from moebius.ops.triton import TritonOps
from moebius.ops.triton.kernels import store as kernels

OPS = TritonOps()
REF = ReferenceOps()
BLOCK = 4
DTYPES = [torch.bfloat16, torch.float32]
# Query heads, key heads, sizes of keys and values, pairs that turn.
SHAPES = [(4, 2, 16, 16, 8), (3, 1, 6, 6, 1), (2, 2, 33, 20, 16)]


def cache(
    ops: Ops, shape: tuple[int, ...], dtype: torch.dtype, offset: Tensor | None = None
) -> tuple[Tensor, Any]:
    """A layer's cache of three blocks in which no byte is written yet, and its memory."""
    _, kv_heads, key_size, value_size, _ = shape
    spec = key_value_spec(kv_heads, key_size, dtype, value_size)
    size = ops.cache_bytes_per_block(spec, BLOCK) * 3
    memory = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    return memory, ops.make_cache(memory, spec, BLOCK, offset)


def rows_of(
    rows: int, shape: tuple[int, ...], dtype: torch.dtype, heads: HeadRows = PLAIN_HEADS
) -> tuple[Tensor, Rotation, Tensor]:
    """Random rows of heads, how they turn, and slots for them."""
    q_heads, kv_heads, key_size, value_size, half = shape
    width = q_heads * key_size * (2 if heads.gated else 1)
    if not heads.queries_alone:
        width += kv_heads * (key_size + (0 if heads.keys_as_values else value_size))
    angles = torch.randn(rows, half, device=DEVICE)
    turn = Rotation(angles.cos(), angles.sin())
    slots = torch.randperm(3 * BLOCK, device=DEVICE)[:rows]
    return torch.randn(rows, width, device=DEVICE).to(dtype), turn, slots


def assert_stores_alike(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    rows: int = 3,
    interleaved: bool = False,
    norms: torch.dtype | None = None,
    heads: HeadRows = PLAIN_HEADS,
) -> None:
    """Equal up to one rounding to `dtype`, which the order of a norm's sum may move; and what
    belongs to other slots is left alone."""
    x, turn, slots = rows_of(rows, shape, dtype, heads)
    turn = turn._replace(interleaved=interleaved)
    weights = [None if norms is None else torch.randn(shape[2]).to(DEVICE, norms) for _ in range(2)]
    (_, held), (_, wanted) = cache(OPS, shape, dtype), cache(REF, shape, dtype)
    found = OPS.rotate_and_store(x, turn, held, slots, *weights, 1e-6, heads)
    expected = REF.rotate_and_store(x, turn, wanted, slots, *weights, 1e-6, heads)
    bound = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-19}[dtype]
    for one, other in ((found, expected), (held.k, wanted.k), (held.v, wanted.v)):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_heads_turn(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for interleaved, norms in product((False, True), (None, dtype)):
        assert_stores_alike(shape, dtype, interleaved=interleaved, norms=norms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_kinds_of_rows(dtype: torch.dtype) -> None:
    shape = (3, 2, 16, 16, 4)
    for heads in (
        HeadRows(gated=True),
        HeadRows(turned_first=True),
        HeadRows(keys_as_values=True, normed_values=True),
        HeadRows(normed_values=True),
        HeadRows(queries_alone=True),
    ):
        assert_stores_alike(shape, dtype, norms=torch.float32, heads=heads)
        assert_stores_alike(shape, dtype, norms=dtype, heads=heads, rows=1)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    assert_stores_alike(SHAPES[0], torch.float32, rows=rows)
    assert_stores_alike((0, *SHAPES[0][1:]), torch.float32, rows=rows)
    assert_stores_alike((4, 2, 16, 16, 0), torch.float32, rows=rows)


@pytest.mark.parametrize("offset", [False, True])
def test_codes_are_the_references_to_the_bit(offset: bool) -> None:
    """Rows of zeros, and ones that no code stands for, too."""
    shape = (1, 2, 32, 24, 0)
    held_less = torch.randn(2, 32, device=DEVICE) if offset else None
    x, turn, slots = rows_of(6, shape, torch.float32)
    x[1] = 0
    x[2, 40] = torch.inf
    x[3, 100] = torch.nan
    x[4, 100] = 1e9
    (found, held), (wanted, other) = (cache(o, shape, torch.int8, held_less) for o in (OPS, REF))
    OPS.rotate_and_store(x, turn, held, slots)
    REF.rotate_and_store(x, turn, other, slots)
    assert torch.equal(held.k, other.k) and torch.equal(held.v, other.v)
    for one, its in zip(held.scales, other.scales, strict=True):
        torch.testing.assert_close(one, its, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(found, torch.full_like(found, 255))
    assert wanted.shape == found.shape


def test_keys_are_not_rounded_before_their_codes() -> None:
    shape = (2, 1, 32, 32, 16)
    x, turn, slots = rows_of(4, shape, torch.bfloat16)
    norm = torch.randn(32, device=DEVICE).bfloat16()
    (_, held), (_, other) = (cache(o, shape, torch.int8) for o in (OPS, REF))
    for ops, its in ((OPS, held), (REF, other)):
        ops.rotate_and_store(x, turn, its, slots, norm, norm, 1e-6)
    wide, exact = (its.k.float() * its.scales[0].float().unsqueeze(-1) for its in (held, other))
    written = other.scales[0].isfinite()
    # A norm's factor may differ in its last bit, which moves a value by half a code at most where
    # it moves one at all.
    assert ((wide - exact)[written].abs() > 1e-6).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_alone(dtype: torch.dtype) -> None:
    shape = (4, 2, 16, 16, 8)
    x, turn, slots = rows_of(3, shape, dtype)
    norm = torch.randn(16, device=DEVICE)
    (together, held), (apart, other) = (cache(OPS, shape, dtype) for _ in range(2))
    found = OPS.rotate_and_store(x, turn, held, slots, norm, norm, 1e-6)
    for i in range(3):
        at = slice(i, i + 1)
        its = Rotation(turn.cos_TR[at], turn.sin_TR[at])
        alone = OPS.rotate_and_store(x[at], its, other, slots[at], norm, norm, 1e-6)
        assert torch.equal(alone, found[at])
    assert torch.equal(together, apart)


def test_rows_that_are_no_heads_are_refused() -> None:
    _, held = cache(OPS, SHAPES[0], torch.float32)
    x, turn, slots = rows_of(2, SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="127 columns, rotated in 8 pairs a head, are not"):
        OPS.rotate_and_store(x[:, 1:], turn, held, slots)
    wide = Rotation(torch.ones(2, 9), torch.ones(2, 9))
    with pytest.raises(ValueError, match="rotated in 9 pairs a head"):
        OPS.rotate_and_store(x, wide, held, slots)


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_kernels_compile() -> None:
    with launches() as seen:
        for dtype, kv_dtype, heads, interleaved in (
            (torch.bfloat16, torch.bfloat16, PLAIN_HEADS, False),
            (torch.float32, torch.int8, HeadRows(gated=True, turned_first=True), True),
            (torch.bfloat16, torch.int8, HeadRows(keys_as_values=True, normed_values=True), False),
        ):
            shape = (32, 8, 128, 128, 64)
            x, turn, slots = rows_of(2, shape, dtype, heads)
            offset = torch.zeros(8, 128) if kv_dtype == torch.int8 else None
            _, held = cache(OPS, shape, kv_dtype, offset)
            norm = torch.ones(128, dtype=dtype)
            turn = turn._replace(interleaved=interleaved)
            OPS.rotate_and_store(x, turn, held, slots, norm, norm, 1e-6, heads)
    assert_compile(seen, kernels)
