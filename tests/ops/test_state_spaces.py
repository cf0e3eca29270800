"""Selective state spaces (Mamba 2), Kimi's delta rule, and the norm behind gates: as
test_recurrent.py, against plain loops, and the same bits however a sequence is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from covering import each_value
from moebius.errors import ConfigError
from moebius.ops import Operation, Ops, Use
from moebius.ops.config import ChannelDecay, DeltaSizes, ScanSizes
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.sources import StepSource
from moebius.ops.steps import StateInputs, Step, StepInputs
from ops.levels import LEVELS, ROUNDOFF, assert_within, bits, level
from ops.recurrent_layers import (
    EPS,
    AnyLayer,
    KimiLayer,
    MambaLayer,
    States,
    alone,
    naive_kimi,
    naive_scan,
    served,
    step_of,
)

REF = ReferenceOps()
ROWS = [17, 1, 5, 33, 1]
SCANS = [
    ScanSizes(1, 1, 1),
    ScanSizes(4, 33, 7, 2),
    ScanSizes(3, 64, 16),
    ScanSizes(6, 70, 33, 3),
]
DELTAS = [DeltaSizes(1, 1, 1, 1), DeltaSizes(3, 3, 7, 7), DeltaSizes(2, 2, 33, 70)]
DECAYS = [ChannelDecay(), ChannelDecay(-5.0, rounded=True), ChannelDecay(rounded=True)]

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module", params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Ops:
    return REF if request.param == "reference" else level(request.param, threads=2)


def parts(rows: list[int]) -> Iterator[slice]:
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
    return (slice(start, stop) for start, stop in pairwise(starts))


def slots_of(count: int) -> list[int]:
    return torch.randperm(count + 2).tolist()[:count]


def untouched(state: Tensor, before: Tensor, slots: list[int]) -> bool:
    others = [slot for slot in range(len(before)) if slot not in slots]
    return torch.equal(state[others], before[others])


# --- against loops ---


@pytest.mark.parametrize("sizes", SCANS, ids=str)
def test_selective_scan(backend: Ops, dtype: torch.dtype, sizes: ScanSizes) -> None:
    xbc = torch.randn(sum(ROWS), sizes.xbc_size).to(dtype)
    dts = 3 * torch.randn(sum(ROWS), sizes.heads + 3)
    dts[::7] *= 20  # far beyond where softplus is linear
    dts = dts.to(dtype)
    decay, dt_bias, skip = -torch.randn(sizes.heads).exp(), *torch.randn(2, sizes.heads)
    slots = slots_of(len(ROWS))
    before = torch.randn(len(ROWS) + 2, sizes.heads, sizes.state_dim, sizes.head_dim)
    state = before.clone()
    plan = backend.plan_states(step_of(ROWS, [3] * len(ROWS), slots))
    out = backend.selective_scan(xbc, dts, 2, decay, dt_bias, skip, state, plan, sizes)
    assert out.dtype == dtype and out.shape == (sum(ROWS), sizes.out_size)
    for slot, part in zip(slots, parts(ROWS), strict=True):
        own = dts[part, 2 : 2 + sizes.heads]
        exact, after = naive_scan(xbc[part], own, decay, dt_bias, skip, before[slot], sizes)
        size = 1 + after.abs().max().item() * sizes.state_dim
        assert_within(out[part], exact, 1.01 * ROUNDOFF[dtype] * exact.abs() + 1e-5 * size)
        assert_within(state[slot], after, 1e-5 * size)
    assert untouched(state, before, slots)


@pytest.mark.parametrize(("sizes", "decay_of"), each_value(DELTAS, DECAYS), ids=str)
def test_kimi_delta(
    backend: Ops, dtype: torch.dtype, sizes: DeltaSizes, decay_of: ChannelDecay
) -> None:
    heads = sizes.value_heads
    channels = heads * sizes.key_dim
    qkv = torch.randn(sum(ROWS), sizes.qkv_size).to(dtype)
    betas = torch.randn(sum(ROWS), heads + 2).to(dtype)
    f = 3 * torch.randn(sum(ROWS), channels + 4)
    f[::7] *= 20
    f = f.to(dtype)
    decay, dt_bias = -torch.randn(heads).exp(), torch.randn(heads, sizes.key_dim)
    slots = slots_of(len(ROWS))
    before = torch.randn(len(ROWS) + 2, heads, sizes.key_dim, sizes.value_dim)
    state = before.clone()
    plan = backend.plan_states(step_of(ROWS, [3] * len(ROWS), slots))
    out = backend.kimi_delta(qkv, betas, 1, f, 3, decay, dt_bias, state, plan, sizes, decay_of)
    assert out.dtype == dtype and out.shape == (sum(ROWS), sizes.out_size)
    for slot, part in zip(slots, parts(ROWS), strict=True):
        own = f[part, 3 : 3 + channels].unflatten(1, (heads, sizes.key_dim))
        b = betas[part, 1 : 1 + heads]
        exact, after = naive_kimi(qkv[part], b, own, decay, dt_bias, before[slot], sizes, decay_of)
        # Exponents that are rounded to another neighbour differ by a unit in the last place.
        loose = 0.02 if decay_of.rounded and dtype == torch.bfloat16 else 2e-5
        size = 1 + after.abs().max().item()
        assert_within(out[part], exact, 1.01 * ROUNDOFF[dtype] * exact.abs() + loose * size)
        assert_within(state[slot], after, loose * size)
    assert untouched(state, before, slots)


def test_channels_that_decay_alike_are_a_heads_decay(backend: Ops, dtype: torch.dtype) -> None:
    """Kimi's rule with one number for all channels of a head is the gated delta rule."""
    sizes = DeltaSizes(2, 2, 12, 20)
    qkv = torch.randn(30, sizes.qkv_size).to(dtype)
    b, a = torch.randn(2, 30, 2).to(dtype)
    decay, dt_bias = -torch.randn(2).exp(), torch.randn(2)
    plan = backend.plan_documents([0, 30])
    wanted = backend.gated_delta(qkv, torch.cat((b, a), 1), 0, decay, dt_bias, None, plan, sizes)
    f = a.repeat_interleave(12, dim=1)
    biases = dt_bias.unsqueeze(1).expand(2, 12).contiguous()
    found = backend.kimi_delta(
        qkv, b.contiguous(), 0, f, 0, decay, biases, None, plan, sizes, ChannelDecay()
    )
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-2, atol=2e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_grouped_norm(backend: Ops, dtype: torch.dtype, wide: bool) -> None:
    u = ROUNDOFF[dtype]
    for rows, groups, size in ((0, 1, 5), (1, 2, 1), (5, 3, 33), (2, 4, 128)):
        x = torch.randn(rows, groups * size).to(dtype)
        gates = 4 * torch.randn(rows, groups * size + 3).to(dtype)
        weight = torch.randn(groups * size).to(torch.float32 if wide else dtype)
        out = backend.grouped_norm(x, gates, 3, weight, 1e-5, groups)
        g = gates[:, 3:].double()
        gated = (x.double() * g / (1 + (-g).exp())).view(rows, groups, size)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
        exact = normed.flatten(1) * weight.double()
        rounded = 1.01 if wide else 2.03
        assert_within(out, exact, (rounded * u + (size / 32 + 60) * 2.0**-24) * exact.abs())


