"""Rotation, the KV cache and paged attention of the kernels, at every instruction set, against
float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from covering import pairwise
from moebius.ops.cache_spec import key_value_spec
from moebius.ops.config import HeadRows
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation, StepInputs
from ops.levels import ROUNDOFF, assert_within
from ops.paged import Sequences, as_is, empty_cache, side_by_side

REF = ReferenceOps()


pytestmark = pytest.mark.usefixtures("seeded")


def test_angles(ops: CpuOps) -> None:
    positions, inverse = torch.tensor([0, 1, 63, 4095, 1_000_003]), torch.rand(33)
    cos, sin = ops.rotation(positions, inverse, 1.3)
    angles = (positions.float().unsqueeze(1) * inverse).double()
    assert_within(cos, 1.3 * angles.cos(), 2.0**-22)
    assert_within(sin, 1.3 * angles.sin(), 2.0**-22)
    assert [x.shape for x in ops.rotation(positions[:0], inverse, 1.0)] == [(0, 33)] * 2


@pytest.mark.parametrize(
    ("sizes", "interleaved", "norms"),
    pairwise(
        [(4, 2, 64, 32), (3, 1, 6, 1), (7, 7, 80, 20), (2, 1, 33, 16)],
        [False, True],
        ["none", "before", "behind"],
    ),
)
def test_rotate_and_store(
    ops: CpuOps,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    interleaved: bool,
    norms: str,
) -> None:
    """Queries against float64. Keys are made like queries: attention finds them, to the bit, as if
    stored so."""
    heads, kv_heads, head_dim, half = sizes
    tokens, u = 37, ROUNDOFF[dtype]
    q, k, v = (torch.randn(tokens, n, head_dim).to(dtype) for n in (heads, kv_heads, kv_heads))
    angles = torch.randn(tokens, half)
    turn = Rotation(angles.cos(), angles.sin(), interleaved)
    weights = [None, None]
    if norms != "none":
        weights = [1 + 0.1 * torch.randn(head_dim).to(dtype) for _ in range(2)]
    options: dict[str, Any] = {"eps": 1e-6, "heads": HeadRows(turned_first=norms == "behind")}
    for block_size in (1, 3, 16, 24):
        blocks = -(-tokens // block_size)
        step = StepInputs.build([[0] * tokens], [0], [torch.randperm(blocks).tolist()], block_size)
        caches = [empty_cache(ops, blocks, block_size, kv_heads, head_dim, dtype) for _ in range(3)]
        rotated = []
        for part in (slice(0, 9), slice(9, 10), slice(10, tokens)):
            rows = side_by_side(q[part], k[part], v[part])
            its_turn = Rotation(turn.cos_TR[part], turn.sin_TR[part], interleaved)
            slots = step.slot_mapping[part]
            store = ops.rotate_and_store
            rotated.append(store(rows, its_turn, caches[0], slots, *weights, **options))
        oracle = empty_cache(REF, blocks, block_size, kv_heads, head_dim, torch.float64)
        wide = [None if w is None else w.double() for w in weights]
        exact = REF.rotate_and_store(
            side_by_side(q, k, v).double(),
            turn,
            oracle,
            step.slot_mapping,
            *wide,
            **options,
        )
        plain = norms == "none"
        size = q.double().norm(dim=-1, keepdim=True) if plain else head_dim**0.5 * 1.5
        # Rounded once more where what is normed was turned before.
        roundings = 5 if norms == "behind" else 3
        assert_within(torch.cat(rotated), exact, (roundings * u + 2.0**-20) * size)

        rows = side_by_side(k, k, v)
        keys = ops.rotate_and_store(
            rows,
            turn,
            caches[1],
            step.slot_mapping,
            weights[1],
            weights[1],
            **options,
        )
        as_is(ops, caches[2], keys, v, step.slot_mapping)
        plan = ops.plan_attention(step, block_size)
        found = [ops.paged_attention(q, cache, plan, 0.2) for cache in caches]
        assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_heads_with_gates_and_norms_of_float32(
    ops: CpuOps, dtype: torch.dtype, gated: bool, kv_dtype: torch.dtype | None
) -> None:
    """To the bit what heads give that were normed before, without their gates, which are left
    alone; the reference within its roundings."""
    tokens, heads, kv_heads, size = 11, 4, 2, 33
    q, gates = (torch.randn(tokens, heads, size).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens, kv_heads, size).to(dtype) for _ in range(2))
    q_norm, k_norm = (1 + torch.randn(size) for _ in range(2))
    turn = Rotation(torch.rand(tokens, 8), torch.rand(tokens, 8))
    slots = torch.randperm(16)[:tokens]
    projected = torch.cat((q, gates), dim=-1) if gated else q
    found, wanted = (empty_cache(ops, 4, 4, kv_heads, size, kv_dtype or dtype) for _ in range(2))
    rows = side_by_side(projected, k, v)
    before = rows.clone()
    given = (turn, found, slots, q_norm, k_norm, 1e-6)
    how = HeadRows(gated=gated)
    out = ops.rotate_and_store(rows, *given, how)
    normed = side_by_side(ops.rms_norm(q, q_norm, 1e-6), ops.rms_norm(k, k_norm, 1e-6), v)
    assert torch.equal(out, ops.rotate_and_store(normed, turn, wanted, slots))
    assert torch.equal(found.buffer, wanted.buffer) and torch.equal(rows, before)
    plain = empty_cache(REF, 4, 4, kv_heads, size, kv_dtype or dtype)
    reference = REF.rotate_and_store(rows, turn, plain, slots, q_norm, k_norm, 1e-6, how)
    torch.testing.assert_close(out, reference, rtol=2.0**-7, atol=2.0**-6)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [2, 11])
@pytest.mark.parametrize("shared", [False, True])
def test_normed_values_and_keys_as_values(
    ops: CpuOps, dtype: torch.dtype, shared: bool, tokens: int, kv_dtype: torch.dtype | None
) -> None:
    """To the bit what values give that were normed before; keys that are values are so before
    their own norm and rotation."""
    heads, kv_heads, size = 4, 2, 40
    q = torch.randn(tokens, heads, size).to(dtype)
    k, v = (torch.randn(tokens, kv_heads, size).to(dtype) for _ in range(2))
    norms = [1 + torch.randn(size) for _ in range(2)]
    turn = Rotation(torch.rand(tokens, 8), torch.rand(tokens, 8))
    slots = torch.randperm(16)[:tokens]
    rows = torch.cat((q.flatten(1), k.flatten(1)), dim=1) if shared else side_by_side(q, k, v)
    normed = ops.rms_norm(k if shared else v, torch.ones(size), 1e-6)
    how = HeadRows(keys_as_values=shared, normed_values=True)
    found, wanted = (empty_cache(ops, 4, 4, kv_heads, size, kv_dtype or dtype) for _ in range(2))
    out = ops.rotate_and_store(rows, turn, found, slots, *norms, 1e-6, how)
    before = side_by_side(q, k, normed)
    assert torch.equal(out, ops.rotate_and_store(before, turn, wanted, slots, *norms, 1e-6))
    assert torch.equal(found.buffer, wanted.buffer)
    alone = ops.rotate_and_store(
        q.flatten(1), turn, found, slots, *norms, 1e-6, HeadRows(queries_alone=True)
    )
    assert torch.equal(alone, out)
    assert torch.equal(found.buffer, wanted.buffer), "the cache is left alone"
    plain = empty_cache(REF, 4, 4, kv_heads, size, kv_dtype or dtype)
    reference = REF.rotate_and_store(rows, turn, plain, slots, *norms, 1e-6, how)
    torch.testing.assert_close(out, reference, rtol=2.0**-7, atol=2.0**-6)
    exact = (k if shared else v).double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)
    stored = plain.v.flatten(0, 1)[slots].double()
    if kv_dtype is not None:
        stored = stored * plain.scales[1].flatten(0, 1)[slots].double().unsqueeze(-1)
    bound = 0.5 / 127 * exact.abs().amax(-1, True) if kv_dtype else 0.0 * exact
    assert_within(stored, exact, 1.2 * bound + (1.1 * ROUNDOFF[dtype] + 2.0**-20) * exact.abs())


def assert_attends(
    ops: CpuOps, dtype: torch.dtype, case: dict[str, Any], lengths: list[int], new: list[int]
) -> None:
    """Against float64 over the same keys; the bound is of the sum of the values' sizes, by
    attending to those."""
    heads, kv_heads, head_dim = case["heads"]
    value_dim = case.get("value_dim", head_dim)
    keys = [torch.randn(n, kv_heads, head_dim).to(dtype) for n in lengths]
    values = [torch.randn(n, kv_heads, value_dim).to(dtype) for n in lengths]
    q = 2 * torch.randn(sum(new), heads, head_dim).to(dtype)
    options = {"window": case["window"], "softcap": case["softcap"]}
    options["sinks_H"] = torch.randn(heads) if case["sinks"] else None
    scale = head_dim**-0.5
    out = Sequences(keys, values, new).attend(ops, q, scale, case["block_size"], **options)
    keys, values = [k.double() for k in keys], [v.double() for v in values]
    exact = Sequences(keys, values, new).attend(REF, q.double(), scale, 16, **options)
    terms = Sequences(keys, [v.abs() for v in values], new).attend(
        REF, q.double(), scale, 16, **options
    )
    assert out.dtype == dtype and out.shape == (*q.shape[:2], value_dim)
    # Rounded: each weight, and the result. Scores are below 64, and so exp's argument is off by 64
    # * 2^-23 at most.
    assert_within(out, exact, (2.1 * ROUNDOFF[dtype] + 64 * 2.0**-23) * terms)


def test_paged_attention(ops: CpuOps, dtype: torch.dtype) -> None:
    """Random mixes of chunks and decodes, with lengths around block, tile and split ends, in a
    cache full of NaN; values of the keys' size and of others."""
    rng = random.Random(0)
    shapes = [(4, 4, 6), (8, 2, 64), (7, 1, 80), (71, 1, 64), (4, 1, 128), (1, 1, 8), (6, 3, 33)]
    for i in range(42):
        case = {
            "heads": shapes[i % 7],
            "block_size": rng.choice((1, 3, 7, 8, 16, 24, 64)),
            "window": rng.choice((None, None, 1, 5, 64, 67)),
            "softcap": rng.choice((None, None, 5.0)),
            "sinks": rng.random() < 0.3,
        }
        if i % 3 == 0:
            case["value_dim"] = rng.choice((6, 16, 33, 80, 192))
        b = case["block_size"]
        lengths = rng.sample([1, 2, b, b + 1, 2 * b - 1, 63, 64, 65, 128, 130, 33, 200], 4)
        assert_attends(
            ops, dtype, case, lengths, [rng.choice((1, n, rng.randint(1, n))) for n in lengths]
        )


