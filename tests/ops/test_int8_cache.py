"""Keys and values as codes of 8 bits: how they are made, to the bit, and attention over them at every
instruction set and on plain PyTorch, against float64 over the same codes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from moebius.ops import Feature, Operation, Ops, Use
from moebius.ops.cache_spec import CacheSpec, Plane, key_value_planes, key_value_spec
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.codes import quantised
from moebius.ops.steps import Rotation, StepInputs
from ops.levels import LEVELS, ROUNDOFF, assert_within, bits, level
from ops.paged import Sequences, as_is, empty_cache, side_by_side

REF = ReferenceOps()
TILE = 64
"""Keys whose weights the kernels quantise together."""

Floats = npt.NDArray[np.float64]

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(params=[*LEVELS, "reference"])
def backend(request: pytest.FixtureRequest) -> Ops:
    return REF if request.param == "reference" else level(request.param, 2)


def by_hand(row: Tensor) -> tuple[list[int], float]:
    """One row's codes and scale, number by number."""
    numbers = [np.float32(x) for x in row.float().tolist()]
    largest = max(map(abs, numbers))
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.float16(largest / np.float32(127))
    if not all(map(np.isfinite, (*numbers, scale))):
        return [0] * len(numbers), float("nan")
    inverse = np.float32(1) / np.float32(scale) if scale else np.float32(0)
    return [max(-127, min(127, round(float(x * inverse)))) for x in numbers], float(scale)


