"""Recurrent layers in Triton beside loops and plain PyTorch, however sequences are cut into
steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from covering import each_value
from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops.config import ChannelDecay, DeltaSizes, GateFunction, HeadGates, ScanSizes
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import TritonOps
from moebius.ops.triton.kernels import recurrent as kernels
from ops.recurrent_layers import (
    AnyLayer,
    KimiLayer,
    Layer,
    MambaLayer,
    alone,
    naive_conv,
    naive_delta,
    naive_kimi,
    naive_scan,
    served,
    step_of,
)

OPS = TritonOps()
REF = ReferenceOps()
DTYPES = [torch.bfloat16, torch.float32]
ALL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Fewer rows than there are taps, and more.
ROWS = [5, 1, 0, 2]
SLOTS = [4, 0, 3, 2]
GATES: list[GateFunction] = ["silu", "sigmoid", "softplus", "identity"]

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(DEVICE == "cuda", reason="the layers of these tests lie on the CPU"),
]


def near(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(found.dtype, 2.0**-18)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def parts(rows: list[int]) -> list[slice]:
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("columns", "taps"), [(1, 1), (7, 2), (300, 4)])
def test_causal_conv(columns: int, taps: int, kept: bool, dtype: torch.dtype) -> None:
    x = torch.randn(sum(ROWS), columns + 5).to(dtype)
    weight = torch.randn(columns, taps).to(dtype if taps % 2 else torch.float32)
    bias = torch.randn(columns).to(dtype) if kept else None
    # Longer than they are read: planes of a state may lie apart.
    before = torch.randn(6, taps, columns).to(dtype)[:, : taps - 1]
    state = before.clone().new_empty(6, taps, columns)[:, : taps - 1].copy_(before)
    slots = SLOTS if kept else None
    step = step_of(ROWS, [0] * 4, slots)
    out = OPS.causal_conv(x, 2, weight, state, OPS.plan_states(step), bias, silu=False)
    again = state.copy_(before)
    near(
        OPS.causal_conv(x, 2, weight, again, OPS.plan_states(step), bias),
        torch.nn.functional.silu(out.float()).to(dtype),
    )
    for slot, part in zip(SLOTS, parts(ROWS), strict=True):
        own = x[part, 2 : 2 + columns]
        at_first = before[slot] if kept else torch.zeros_like(before[slot])
        if len(own):
            near(out[part], naive_conv(own, weight, at_first, bias))
        if kept:
            whole = torch.cat((at_first, own))
            assert torch.equal(state[slot], whole[len(whole) - taps + 1 :])
    untouched = [1, 5] if kept else range(6)
    assert all(torch.equal(state[slot], before[slot]) for slot in untouched)
    empty = OPS.plan_states(step_of([], [], [] if kept else None))
    assert OPS.causal_conv(x[:0], 2, weight, state, empty, bias).shape == (0, columns)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    each_value(
        [DeltaSizes(1, 1, 1, 1), DeltaSizes(2, 4, 7, 33), DeltaSizes(2, 4, 16, 16, tiled=True)],
        DTYPES,
    ),
    ids=str,
)
def test_gated_delta(sizes: DeltaSizes, kept: bool, dtype: torch.dtype) -> None:
    heads = sizes.value_heads
    qkv = torch.randn(sum(ROWS), sizes.qkv_size).to(dtype)
    gates = (3 * torch.randn(sum(ROWS), 2 * heads + 3)).to(dtype)
    decay, dt_bias = -torch.randn(heads).exp(), torch.randn(heads)
    before = torch.randn(6, heads, sizes.key_dim, sizes.value_dim)
    state = before.clone()
    plan = OPS.plan_states(step_of(ROWS, [0] * 4, SLOTS if kept else None))
    out = OPS.gated_delta(qkv, gates, 3, decay, dt_bias, state, plan, sizes)
    assert out.dtype == dtype
    for slot, part in zip(SLOTS, parts(ROWS), strict=True):
        at_first = before[slot].double() if kept else torch.zeros_like(before[slot]).double()
        if qkv[part].numel():
            exact, after = naive_delta(qkv[part], gates[part], 3, decay, dt_bias, at_first, sizes)
            near(out[part], exact)
            near(state[slot], after if kept else before[slot])
    untouched = [1, 3, 5] if kept else range(6)
    assert all(torch.equal(state[slot], before[slot]) for slot in untouched)
    empty = OPS.plan_states(step_of([], [], None))
    found = OPS.gated_delta(qkv[:0], gates[:0], 3, decay, dt_bias, None, empty, sizes)
    assert found.shape == (0, sizes.out_size)


DECAYS = [
    ChannelDecay(),
    ChannelDecay(rounded=True),
    ChannelDecay(lower=-5.0),
    ChannelDecay(lower=-0.5, rounded=True),
]


@pytest.mark.parametrize(
    ("decay", "sizes", "dtype"),
    each_value(DECAYS, [DeltaSizes(1, 2, 5, 33), DeltaSizes(2, 4, 16, 3, tiled=True)], ALL_DTYPES),
    ids=str,
)
@pytest.mark.parametrize("kept", [True, False])
def test_kimi_delta(decay: ChannelDecay, sizes: DeltaSizes, dtype: torch.dtype, kept: bool) -> None:
    heads = sizes.value_heads
    qkv = torch.randn(sum(ROWS), sizes.qkv_size).to(dtype)
    b = torch.randn(sum(ROWS), heads + 2).to(dtype)
    f = (3 * torch.randn(sum(ROWS), heads * sizes.key_dim + 1)).to(dtype)
    rates, bias = -torch.randn(heads).exp(), torch.randn(heads, sizes.key_dim)
    before = torch.randn(6, heads, sizes.key_dim, sizes.value_dim)
    state = before.clone()
    plan = OPS.plan_states(step_of(ROWS, [0] * 4, SLOTS if kept else None))
    out = OPS.kimi_delta(qkv, b, 2, f, 1, rates, bias, state, plan, sizes, decay)
    for slot, part in zip(SLOTS, parts(ROWS), strict=True):
        if not len(qkv[part]):
            continue
        at_first = before[slot] if kept else torch.zeros_like(before[slot])
        f_LHK = f[part, 1:].unflatten(1, (heads, sizes.key_dim))
        exact, after = naive_kimi(
            qkv[part], b[part, 2:], f_LHK, rates, bias, at_first.double(), sizes, decay
        )
        near(out[part], exact)
        near(state[slot], after if kept else before[slot])
    assert torch.equal(state[5], before[5])


SCANS = [ScanSizes(1, 1, 1), ScanSizes(4, 33, 7, groups=2), ScanSizes(2, 16, 16)]


@pytest.mark.parametrize(("sizes", "dtype"), each_value(SCANS, ALL_DTYPES), ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_selective_scan(sizes: ScanSizes, dtype: torch.dtype, kept: bool) -> None:
    heads = sizes.heads
    xbc = torch.randn(sum(ROWS), sizes.xbc_size).to(dtype)
    steps = (3 * torch.randn(sum(ROWS), heads + 2)).to(dtype)
    rates, bias, skip = -torch.randn(heads).exp(), torch.randn(heads), torch.randn(heads)
    before = torch.randn(6, heads, sizes.state_dim, sizes.head_dim)
    state = before.clone()
    plan = OPS.plan_states(step_of(ROWS, [0] * 4, SLOTS if kept else None))
    out = OPS.selective_scan(xbc, steps, 2, rates, bias, skip, state, plan, sizes)
    for slot, part in zip(SLOTS, parts(ROWS), strict=True):
        if not len(xbc[part]):
            continue
        at_first = before[slot] if kept else torch.zeros_like(before[slot])
        exact, after = naive_scan(
            xbc[part], steps[part, 2:], rates, bias, skip, at_first.double(), sizes
        )
        near(out[part], exact)
        near(state[slot], after if kept else before[slot])
    assert torch.equal(state[5], before[5])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_grouped_norm(dtype: torch.dtype) -> None:
    x = torch.randn(3, 66).to(dtype)
    gates = (10 * torch.randn(3, 70)).to(dtype)
    for weight in (torch.randn(66), torch.randn(66).to(dtype)):
        for groups in (1, 6):
            wanted = REF.grouped_norm(x, gates, 4, weight, 1e-6, groups)
            near(OPS.grouped_norm(x, gates, 4, weight, 1e-6, groups), wanted)
    assert OPS.grouped_norm(x[:0], gates[:0], 4, weight, 1e-6, 2).shape == (0, 66)
    with pytest.raises(ValueError, match="66 columns are no 4 groups"):
        OPS.grouped_norm(x, gates, 4, weight, 1e-6, 4)


@pytest.mark.parametrize(("function", "dtype"), each_value(GATES, ALL_DTYPES), ids=str)
@pytest.mark.parametrize("single", [True, False])
def test_gate_heads(single: bool, function: GateFunction, dtype: torch.dtype) -> None:
    """Of heads that lie apart, as gates do."""
    x = torch.randn(3, 5, 9).to(dtype)[..., 2:]
    gates = (3 * torch.randn(3, 50)).to(dtype)
    at = HeadGates(3, 9, single, function)
    wanted = REF.gate_heads(x, gates, at)
    found = OPS.gate_heads(x, gates, at)
    if dtype == torch.float32:
        near(found, wanted)
    else:
        # A gate may be its neighbour where its rounding was a close thing.
        assert (found != wanted).float().mean() < 0.02
        torch.testing.assert_close(found, wanted, rtol=2.0**-7, atol=2.0**-10)
    assert OPS.gate_heads(x[:0], gates[:0], at).shape == (0, 5, 7)
    with pytest.raises(ValueError, match="are not all of 50"):
        OPS.gate_heads(x, gates, HeadGates(20, 9, single, function))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_gated_norm(gate: GateFunction, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * 33).to(dtype)
    gates = (10 * torch.randn(3, 70)).to(dtype)
    for weight in (torch.randn(33), torch.randn(33).to(dtype)):
        wanted = REF.gated_norm(x, gates, 4, weight, 1e-6, gate)
        near(OPS.gated_norm(x, gates, 4, weight, 1e-6, gate), wanted)
    assert OPS.gated_norm(x[:0], gates[:0], 4, weight, 1e-6, gate).shape == (0, 66)


def test_softplus_of_any_number() -> None:
    """Small ones are small, not zero: their own error counts."""
    x = torch.linspace(-30, 40, 512).view(1, -1)
    ones = torch.ones(1, 512)
    found = OPS.gated_norm(ones, x, 0, torch.ones(512), 0.0, "softplus")
    exact = x.double().exp().log1p().float()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        Layer(DeltaSizes(1, 2, 5, 34), taps=4, dtype=torch.bfloat16),
        Layer(DeltaSizes(1, 2, 5, 34), taps=4, dtype=torch.float32),
        KimiLayer(DeltaSizes(2, 2, 4, 8), ChannelDecay(), taps=3, dtype=torch.float16),
        MambaLayer(ScanSizes(2, 5, 4, 2), taps=3, dtype=torch.float32),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.dtype}",
)
def test_a_sequence_is_itself_however_it_is_cut(layer: AnyLayer) -> None:
    """In steps of any size, in any slot and company: promise P1, by value."""
    inputs = [layer.rows(count) for count in (6, 1, 3)]
    outs, states = served(layer, inputs, 1, lambda _: OPS)
    for x, out, kept in zip(inputs, outs, states, strict=True):
        wanted, after = alone(layer, OPS, x)
        assert torch.equal(out, wanted)
        assert torch.equal(kept.conv, after.conv) and torch.equal(kept.delta, after.delta)


def test_what_falls_back_takes_our_plans() -> None:
    """Of documents, whose states are nowhere kept, in a dtype that has no kernels."""
    layer = KimiLayer(DeltaSizes(2, 2, 4, 8), ChannelDecay(), taps=3, dtype=torch.float64)
    x = layer.rows(7)
    found = layer(OPS, x, None, OPS.plan_documents([0, 3, 3, 7]))
    near(found, layer(REF, x, None, REF.plan_documents([0, 3, 3, 7])))


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(1, 8)
    weight = torch.zeros(4, 3)
    plan = OPS.plan_states(step_of([1], [0], [0]))
    for state in (torch.zeros(1, 2, 5), torch.zeros(1, 2, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"they must be \(2, 4\) in torch.float32"):
            OPS.causal_conv(x, 0, weight, state, plan)
    with pytest.raises(ValueError, match="none are given"):
        OPS.causal_conv(x, 0, weight, None, plan)
    with pytest.raises(ValueError, match="not in order"):
        OPS.causal_conv(x, 0, weight, torch.zeros(1, 4, 2).mT, plan)
    with pytest.raises(ValueError, match="4 columns from 5 are not all of 8"):
        OPS.causal_conv(x, 5, weight, torch.zeros(1, 2, 4), plan)
    with pytest.raises(ValueError, match="8 columns are no heads of 3"):
        OPS.gated_norm(x, x, 0, torch.zeros(3), 1e-6)
    with pytest.raises(TypeError, match="another backend"):
        OPS.causal_conv(x, 0, weight, None, REF.plan_states(step_of([1], [0], [0])))


@pytest.mark.exhaustive
def test_kernels_compile() -> None:
    sizes = DeltaSizes(16, 32, 128, 128)
    dtype = torch.bfloat16
    with launches() as seen:
        for slots in ([0, 1], None):
            layer = Layer(sizes, 4, dtype)
            plan = OPS.plan_states(step_of([3, 1], [0, 0], slots))
            x = torch.zeros(4, layer.width, dtype=dtype)
            conv = torch.zeros(2, 3, sizes.qkv_size, dtype=dtype)
            delta = torch.zeros(2, *layer.state)
            qkv = OPS.causal_conv(x, 0, layer.conv_weight, conv, plan, conv[0, 0])
            at = layer.gates_at
            out = OPS.gated_delta(qkv, x, at, layer.decay, layer.dt_bias, delta, plan, sizes)
        OPS.gated_norm(out, x, 0, layer.norm, 1e-6)
        OPS.gated_norm(out, x, 0, layer.norm.float(), 1e-6, "softplus")
        OPS.grouped_norm(out, x, 0, out[0], 1e-6, 8)
        OPS.grouped_norm(out, x, 0, out[0].float(), 1e-6, 1)
        heads = out.view(4, 32, 128)
        for function, single in (("sigmoid", False), ("silu", True)):
            OPS.gate_heads(heads, x, HeadGates(0, 128, single, function))
        channels = torch.zeros(4, 32 * 128, dtype=dtype)
        own = DeltaSizes(32, 32, 128, 128)
        qkv = torch.zeros(4, own.qkv_size, dtype=dtype)
        for decay in DECAYS[1:3]:
            bias = torch.zeros(32, 128)
            kept = (delta, plan, own, decay)
            OPS.kimi_delta(qkv, x, 0, channels, 0, layer.decay, bias, *kept)
        mamba = ScanSizes(8, 64, 128, 2)
        for scan_dtype in (dtype, torch.float32):
            xbc = torch.zeros(4, mamba.xbc_size, dtype=scan_dtype)
            rates = [torch.zeros(8)] * 3
            for slots in ([0, 1], None):
                plan = OPS.plan_states(step_of([3, 1], [0, 0], slots))
                kept_scan = torch.zeros(2, 8, 128, 64)
                OPS.selective_scan(xbc, xbc, 0, *rates, kept_scan, plan, mamba)
        tiled = DeltaSizes(1, 2, 64, 40, tiled=True)
        small = torch.zeros(4, tiled.qkv_size)
        OPS.gated_delta(small, small, 0, layer.decay, layer.decay, None, plan, tiled)
    assert_compile(seen, kernels)