@pytest.mark.parametrize("heads", [(4, 2, 256), (8, 1, 512), (3, 3, 264)])
@pytest.mark.parametrize("window", [None, 20])
def test_wide_heads(
    ops: CpuOps, dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    """Gemma 4's sizes, and one that is no multiple of 16."""
    case = {"heads": heads, "block_size": 16, "window": window, "softcap": None, "sinks": False}
    assert_attends(ops, dtype, case, [70, 33, 5], [70, 1, 3])


def test_blocks_that_lie_apart(ops: CpuOps, dtype: torch.dtype) -> None:
    """Two layers of other heads in each block, one behind the other: neither touches what is the
    other's, nor what is nobody's."""
    block_size, blocks, spare = 8, 5, 12
    specs = [key_value_spec(2, 24, dtype), key_value_spec(1, 40, dtype)]
    sizes = [ops.cache_bytes_per_block(spec, block_size) for spec in specs]
    stride = sum(sizes) + spare
    memory = torch.full((blocks * stride,), 255, dtype=torch.uint8)
    tables = [[3, 0], [4, 1]]
    step = StepInputs.build([[0] * 13, [0] * 9], [0, 0], tables, block_size)
    plan = ops.plan_attention(step, block_size)
    start = 0
    found, wanted = [], []
    for spec, size in zip(specs, sizes, strict=True):
        end = start + (blocks - 1) * stride + size
        apart = ops.make_cache(memory[start:end], spec, block_size, stride=stride)
        assert apart.num_blocks == blocks
        start += size
        kv_heads, head_dim = spec.token[0].shape
        dense = empty_cache(ops, blocks, block_size, kv_heads, head_dim, dtype)
        k, v = (torch.randn(22, kv_heads, head_dim).to(dtype) for _ in range(2))
        for cache in (apart, dense):
            as_is(ops, cache, k, v, step.slot_mapping)
        found.append((apart, torch.randn(22, 2, head_dim).to(dtype)))
        wanted.append(dense)
    for (apart, q), dense in zip(found, wanted, strict=True):
        ours = ops.paged_attention(q, apart, plan, 0.2)
        assert torch.equal(ours, ops.paged_attention(q, dense, plan, 0.2))
        for block in range(blocks):
            ((mine,), (its,)) = (ops.block_memory(each, block) for each in (apart, dense))
            assert torch.equal(mine, its)
    gaps = memory.view(blocks, stride)[:, sum(sizes) :]
    assert bool((gaps == 255).all())
    with pytest.raises(ValueError, match="cannot lie"):
        ops.make_cache(memory, specs[0], block_size, stride=sizes[0] - 4)


@pytest.mark.parametrize("window", [None, 1500])
def test_long_contexts(ops: CpuOps, dtype: torch.dtype, window: int | None) -> None:
    """Around the ends of the splits, which are combined in order."""
    for length, block_size in ((1023, 16), (1024, 24), (1025, 64), (2049, 7), (3100, 16)):
        case = {"heads": (4, 1, 64), "block_size": block_size, "window": window}
        assert_attends(
            ops, dtype, {**case, "softcap": None, "sinks": window is None}, [length, 50], [5, 1]
        )


def test_splits_are_joined_in_waves(dtype: torch.dtype) -> None:
    """Five sequences of 6 splits each for three threads: a wave is of 12 splits or a few more. The
    same bits as where no keys are split, and no more memory than is planned."""
    keys, values = (
        [torch.randn(5200 + 100 * n, 1, 32).to(dtype) for n in range(5)] for _ in range(2)
    )
    q = torch.randn(5, 2, 32).to(dtype)
    out = []
    for threads in (1, 3):
        ops = CpuOps(threads)
        before = ops._native.scratch_bytes
        out.append(Sequences(keys, values, [1] * 5).attend(ops, q, 0.2, 16))
        planned = ops.scratch_bytes(64, key_value_spec(1, 32, dtype), 16, 5600)
        assert before <= ops._native.scratch_bytes <= planned
    assert torch.equal(out[0], out[1])


def test_what_splits_take_grows_with_threads_plus_context_not_times() -> None:
    spec = key_value_spec(8, 64, torch.bfloat16)

    def splits(threads: int) -> int:
        ops = CpuOps(threads)
        long, short = (ops.scratch_bytes(64, spec, 16, n) for n in (202_752, 0))
        return long - short

    assert 0 < splits(8) <= splits(1) * 2


def test_an_empty_step(ops: CpuOps, dtype: torch.dtype) -> None:
    step = StepInputs.build([], [], [], 4)
    cache = empty_cache(ops, 4, 4, 1, 2, dtype)
    as_is(ops, cache, *torch.zeros(2, 0, 1, 2, dtype=dtype), step.slot_mapping)
    out = ops.paged_attention(
        torch.zeros(0, 2, 2, dtype=dtype), cache, ops.plan_attention(step, 4), 1.0
    )
    assert out.shape == (0, 2, 2)