def rows(size: int) -> Tensor:
    """Random rows of many sizes, and those where something could go wrong."""
    made = torch.randn(60, size) * torch.logspace(-9, 6, 60).unsqueeze(1)
    special = torch.zeros(10, size)
    special[1] = -0.0
    special[2, 0] = 8.3e6
    special[3, -1] = -8.4e6  # over 127, beyond float16
    special[4, 0] = torch.inf
    special[5, size // 2] = torch.nan
    special[6] = 1e-38
    special[7] = torch.arange(size) - size / 2 + 0.5  # halves: ties, where the scale is 1
    special[7, 0] = 127
    special[8] = 1.0
    special[9] = 2.0**-24 * 127 * 1.4  # a scale of 1.4 times float16's least, which becomes 1
    return torch.cat((made, special))


@pytest.mark.parametrize("size", [1, 6, 33, 64, 128])
def test_codes_are_made_as_described(size: int) -> None:
    x = rows(size)
    codes, scales = quantised(x)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16
    for row, its_codes, its_scale in zip(x, codes.tolist(), scales.tolist(), strict=True):
        expected, scale = by_hand(row)
        assert its_codes == expected
        assert its_scale == scale or (np.isnan(its_scale) and np.isnan(scale))
    held = scales.isfinite() & (scales > 2.0**-14)
    error = (codes.double() * scales.double().unsqueeze(1) - x.double()).abs()
    assert (error[held] <= scales[held].double().unsqueeze(1) * (0.5 + 1e-5)).all()


def test_a_scale_that_is_rounded_first_makes_smaller_errors() -> None:
    """Than codes of the scale before it is rounded."""
    x = torch.randn(4000, 64)
    codes, scales = quantised(x)
    exact = x.abs().amax(1, keepdim=True) / 127
    late = (x / exact).round() * exact.half().float()
    ours = (codes.float() * scales.float().unsqueeze(1) - x).abs() / exact
    theirs = (late - x).abs() / exact
    assert ours.max() < theirs.max() and ours.square().mean() < theirs.square().mean()


@dataclass
class Held:
    """What lies in a cache of the kernels, read as csrc/kernels.h describes it."""

    kv_heads: int
    head_dim: int
    value_dim: int
    block_size: int
    buffer: Tensor
    head_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.pairs = -(-self.head_dim // 2)
        self.padded = -(-self.value_dim // 16) * 16
        self.k_bytes = 2 * self.pairs * self.block_size
        self.v_bytes = 2 * -(-self.block_size // 2) * self.padded
        whole = self.k_bytes + self.v_bytes + 4 * self.block_size
        self.head_bytes = -(-whole // 4) * 4

    def read(self, slot: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """A token's codes of key and value, and their two scales, as bits."""
        block, at = divmod(slot, self.block_size)
        start = (block * self.kv_heads + head) * self.head_bytes
        memory = self.buffer[start : start + self.head_bytes].view(torch.int8)
        keys = memory[: self.k_bytes].view(self.pairs, self.block_size, 2)
        values = memory[self.k_bytes : self.k_bytes + self.v_bytes]
        pair_of_tokens = values.view(-1, self.padded, 2)[at // 2, : self.value_dim, at % 2]
        behind = memory[self.k_bytes + self.v_bytes :][: 4 * self.block_size]
        scales = behind.contiguous().view(torch.int16).view(2, self.block_size)[:, at]
        return keys[:, at].reshape(-1)[: self.head_dim], pair_of_tokens, scales


@pytest.mark.parametrize(("head_dim", "value_dim"), [(33, 33), (64, 20), (6, 16)])
@pytest.mark.parametrize("block_size", [3, 16])
def test_the_kernels_write_the_references_bits(
    ops: CpuOps, dtype: torch.dtype, head_dim: int, value_dim: int, block_size: int
) -> None:
    """Codes and scales of keys less an offset, and of values."""
    k = torch.stack((rows(head_dim), rows(head_dim).flip(0)), 1).to(dtype)
    v = torch.stack((rows(value_dim).flip(0), rows(value_dim)), 1).to(dtype)
    tokens = len(k)
    offset = torch.randn(2, head_dim)
    blocks = -(-tokens // block_size)
    step = StepInputs.build([[0] * tokens], [0], [torch.randperm(blocks).tolist()], block_size)
    cache = empty_cache(ops, blocks, block_size, 2, head_dim, torch.int8, value_dim, offset)
    as_is(ops, cache, k, v, step.slot_mapping)
    held = Held(2, head_dim, value_dim, block_size, cache.buffer)
    key_codes, key_scales = quantised(k.float() - offset)
    value_codes, value_scales = quantised(v)
    for token, slot in enumerate(step.slot_mapping.tolist()):
        for head in range(2):
            key, value, scales = held.read(slot, head)
            assert torch.equal(key, key_codes[token, head])
            assert torch.equal(value, value_codes[token, head])
            expected = torch.stack((key_scales[token, head], value_scales[token, head]))
            assert torch.equal(scales, bits(expected))


def test_keys_are_not_rounded_before_they_are_quantised(backend: Ops) -> None:
    """A rotated bfloat16 key becomes the codes of the float32 one."""
    k = torch.randn(5, 1, 8).bfloat16()
    angles = torch.randn(5, 4)
    turn = Rotation(angles.cos(), angles.sin())
    wide = REF.rotary(k.float(), turn)
    assert not torch.equal(quantised(wide)[0], quantised(wide.bfloat16())[0])
    slots = torch.arange(5)
    outs = []
    for keys, rotation in ((k, turn), (wide, Rotation(torch.empty(5, 0), torch.empty(5, 0)))):
        cache = empty_cache(backend, 1, 16, 1, 8, torch.int8)
        rows_TI = side_by_side(keys, keys, k.to(keys.dtype))
        backend.rotate_and_store(rows_TI, rotation, cache, slots)
        plan = backend.plan_attention(StepInputs.build([[0]], [4], [[0]], 16), 16)
        outs.append(backend.paged_attention(torch.ones(1, 1, 8), cache, plan, 0.3))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Exact:
    """A row's output over codes in float64, and what the kernels may be off by."""

    out: Floats
    bound: Floats


def exact_row(
    q: Floats,
    keys: tuple[Floats, Floats],
    values: tuple[Floats, Floats],
    offset: Floats,
    first: int,
    scale: float,
    softcap: float | None,
    sink: float | None,
) -> Exact:
    """One query over codes (S, N) and scales (S,) from key `first` on, offset added back.

    The kernels quantise the query to 16 bits, and the weights of a tile of keys times their values'
    scales; that is what the bound is made of, beside float32's rounding.
    """
    codes, scales = keys
    value_codes, value_scales = values
    k = codes * scales[:, None]
    v = value_codes * value_scales[:, None]
    most = min(32767, (2**31 - 1) // 127 // q.size)
    score_error = scale * np.abs(k).sum(1).max() * np.abs(q).max() / most / 2
    scores = (k + offset) @ q * scale
    rounded = 8 * 2.0**-23 * scale * (np.abs(k) + np.abs(offset)).max() * np.abs(q).sum()
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    rounded += 4 * 2.0**-23 * np.abs(scores).max() + 2.0**-20
    every = scores if sink is None else np.append(scores, sink)
    weights = np.exp(scores - every.max())
    total = np.exp(every - every.max()).sum()
    spread = np.expm1(2 * (score_error + rounded))
    bound = spread * (weights @ np.abs(v)) / total
    numbers = np.arange(first, first + len(k)) // TILE
    for tile in np.unique(numbers):
        here = numbers == tile
        step = (weights[here] * value_scales[here]).max() / 32767
        bound += 0.51 * step * np.abs(value_codes[here]).sum(0) / total
    return Exact(weights @ v / total, bound)


def double(x: Tensor) -> Floats:
    return x.double().numpy()


def assert_attends(ops: Ops, dtype: torch.dtype, case: dict[str, Any], lengths: list[int]) -> None:
    """A step of a few rows of each sequence against float64 over the codes of its keys."""
    heads, kv_heads, head_dim = case["heads"]
    value_dim = case["value_dim"]
    new = [min(n, case["new"]) for n in lengths]
    offset = 3 * torch.randn(kv_heads, head_dim) * case["offset"]
    keys = [(torch.randn(n, kv_heads, head_dim) + offset).to(dtype) for n in lengths]
    values = [torch.randn(n, kv_heads, value_dim).to(dtype) for n in lengths]
    q = torch.randn(sum(new), heads, head_dim).to(dtype)
    sinks = torch.randn(heads) if case["sinks"] else None
    scale = head_dim**-0.5
    out = Sequences(keys, values, new).attend(
        ops,
        q,
        scale,
        case["block_size"],
        window=case["window"],
        kv_dtype=torch.int8,
        key_offset_GN=offset if case["offset"] else None,
        softcap=case["softcap"],
        sinks_H=sinks,
    )
    assert out.dtype == dtype and out.shape == (*q.shape[:2], value_dim)
    row = 0
    for k, v, count in zip(keys, values, new, strict=True):
        held = [tuple(map(double, quantised(x))) for x in (k.float() - offset, v)]
        for position in range(len(k) - count, len(k)):
            start = 0 if case["window"] is None else max(0, position - case["window"] + 1)
            seen = slice(start, position + 1)
            for head in range(0, heads, 1 + heads // 8):
                group = head // (heads // kv_heads)
                (k_codes, k_scales), (v_codes, v_scales) = held
                exact = exact_row(
                    double(q[row, head]),
                    (k_codes[seen, group], k_scales[seen, group]),
                    (v_codes[seen, group], v_scales[seen, group]),
                    double(offset[group]),
                    start,
                    scale,
                    case["softcap"],
                    None if sinks is None else float(sinks[head]),
                )
                # Twice: in torch's own sums on the reference, and by the last rounding.
                last = 2 * ROUNDOFF[dtype] * np.abs(exact.out) + 1e-6
                assert_within(
                    out[row, head],
                    torch.from_numpy(exact.out),
                    torch.from_numpy(exact.bound + last),
                )
            row += 1


def test_attention_over_codes(backend: Ops, dtype: torch.dtype) -> None:
    """Chunks and decodes with lengths around the ends of blocks and tiles, windows, caps, sinks,
    offsets, odd sizes; where nothing was written scales are NaN."""
    rng = random.Random(0)
    shapes = [(4, 4, 6), (8, 2, 64), (7, 1, 80), (71, 1, 64), (4, 1, 128), (1, 1, 8), (6, 3, 33)]
    for i in range(14):
        heads = shapes[i % 7]
        b = rng.choice((1, 3, 7, 8, 16, 24, 64))
        case = {
            "heads": heads,
            "value_dim": heads[2] if i % 3 else rng.choice((6, 16, 33, 80)),
            "block_size": b,
            "window": rng.choice((None, None, 1, 5, 64, 67)),
            "softcap": rng.choice((None, None, 5.0)),
            "sinks": rng.random() < 0.3,
            "offset": rng.choice((0, 0, 1)),
            "new": rng.choice((1, 1, 5, 20)),
        }
        lengths = rng.sample([1, 2, b, b + 1, 2 * b - 1, 63, 64, 65, 128, 130, 33, 200], 3)
        assert_attends(backend, dtype, case, lengths)


@pytest.mark.parametrize("window", [None, 1500])
def test_long_contexts(ops: CpuOps, dtype: torch.dtype, window: int | None) -> None:
    """Around the ends of the splits, which are combined in order."""
    for length, block_size in ((1023, 16), (1025, 64), (2049, 7)):
        case = {
            "heads": (4, 1, 64),
            "value_dim": 64,
            "block_size": block_size,
            "window": window,
            "softcap": None,
            "sinks": window is None,
            "offset": 1,
            "new": 2,
        }
        assert_attends(ops, dtype, case, [length, 50])


def test_an_offset_changes_nothing_but_what_is_rounded() -> None:
    """In real numbers softmax does not see it, but for sinks and caps, where it is added back: with
    keys that codes hold exactly, whatever they are less, the outputs are the same."""
    steps = torch.randint(-100, 100, (70, 2, 16)) / 64
    steps[..., 0] = 127 / 64  # so that the scale is 1 / 64, and no code is rounded
    values = torch.randint(-100, 100, (70, 2, 16)) / 64
    values[..., 0] = 127 / 64
    q = torch.randn(3, 4, 16)
    offset = torch.randint(-2000, 2000, (2, 16)) / 64
    sinks = torch.randn(4)
    for options in ({}, {"sinks_H": sinks}, {"softcap": 3.0}, {"softcap": 3.0, "sinks_H": sinks}):
        plain = Sequences([steps + offset], [values], [3])
        exact = plain.attend(REF, q.double(), 0.2, 16, **options)
        for ops in (REF, *(level(isa, 1) for isa in LEVELS)):
            out = plain.attend(
                ops, q, 0.2, 16, kv_dtype=torch.int8, key_offset_GN=offset, **options
            )
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-4)


def test_what_is_lost_is_bounded_by_the_scales(backend: Ops, dtype: torch.dtype) -> None:
    """Beside attention over the keys and values themselves, in float64."""
    lengths, new = [200, 65], [1, 5]
    keys = [torch.randn(n, 2, 64).to(dtype) for n in lengths]
    values = [torch.randn(n, 2, 64).to(dtype) for n in lengths]
    q = torch.randn(sum(new), 4, 64).to(dtype)
    out = Sequences(keys, values, new).attend(backend, q, 0.125, 16, kv_dtype=torch.int8)
    wide = [k.double() for k in keys], [v.double() for v in values]
    exact = Sequences(*wide, new).attend(REF, q.double(), 0.125, 16)
    terms = Sequences(wide[0], [v.abs() for v in wide[1]], new).attend(REF, q.double(), 0.125, 16)
    k_scale, v_scale = (max(quantised(x)[1].max().item() for x in xs) for xs in (keys, values))
    score_error = 0.125 * q.double().abs().sum(-1, keepdim=True) * k_scale / 2
    bound = torch.expm1(2 * score_error) * terms + v_scale / 2
    assert_within(out, exact, bound + 3 * ROUNDOFF[dtype] * terms + 1e-4)
    assert (out.double() - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -1e30])
def test_who_sees_a_row_that_no_codes_hold_gets_nan(
    backend: Ops, dtype: torch.dtype, of: str, wrong: float
) -> None:
    """And, of the kernels, nobody else: not the rows before it, not another head's, not those whose
    window has passed."""
    k, v = torch.randn(2, 90, 2, 16).to(dtype).unbind()
    (k if of == "keys" else v)[70, 1, 3] = wrong
    q = torch.randn(90, 2, 16).to(dtype)
    out = Sequences([k], [v], [90]).attend(backend, q, 0.25, 16, window=10, kv_dtype=torch.int8)
    sees = torch.zeros(90, 2, dtype=torch.bool)
    sees[70:80, 1] = True
    assert out[sees].isnan().all()
    assert backend is REF or out[~sees].isfinite().all()


def test_a_query_that_is_no_number_gives_none(backend: Ops, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 20, 1, 16).to(dtype).unbind()
    q = torch.randn(3, 2, 16).to(dtype)
    q[1, 0, 5] = torch.nan
    q[2, 1] = 0
    out = Sequences([k], [v], [3]).attend(backend, q, 0.25, 16, kv_dtype=torch.int8)
    assert out[1, 0].isnan().all()
    out[1, 0] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_every_instruction_set_with_fused_sums_has_the_same_bits(dtype: torch.dtype) -> None:
    """Sums of codes are integers; all else is done in one order."""
    lengths, new = [300, 64, 1100], [7, 1, 3]
    keys = [torch.randn(n, 2, 64).to(dtype) for n in lengths]
    values = [torch.randn(n, 2, 80).to(dtype) for n in lengths]
    q = torch.randn(sum(new), 8, 64).to(dtype)
    outs = [
        Sequences(keys, values, new).attend(level(isa, 2), q, 0.125, 16, kv_dtype=torch.int8)
        for isa in LEVELS
        if isa != "portable"
    ]
    for out in outs:
        assert torch.equal(bits(out), bits(outs[0]))


def test_a_block_takes_half(backend: Ops) -> None:
    wide = backend.cache_bytes_per_block(key_value_spec(8, 128, torch.bfloat16), 16)
    narrow = backend.cache_bytes_per_block(key_value_spec(8, 128, torch.int8), 16)
    assert narrow == wide / 2 + 16 * 8 * 2 * 2
    assert key_value_spec(8, 128, torch.int8).bytes_per_token * 16 == narrow


def test_what_does_not_go_together_is_refused(backend: Ops) -> None:
    k = Plane("k", (2, 8), torch.int8)
    v = Plane("v", (2, 8), torch.int8)
    scales = tuple(Plane(name, (2,), torch.float16) for name in ("k_scale", "v_scale"))
    for planes, message in (
        ((k, v), "do not go with the scales"),
        ((k, v, *(Plane(s.name, (3,), s.dtype) for s in scales)), "do not go with the scales"),
        ((k, v, scales[1], scales[0]), "keeps planes k and v"),
    ):
        with pytest.raises(ValueError, match=message):
            key_value_planes(CacheSpec(planes))
    memory = torch.zeros(2**12, dtype=torch.uint8)
    with pytest.raises(ValueError, match="held as they are, less no offset"):
        backend.make_cache(memory, key_value_spec(2, 8, torch.float32), 4, torch.zeros(2, 8))
    for offset in (torch.zeros(2, 9), torch.zeros(2, 8).double()):
        with pytest.raises(ValueError, match="keys' offset is"):
            backend.make_cache(memory, key_value_spec(2, 8, torch.int8), 4, offset)


def test_it_is_declared(ops: CpuOps, dtype: torch.dtype) -> None:
    for operation in (Operation.ROTATE_AND_STORE, Operation.PAGED_ATTENTION):
        use = Use(operation, dtype, frozenset({Feature.INT8_CACHE}))
        found = ops.capability(use)
        assert found is not None and found.by == ops.name
        assert found.batch_invariant and found.recorded
        reference = REF.capability(use)
        assert reference is not None and not reference.batch_invariant
