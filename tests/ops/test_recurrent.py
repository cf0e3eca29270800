"""Recurrent layers: the reference and the kernels of every instruction set against plain loops, and
the same bits however a sequence is cut, wherever its state lies and whoever is beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import covering
from moebius.errors import ConfigError
from moebius.ops import Operation, Ops, Use
from moebius.ops.config import DeltaSizes, GateFunction, HeadGates
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.sources import StepSource
from moebius.ops.steps import StateInputs, Step, StepInputs
from ops.levels import LEVELS, ROUNDOFF, assert_within, bits, level
from ops.recurrent_layers import (
    EPS,
    Layer,
    States,
    alone,
    naive_conv,
    naive_delta,
    served,
    step_of,
)

REF = ReferenceOps()
# Odd and even sizes, of one vector and several, with and without a rest; heads shared both ways.
SIZES = [
    DeltaSizes(1, 1, 1, 1),
    DeltaSizes(2, 4, 7, 33),
    DeltaSizes(2, 4, 16, 16, tiled=True),
    DeltaSizes(1, 3, 33, 70),
    DeltaSizes(3, 6, 12, 130, tiled=True),
]
# Rows that sequences bring: prompts on both sides of what is made ready at a time, and decodes.
ROWS = [17, 1, 5, 33, 1]
GATES: dict[GateFunction, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softplus": lambda x: x.exp().log1p(),
    "identity": lambda x: x,
}

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module", params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Ops:
    return REF if request.param == "reference" else level(request.param, threads=2)


def slots_of(count: int, spare: int = 2) -> list[int]:
    return torch.randperm(count + spare).tolist()[:count]


def parts(rows: list[int]) -> Iterator[slice]:
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
    return (slice(start, stop) for start, stop in pairwise(starts))


# --- against loops ---


@pytest.mark.parametrize(
    ("sizes", "silu", "kept"),
    covering.pairwise([(1, 1), (7, 2), (16, 4), (50, 3), (700, 4)], [True, False], [True, False]),
)
def test_causal_conv(
    backend: Ops, dtype: torch.dtype, sizes: tuple[int, int], silu: bool, kept: bool
) -> None:
    channels, taps = sizes
    u = ROUNDOFF[dtype]
    x = torch.randn(sum(ROWS), channels + 5).to(dtype)
    weight = torch.randn(channels, taps).to(dtype if taps % 2 else torch.float32)
    bias = torch.randn(channels).to(dtype) if silu else None
    slots = slots_of(len(ROWS))
    before = torch.randn(len(ROWS) + 2, taps - 1, channels).to(dtype)
    state = before.clone() if kept else None
    plan = backend.plan_states(step_of(ROWS, [0] * len(ROWS), slots if kept else None))
    out = backend.causal_conv(x, 2, weight, state, plan, bias, silu=silu)
    assert out.dtype == dtype
    for slot, part in zip(slots, parts(ROWS), strict=True):
        own = x[part, 2 : 2 + channels]
        at_first = before[slot] if kept else torch.zeros_like(before[slot])
        exact = naive_conv(own, weight, at_first, bias)
        sizes = naive_conv(own.abs(), weight.abs(), at_first.abs(), None) + 3
        bound = 1.01 * u * exact.abs() + 2.0**-21 * sizes
        if silu:
            bound, exact = 1.2 * bound + 1.01 * u * exact.abs() + 2.0**-20, GATES["silu"](exact)
        assert_within(out[part], exact, bound)
        if state is not None and taps > 1:
            assert torch.equal(state[slot], torch.cat((at_first, own))[1 - taps :])
    if state is not None:
        others = [slot for slot in range(len(before)) if slot not in slots]
        assert torch.equal(state[others], before[others])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gated_delta(backend: Ops, dtype: torch.dtype, sizes: DeltaSizes) -> None:
    heads = sizes.value_heads
    qkv = torch.randn(sum(ROWS), sizes.qkv_size).to(dtype)
    gates = 3 * torch.randn(sum(ROWS), 2 * heads + 3)
    gates[::7] *= 20  # far beyond where softplus is linear, and where nothing is kept
    gates = gates.to(dtype)
    decay, dt_bias = -torch.randn(heads).exp(), torch.randn(heads)
    slots = slots_of(len(ROWS))
    before = torch.randn(len(ROWS) + 2, heads, sizes.key_dim, sizes.value_dim)
    state = before.clone()
    plan = backend.plan_states(step_of(ROWS, [3] * len(ROWS), slots))
    out = backend.gated_delta(qkv, gates, 2, decay, dt_bias, state, plan, sizes)
    assert out.dtype == dtype and out.shape == (sum(ROWS), sizes.out_size)
    for slot, part in zip(slots, parts(ROWS), strict=True):
        exact, after = naive_delta(qkv[part], gates[part], 2, decay, dt_bias, before[slot], sizes)
        assert_within(out[part], exact, 1.01 * ROUNDOFF[dtype] * exact.abs() + 1e-5)
        assert_within(state[slot], after, 1e-5 * (1 + after.abs().max().item()))
    others = [slot for slot in range(len(before)) if slot not in slots]
    assert torch.equal(state[others], before[others])


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("wide", [False, True])
def test_gated_norm(backend: Ops, dtype: torch.dtype, gate: GateFunction, wide: bool) -> None:
    """wide: the weight is float32, and nothing is rounded but the result."""
    u = ROUNDOFF[dtype]
    for rows, heads, size in ((0, 1, 5), (1, 2, 1), (5, 3, 33), (2, 32, 128)):
        x = torch.randn(rows, heads * size).to(dtype)
        gates = 4 * torch.randn(rows, heads * size + 3).to(dtype)
        weight = torch.randn(size).to(torch.float32 if wide else dtype)
        out = backend.gated_norm(x, gates, 3, weight, 1e-5, gate)
        by_head = x.double().view(rows, heads, size)
        normed = by_head * torch.rsqrt(by_head.square().mean(-1, keepdim=True) + 1e-5)
        exact = (normed * weight.double()).flatten(1) * GATES[gate](gates[:, 3:].double())
        rounded = 1.01 if wide else 3.04
        assert_within(out, exact, (rounded * u + (size / 32 + 40) * 2.0**-24) * exact.abs())


@pytest.mark.parametrize("function", list(GATES))
@pytest.mark.parametrize("single", [False, True])
def test_gate_heads(backend: Ops, dtype: torch.dtype, function: GateFunction, single: bool) -> None:
    for rows, heads, size in ((0, 1, 5), (1, 2, 1), (5, 3, 33), (2, 16, 64)):
        x = torch.randn(rows, heads, size).to(dtype)
        stride = 2 if single else 2 * size
        gates = 4 * torch.randn(rows, 5 + heads * stride).to(dtype)
        out = backend.gate_heads(x, gates, HeadGates(5, stride, single, function))
        width = 1 if single else size
        g = gates[:, 5:].double().unflatten(1, (heads, stride))[..., :width]
        exact = x.double() * GATES[function](g)
        assert_within(out, exact, (2.03 * ROUNDOFF[dtype] + 2.0**-20) * exact.abs())


def test_gates_that_are_far_off(backend: Ops) -> None:
    """Where functions are at their limits, and what is no number stays so."""
    far = torch.tensor([[-torch.inf, -200.0, -30.0, 20.5, 90.0, torch.inf, torch.nan]])
    ones = torch.ones(1, 1, 7)
    for function, limits in {
        "sigmoid": [0, 0, 9.3576e-14, 1, 1, 1],
        "softplus": [0, 0, 9.3576e-14, 20.5, 90, torch.inf],
    }.items():
        out = backend.gate_heads(ones, far, HeadGates(0, 7, function=function)).flatten()  # type: ignore[arg-type]
        torch.testing.assert_close(out[:6], torch.tensor(limits), rtol=1e-5, atol=0)
        assert out[6].isnan()


# --- the same bits ---

LAYERS = [(DeltaSizes(2, 4, 24, 40), 4), (DeltaSizes(1, 2, 17, 70, tiled=True), 3)]


@pytest.mark.parametrize(("sizes", "taps"), LAYERS)
@pytest.mark.parametrize("isa", LEVELS)
def test_bits_do_not_know_steps_nor_processors(
    isa: str, dtype: torch.dtype, sizes: DeltaSizes, taps: int
) -> None:
    """Those of a prompt computed at once, alone, on the first of the instruction sets."""
    layer = Layer(sizes, taps, dtype)
    inputs = [layer.rows(n) for n in (1, 40, 3, 64, 18)]
    wanted = [alone(layer, level(LEVELS[0], 1), x) for x in inputs]
    for seed in range(3):
        outs, kept = served(layer, inputs, seed, lambda step: level(isa, 1 + step % 3))
        for out, after, (exact, exact_after) in zip(outs, kept, wanted, strict=True):
            assert torch.equal(bits(out), bits(exact))
            for state, exact_state in zip(after, exact_after, strict=True):
                assert torch.equal(bits(state), bits(exact_state))


def test_chunks_of_every_length(ops: CpuOps) -> None:
    layer = Layer(*LAYERS[0], torch.bfloat16)
    x = layer.rows(65)
    wanted, after = alone(layer, ops, x)
    for length in range(1, 65):
        states = States.random(layer, 1)
        states.clear(0)
        outs = []
        for start in range(0, len(x), length):
            part = x[start : start + length]
            outs.append(
                layer(ops, part, states, ops.plan_states(step_of([len(part)], [start], [0])))
            )
        assert torch.equal(bits(torch.cat(outs)), bits(wanted)), length
        assert torch.equal(states.delta[0], after.delta) and torch.equal(states.conv[0], after.conv)


def test_documents_start_from_zeros(backend: Ops, dtype: torch.dtype) -> None:
    """Packed, each is as if it were alone with a cleared state; so is a step without states."""
    layer = Layer(*LAYERS[1], dtype)
    lengths = [4, 1, 30]
    x = layer.rows(sum(lengths))
    packed = layer(backend, x, None, backend.plan_documents([0, 4, 5, 35]))
    plan = backend.plan_states(step_of(lengths, [0, 0, 0], None))
    assert torch.equal(layer(backend, x, None, plan), packed)
    for part in parts(lengths):
        states = States.random(layer, 1)
        states.clear(0)
        rows = x[part]
        one = layer(backend, rows, states, backend.plan_states(step_of([len(rows)], [0], [0])))
        if backend is REF:
            torch.testing.assert_close(one, packed[part])
        else:
            assert torch.equal(bits(one), bits(packed[part]))


def test_steps_of_nothing(backend: Ops) -> None:
    layer = Layer(*LAYERS[0], torch.float32)
    states = States.random(layer, 2)
    before = States(*(state.clone() for state in states))
    out = layer(backend, layer.rows(0), states, backend.plan_states(step_of([], [], [])))
    assert out.shape == (0, layer.sizes.out_size)
    assert all(map(torch.equal, states, before))


# --- recorded ---


def test_recorded_steps_keep_every_bit(dtype: torch.dtype) -> None:
    """Each run brings its own sequences and slots; what there is between runs are the states."""
    ops = CpuOps(2)
    layer = Layer(*LAYERS[0], dtype)
    table = layer.rows(50)
    states = States.random(layer, 6)
    plain = States(*(state.clone() for state in states))

    def compute(step: Step) -> Tensor:
        x = ops.embed(step.input_ids, table)
        out = layer(ops, x, states, ops.plan_states(step))
        heads = out.view(len(out), -1, layer.sizes.value_dim)
        return ops.gate_heads(heads, x, HeadGates(1, layer.sizes.value_dim)).flatten(1)

    program = ops.record(compute, StepSource(24, 0), "cpu")
    assert program.trace.recorded and program.trace.segments == 1
    named = ("causal_conv", "gated_delta", "gated_norm", "gate_heads")
    assert {Use(Operation(name), dtype) for name in named} <= program.trace.uses
    held, states = states, plain
    rng = random.Random(0)
    for _ in range(8):
        slots = rng.sample(range(6), rng.randint(1, 3))
        ids = [[rng.randrange(50) for _ in range(rng.choice((1, 1, 7)))] for _ in slots]
        own = StateInputs(slots, (), (), ())
        step = StepInputs.build(ids, [5] * len(ids), None, 1, states=own)
        assert torch.equal(bits(program.run(step)), bits(compute(step)))
    assert all(map(torch.equal, held, plain))


def test_a_trace_needs_no_memory() -> None:
    ops = CpuOps(1)
    layer = Layer(*LAYERS[0], torch.float32)
    table = layer.rows(50)

    def compute(step: Step) -> Tensor:
        return layer(ops, ops.embed(step.input_ids, table), states, ops.plan_states(step))

    states = States.random(layer, 2)
    real = ops.trace(compute, StepSource(24, 0))
    states = States(*(state.to("meta") for state in states))
    assert ops.trace(compute, StepSource(24, 0)) == real and real.recorded


# --- what the reference is for besides ---


def test_the_reference_has_the_gradients_of_the_loop() -> None:
    """Through documents beside one another, of both operations that look back."""
    sizes = DeltaSizes(1, 2, 5, 3)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            torch.randn(12, sizes.qkv_size),
            torch.randn(12, 4),
            torch.randn(sizes.qkv_size, 3),
            -torch.rand(2),
            torch.randn(2),
        ]
        wanted = torch.randn(12, sizes.out_size)
        mine = [x.clone().requires_grad_() for x in leaves]
        x, gates, weight, decay, dt_bias = mine
        plan = REF.plan_documents([0, 7, 8, 12])
        qkv = REF.causal_conv(x, 0, weight, None, plan)
        out = REF.gated_delta(qkv, gates, 0, decay, dt_bias, None, plan, sizes)
        (out * wanted).sum().backward()
        exact = [x.double().requires_grad_() for x in leaves]
        x, gates, weight, decay, dt_bias = exact
        outs = []
        for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
            zeros = torch.zeros(2, sizes.qkv_size)
            qkv = GATES["silu"](naive_conv(x[part], weight, zeros, None))
            at_first = torch.zeros(2, 5, 3)
            outs.append(naive_delta(qkv, gates[part], 0, decay, dt_bias, at_first, sizes)[0])
        (torch.cat(outs) * wanted).sum().backward()
        for one, other in zip(mine, exact, strict=True):
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


# --- bad input ---

OPS = CpuOps(1)
DELTA = DeltaSizes(1, 2, 4, 8)
LAYER = Layer(DELTA, 4, torch.float32)
HELD = States.random(LAYER, 3)


def conv(state: Tensor | None, slots: list[int], **changed: Any) -> Tensor:
    given = {"x_TI": torch.randn(2, LAYER.width), "start": 0, "weight_CJ": LAYER.conv_weight}
    plan = OPS.plan_states(step_of([1] * len(slots), [0] * len(slots), slots))
    return OPS.causal_conv(**{**given, **changed}, state=state, plan=plan)


def delta(state: Tensor | None, slots: list[int], **changed: Any) -> Tensor:
    given = {"qkv_TC": torch.randn(2, DELTA.qkv_size), "gates_TI": torch.randn(2, 4), "start": 0}
    given |= {"decay_H": LAYER.decay, "dt_bias_H": LAYER.dt_bias, "sizes": DELTA}
    plan = OPS.plan_states(step_of([1] * len(slots), [0] * len(slots), slots))
    return OPS.gated_delta(**{**given, **changed}, state=state, plan=plan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv(HELD.conv, [0, 3]), "slot 3 is none of 3"),
        (lambda: delta(HELD.delta, [5, 0]), "slot 5 is none of 3"),
        (lambda: conv(HELD.conv, [0, -1]), "slot -1 is none"),
        (lambda: delta(HELD.delta, [1, 1]), "two sequences have their states in slot 1"),
        (lambda: conv(None, [0, 1]), "states are kept, and none are given"),
        (lambda: delta(None, [0, 1]), "states are kept, and none are given"),
        (lambda: conv(HELD.conv, [0]), "2 rows, where states were planned for 1"),
        (lambda: delta(HELD.delta, [0]), "2 rows, where states were planned for 1"),
        (lambda: conv(HELD.conv.double(), [0, 1]), "they must be .* in torch.float32"),
        (lambda: conv(HELD.conv[:, 1:].contiguous(), [0, 1]), "they must be"),
        (lambda: delta(HELD.delta.bfloat16(), [0, 1]), "they must be .* in torch.float32"),
        (lambda: delta(HELD.delta.transpose(2, 3), [0, 1]), r"they must be \(2, 4, 8\)"),
        (lambda: conv(HELD.conv, [0, 1], start=60), "columns from 60 are not all of"),
        (lambda: delta(HELD.delta, [0, 1], start=1), "4 columns from 1 are not all of 4"),
        (lambda: delta(HELD.delta, [0, 1], gates_TI=torch.randn(3, 4)), "gates"),
        (lambda: delta(HELD.delta, [0, 1], gates_TI=torch.randn(2, 4).bfloat16()), "one dtype"),
        (lambda: delta(HELD.delta, [0, 1], qkv_TC=torch.randn(2, 7)), "queries, keys and values"),
        (lambda: delta(HELD.delta, [0, 1], decay_H=torch.randn(3)), "decays"),
        (lambda: delta(HELD.delta, [0, 1], decay_H=LAYER.decay.double()), "want torch.float32"),
        (
            lambda: OPS.gated_norm(torch.randn(1, 9), torch.randn(1, 9), 0, torch.randn(2), EPS),
            "9 columns are no heads of 2",
        ),
        (
            lambda: OPS.gate_heads(torch.ones(1, 3, 4), torch.ones(1, 12), HeadGates(1, 4)),
            "12 columns from 1 are not all of 12",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        call()


def test_states_of_the_past_must_be_somewhere(backend: Ops) -> None:
    with pytest.raises(
        ValueError, match="last 2 tokens of a sequence of 5, whose state is nowhere"
    ):
        backend.plan_states(step_of([3, 2], [0, 3], None))


def test_heads_that_do_not_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 value heads of a gated delta layer cannot share 2"):
        DeltaSizes(2, 5, 8, 8)
    with pytest.raises(ConfigError, match="key_dim of a gated delta layer is 0"):
        DeltaSizes(2, 4, 0, 8)
