"""Recurrent layers in Triton beside loops and plain PyTorch, however sequences are cut into
steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops.config import ChannelDecay, DeltaSizes, GateFunction
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import TritonOps
from moebius.ops.triton.kernels import recurrent as kernels
from ops.recurrent_layers import KimiLayer, Layer, alone, naive_conv, naive_delta, served, step_of

OPS = TritonOps()
REF = ReferenceOps()
DTYPES = [torch.bfloat16, torch.float32]
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
    tolerance = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-18}[found.dtype]
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [DeltaSizes(1, 1, 1, 1), DeltaSizes(2, 4, 7, 33), DeltaSizes(2, 4, 16, 16, tiled=True)],
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_is_itself_however_it_is_cut(dtype: torch.dtype) -> None:
    """In steps of any size, in any slot and company: promise P1, by value."""
    layer = Layer(DeltaSizes(1, 2, 5, 34), taps=4, dtype=dtype)
    inputs = [layer.rows(count) for count in (6, 1, 3)]
    outs, states = served(layer, inputs, 1, lambda _: OPS)
    for x, out, kept in zip(inputs, outs, states, strict=True):
        wanted, after = alone(layer, OPS, x)
        assert torch.equal(out, wanted)
        assert torch.equal(kept.conv, after.conv) and torch.equal(kept.delta, after.delta)


def test_what_falls_back_takes_our_plans() -> None:
    """Of documents, whose states are nowhere kept: a delta rule that has no kernel, between a
    convolution and a norm that have."""
    layer = KimiLayer(DeltaSizes(2, 2, 4, 8), ChannelDecay(), taps=3, dtype=torch.float32)
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
        tiled = DeltaSizes(1, 2, 64, 40, tiled=True)
        small = torch.zeros(4, tiled.qkv_size)
        OPS.gated_delta(small, small, 0, layer.decay, layer.decay, None, plan, tiled)
    assert_compile(seen, kernels)