# --- the same bits ---


def layers(dtype: torch.dtype) -> list[AnyLayer]:
    return [
        MambaLayer(ScanSizes(4, 40, 24, 2), 4, dtype),
        MambaLayer(ScanSizes(2, 70, 17), 3, dtype),
        KimiLayer(DeltaSizes(3, 3, 24, 24), ChannelDecay(), 4, dtype),
        KimiLayer(DeltaSizes(2, 2, 17, 70), ChannelDecay(-5.0, rounded=True), 2, dtype),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("isa", LEVELS)
def test_bits_do_not_know_steps_nor_processors(isa: str, dtype: torch.dtype, which: int) -> None:
    layer = layers(dtype)[which]
    inputs = [layer.rows(n) for n in (1, 40, 3, 64, 18)]
    wanted = [alone(layer, level(LEVELS[0], 1), x) for x in inputs]
    for seed in range(2):
        outs, kept = served(layer, inputs, seed, lambda step: level(isa, 1 + step % 3))
        for out, after, (exact, exact_after) in zip(outs, kept, wanted, strict=True):
            assert torch.equal(bits(out), bits(exact))
            for state, exact_state in zip(after, exact_after, strict=True):
                assert torch.equal(bits(state), bits(exact_state))


@pytest.mark.parametrize("which", range(4))
def test_chunks_of_every_length(ops: CpuOps, which: int) -> None:
    layer = layers(torch.bfloat16)[which]
    x = layer.rows(65)
    wanted, after = alone(layer, ops, x)
    for length in range(1, 65):
        states = States.random(layer, 1)
        states.clear(0)
        outs = []
        for start in range(0, len(x), length):
            part = x[start : start + length]
            plan = ops.plan_states(step_of([len(part)], [start], [0]))
            outs.append(layer(ops, part, states, plan))
        assert torch.equal(bits(torch.cat(outs)), bits(wanted)), length
        assert torch.equal(states.delta[0], after.delta) and torch.equal(states.conv[0], after.conv)


@pytest.mark.parametrize("which", range(4))
def test_documents_start_from_zeros(backend: Ops, dtype: torch.dtype, which: int) -> None:
    layer = layers(dtype)[which]
    lengths = [4, 1, 30]
    x = layer.rows(sum(lengths))
    packed = layer(backend, x, None, backend.plan_documents([0, 4, 5, 35]))
    for part in parts(lengths):
        one, _ = alone(layer, backend, x[part])
        if backend is REF:
            torch.testing.assert_close(one, packed[part])
        else:
            assert torch.equal(bits(one), bits(packed[part]))


@pytest.mark.parametrize("which", range(4))
def test_steps_of_nothing(backend: Ops, which: int) -> None:
    layer = layers(torch.float32)[which]
    states = States.random(layer, 2)
    before = States(*(state.clone() for state in states))
    out = layer(backend, layer.rows(0), states, backend.plan_states(step_of([], [], [])))
    assert len(out) == 0
    assert all(map(torch.equal, states, before))


def _embedded(ops: CpuOps, layer: AnyLayer, table: Tensor, states: States, step: Step) -> Tensor:
    x = ops.embed(step.input_ids, table)
    return layer(ops, x, states, ops.plan_states(step))


def test_recorded_steps_keep_every_bit(dtype: torch.dtype) -> None:
    ops = CpuOps(2)
    for layer in layers(dtype):
        table = layer.rows(50)
        states = States.random(layer, 6)

        compute = partial(_embedded, ops, layer, table, states)

        program = ops.record(compute, StepSource(24, 0), "cpu")
        assert program.trace.recorded and program.trace.segments == 1
        mamba = isinstance(layer, MambaLayer)
        named = ("selective_scan", "grouped_norm") if mamba else ("kimi_delta", "gated_norm")
        assert {Use(Operation(name), dtype) for name in named} <= program.trace.uses
        own = StateInputs([4, 1], (), (), ())
        step = StepInputs.build([[1, 2, 3], [7]], [5, 5], None, 1, states=own)
        held = [state.clone() for state in states]
        found = program.run(step).clone()
        after = [state.clone() for state in states]
        for state, at_first in zip(states, held, strict=True):
            state.copy_(at_first)
        assert torch.equal(bits(found), bits(compute(step)))
        assert all(map(torch.equal, states, after))


def test_the_reference_has_the_gradients_of_the_loop() -> None:
    sizes = ScanSizes(2, 3, 5)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [torch.randn(9, sizes.xbc_size), torch.randn(9, 2), -torch.rand(2)]
        leaves += [torch.randn(2), torch.randn(2)]
        wanted = torch.randn(9, sizes.out_size)
        mine = [x.clone().requires_grad_() for x in leaves]
        plan = REF.plan_documents([0, 9])
        xbc, dts, *of_heads = mine
        (REF.selective_scan(xbc, dts, 0, *of_heads, None, plan, sizes) * wanted).sum().backward()
        exact = [x.clone().requires_grad_() for x in leaves]
        zeros = torch.zeros(2, 5, 3)
        (naive_scan(*exact, zeros, sizes)[0] * wanted).sum().backward()
        for one, other in zip(mine, exact, strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


# --- bad input ---

OPS = CpuOps(1)
SCAN = ScanSizes(2, 8, 4)
MAMBA = MambaLayer(SCAN, 4, torch.float32)
HELD = torch.randn(3, 2, 4, 8)


def scan(**changed: Any) -> Tensor:
    plan = OPS.plan_states(step_of([1, 1], [0, 0], [0, 1]))
    given: dict[str, Any] = {"xbc_TC": torch.randn(2, SCAN.xbc_size), "dt_TI": torch.randn(2, 2)}
    given |= {"start": 0, "decay_H": MAMBA.decay, "dt_bias_H": MAMBA.dt_bias, "skip_H": MAMBA.skip}
    return OPS.selective_scan(**{**given, "state": HELD, **changed}, plan=plan, sizes=SCAN)


def norm(**changed: Any) -> Tensor:
    given: dict[str, Any] = {"x_TI": torch.randn(2, 6), "gate_TI": torch.randn(2, 6), "start": 0}
    return OPS.grouped_norm(
        **{**given, "weight_I": torch.ones(6), "eps": EPS, "groups": 2, **changed}
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scan(state=None), "states are kept, and none are given"),
        (lambda: scan(state=HELD[:1]), "slot 1 is none of 1"),
        (lambda: scan(state=HELD.bfloat16()), r"they must be \(2, 4, 8\) in torch.float32"),
        (lambda: scan(state=HELD.transpose(2, 3)), r"they must be \(2, 4, 8\)"),
        (lambda: scan(start=1), "2 columns from 1 are not all of 2"),
        (lambda: scan(dt_TI=torch.randn(2, 2).bfloat16()), "one dtype"),
        (lambda: scan(dt_TI=torch.randn(3, 2)), "time steps"),
        (lambda: scan(xbc_TC=torch.randn(2, 7)), "selective state space's rows"),
        (lambda: scan(xbc_TC=torch.randn(3, SCAN.xbc_size), dt_TI=torch.randn(3, 2)), "3 rows"),
        (lambda: scan(skip_H=torch.randn(3)), "skips of heads"),
        (lambda: scan(decay_H=MAMBA.decay.double()), "want torch.float32"),
        (lambda: norm(groups=4), "6 columns are no 4 groups"),
        (lambda: norm(weight_I=torch.ones(3)), "a norm's weight"),
        (lambda: norm(start=1), "6 columns from 1 are not all of 6"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        call()


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 heads of a Mamba layer are no 2 groups"):
        ScanSizes(5, 8, 8, 2)
    with pytest.raises(ConfigError, match="state_dim of a Mamba layer is 0"):
        ScanSizes(4, 8, 0)
    with pytest.raises(ConfigError, match=r"bounded by 1\.0; it must be below 0"):
        ChannelDecay(1.0)
