"""A recurrent layer of random weights, and each of its operations as a plain loop in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.ops import Ops, StatePlan
from moebius.ops.config import ChannelDecay, DeltaSizes, ScanSizes
from moebius.ops.steps import StateInputs, StepInputs

EPS = 1e-6


class States(NamedTuple):
    """Of a layer, a row for each slot: inputs of its convolution (S, J - 1, C), and what the delta
    rule (S, H, K, V) or a selective state space (S, H, M, P) keeps."""

    conv: Tensor
    delta: Tensor

    @classmethod
    def random(cls, layer: AnyLayer, slots: int) -> States:
        conv = torch.randn(slots, layer.taps - 1, layer.columns).to(layer.dtype)
        return cls(conv, torch.randn(slots, *layer.state))

    def clear(self, slot: int) -> None:
        for state in self:
            state[slot] = 0


class AnyLayer(Protocol):
    """A recurrent layer of random weights, behind its projection."""

    dtype: torch.dtype
    taps: int
    width: int

    @property
    def columns(self) -> int:
        """How many are convolved."""

    @property
    def state(self) -> tuple[int, ...]:
        """The shape of what one sequence keeps beside them."""

    def rows(self, count: int) -> Tensor: ...

    def __call__(self, ops: Ops, x_TI: Tensor, states: States | None, plan: StatePlan) -> Tensor:
        """As a mixer computes it."""


class _Rows:
    width: int
    dtype: torch.dtype

    def rows(self, count: int) -> Tensor:
        return torch.randn(count, self.width).to(self.dtype)


@dataclass
class Layer(_Rows):
    """Projections' columns are queries, keys, values, the gates of the output, b and a."""

    sizes: DeltaSizes
    taps: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        heads = self.sizes.value_heads
        self.conv_weight = (torch.randn(self.sizes.qkv_size, self.taps) / self.taps**0.5).to(
            self.dtype
        )
        self.decay = -torch.randn(heads).exp()
        self.dt_bias = torch.randn(heads)
        self.norm = torch.randn(self.sizes.value_dim).to(self.dtype)
        self.gates_at = self.sizes.qkv_size + self.sizes.out_size
        self.width = self.gates_at + 2 * heads
        self.columns = self.sizes.qkv_size
        self.state = (heads, self.sizes.key_dim, self.sizes.value_dim)

    def __call__(self, ops: Ops, x_TI: Tensor, states: States | None, plan: StatePlan) -> Tensor:
        """As a mixer computes it."""
        conv, delta = (None, None) if states is None else states
        qkv_TC = ops.causal_conv(x_TI, 0, self.conv_weight, conv, plan)
        out_TI = ops.gated_delta(
            qkv_TC, x_TI, self.gates_at, self.decay, self.dt_bias, delta, plan, self.sizes
        )
        return ops.gated_norm(out_TI, x_TI, self.sizes.qkv_size, self.norm, EPS)


@dataclass
class KimiLayer(_Rows):
    """Projections' columns are queries, keys, values, b, what decays are made of, and gates."""

    sizes: DeltaSizes
    decays: ChannelDecay
    taps: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        sizes = self.sizes
        self.columns = sizes.qkv_size
        self.state = (sizes.value_heads, sizes.key_dim, sizes.value_dim)
        self.conv_weight = (torch.randn(self.columns, self.taps) / self.taps**0.5).to(self.dtype)
        self.decay = -torch.randn(sizes.value_heads).exp()
        self.dt_bias = torch.randn(sizes.value_heads, sizes.key_dim)
        self.norm = torch.randn(sizes.value_dim)
        self.decays_at = self.columns + sizes.value_heads
        self.gates_at = self.decays_at + sizes.value_heads * sizes.key_dim
        self.width = self.gates_at + sizes.out_size

    def __call__(self, ops: Ops, x_TI: Tensor, states: States | None, plan: StatePlan) -> Tensor:
        """As a mixer computes it."""
        conv, delta = (None, None) if states is None else states
        qkv_TC = ops.causal_conv(x_TI, 0, self.conv_weight, conv, plan)
        out_TI = ops.kimi_delta(
            qkv_TC,
            x_TI,
            self.columns,
            x_TI,
            self.decays_at,
            self.decay,
            self.dt_bias,
            delta,
            plan,
            self.sizes,
            self.decays,
        )
        return ops.gated_norm(out_TI, x_TI, self.gates_at, self.norm, EPS, "sigmoid")


@dataclass
class MambaLayer(_Rows):
    """Projections' columns are gates, x, B, C and time steps."""

    sizes: ScanSizes
    taps: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        sizes = self.sizes
        self.columns = sizes.xbc_size
        self.state = (sizes.heads, sizes.state_dim, sizes.head_dim)
        self.conv_weight = torch.randn(self.columns, self.taps) / self.taps**0.5
        self.conv_bias = torch.randn(self.columns)
        self.decay = -torch.randn(sizes.heads).exp()
        self.dt_bias = torch.randn(sizes.heads)
        self.skip = torch.randn(sizes.heads)
        self.norm = torch.randn(sizes.out_size).to(self.dtype)
        self.steps_at = sizes.out_size + self.columns
        self.width = self.steps_at + sizes.heads

    def __call__(self, ops: Ops, x_TI: Tensor, states: States | None, plan: StatePlan) -> Tensor:
        """As a mixer computes it."""
        conv, scan = (None, None) if states is None else states
        start = self.sizes.out_size
        xbc_TC = ops.causal_conv(x_TI, start, self.conv_weight, conv, plan, self.conv_bias)
        out_TI = ops.selective_scan(
            xbc_TC,
            x_TI,
            self.steps_at,
            self.decay,
            self.dt_bias,
            self.skip,
            scan,
            plan,
            self.sizes,
        )
        return ops.grouped_norm(out_TI, x_TI, 0, self.norm, EPS, self.sizes.groups)


def step_of(rows: Sequence[int], starts: Sequence[int], slots: Sequence[int] | None) -> StepInputs:
    """A step in which each sequence brings so many rows, from such a position."""
    states = None if slots is None else StateInputs(slots, (), (), ())
    return StepInputs.build([[0] * n for n in rows], starts, None, 1, states=states)


def naive_conv(x_LC: Tensor, weight_CJ: Tensor, before_JC: Tensor, bias_C: Tensor | None) -> Tensor:
    """One sequence's rows in float64, before they are rounded."""
    taps = weight_CJ.shape[1]
    read = torch.cat((before_JC, x_LC)).double()
    outs = []
    for t in range(len(x_LC)):
        products = read[t : t + taps].T * weight_CJ.double()
        outs.append(products.sum(1) + (0 if bias_C is None else bias_C.double()))
    return torch.stack(outs)


def naive_delta(
    qkv_LC: Tensor,
    gates_LI: Tensor,
    start: int,
    decay_H: Tensor,
    dt_bias_H: Tensor,
    state_HKV: Tensor,
    sizes: DeltaSizes,
) -> tuple[Tensor, Tensor]:
    """One sequence's rows (L, H * V) in float64, before they are rounded, and its state after."""
    heads = sizes.value_heads
    b_LH = gates_LI[:, start : start + heads]
    a_LH = gates_LI[:, start + heads : start + 2 * heads].double() + dt_bias_H.double()
    kept_LH = (decay_H.double() * a_LH.exp().log1p()).exp()
    return naive_rule(qkv_LC, b_LH, kept_LH.unsqueeze(-1), state_HKV, sizes)


def naive_kimi(
    qkv_LC: Tensor,
    b_LH: Tensor,
    f_LHK: Tensor,
    decay_H: Tensor,
    dt_bias_HK: Tensor,
    state_HKV: Tensor,
    sizes: DeltaSizes,
    decay: ChannelDecay,
) -> tuple[Tensor, Tensor]:
    """The same where channels decay by themselves."""
    f = f_LHK.double() + dt_bias_HK.double()
    rate = decay_H.double().unsqueeze(-1)
    if decay.lower is None:
        exponents = rate * f.exp().log1p()
    else:
        exponents = decay.lower / (1 + (rate * f).exp())
    if decay.rounded:
        # By way of float32, as it is computed: rarely another number's neighbour.
        exponents = exponents.float().to(f_LHK.dtype).double()
    return naive_rule(qkv_LC, b_LH, exponents.exp(), state_HKV, sizes)


def naive_rule(
    qkv_LC: Tensor, b_LH: Tensor, kept_LHX: Tensor, state_HKV: Tensor, sizes: DeltaSizes
) -> tuple[Tensor, Tensor]:
    """The delta rule, with what is kept of each head's state or of each of its rows."""
    heads, share = sizes.value_heads, sizes.value_heads // sizes.key_heads
    state = [each for each in state_HKV.double()]
    rows = []
    for x, b, kept in zip(qkv_LC.double(), b_LH, kept_LHX, strict=True):
        q, k, v = x.split([sizes.key_heads * sizes.key_dim] * 2 + [sizes.out_size])
        outs = []
        for h in range(heads):
            g = h % sizes.key_heads if sizes.tiled else h // share
            of_key = slice(g * sizes.key_dim, (g + 1) * sizes.key_dim)
            query = q[of_key] / (q[of_key].square().sum() + 1e-6).sqrt() / math.sqrt(sizes.key_dim)
            key = k[of_key] / (k[of_key].square().sum() + 1e-6).sqrt()
            value = v[h * sizes.value_dim : (h + 1) * sizes.value_dim]
            # As it is rounded: float32's sigmoid may be another number's neighbour, but rarely.
            beta = b[h].float().sigmoid().to(b.dtype).double()
            state[h] = state[h] * kept[h].unsqueeze(-1)
            update = beta * (value - state[h].T @ key)
            state[h] = state[h] + torch.outer(key, update)
            outs.append(state[h].T @ query)
        rows.append(torch.cat(outs))
    return torch.stack(rows), torch.stack(state)


def naive_scan(
    xbc_LC: Tensor,
    dt_LH: Tensor,
    decay_H: Tensor,
    dt_bias_H: Tensor,
    skip_H: Tensor,
    state_HMP: Tensor,
    sizes: ScanSizes,
) -> tuple[Tensor, Tensor]:
    """One sequence's rows (L, H * P) of a selective state space in float64, before they are
    rounded, and its state after."""
    dtype = dt_LH.dtype
    # Rounded where it says so, by way of float32, as it is computed.
    summed_LH = (dt_LH.float() + dt_bias_H.to(dtype).float()).to(dtype).double()
    steps_LH = summed_LH.exp().log1p().where(summed_LH < 20, summed_LH).float().to(dtype).double()
    state = [each for each in state_HMP.double()]
    rows = []
    for xbc, steps in zip(xbc_LC.double(), steps_LH, strict=True):
        x, b, c = xbc.split([sizes.out_size, *[sizes.groups * sizes.state_dim] * 2])
        outs = []
        for h in range(sizes.heads):
            group = h * sizes.groups // sizes.heads
            own = slice(group * sizes.state_dim, (group + 1) * sizes.state_dim)
            values = x[h * sizes.head_dim : (h + 1) * sizes.head_dim]
            state[h] = state[h] * (decay_H[h].double() * steps[h]).exp()
            state[h] = state[h] + torch.outer(b[own], steps[h] * values)
            outs.append(state[h].T @ c[own] + skip_H[h].double() * values)
        rows.append(torch.cat(outs))
    return torch.stack(rows), torch.stack(state)


def served(
    layer: AnyLayer, inputs: list[Tensor], seed: int, pick: Callable[[int], Ops]
) -> tuple[list[Tensor], list[States]]:
    """What an engine would compute of some sequences: chunks of any length, beside one another, in
    slots anywhere; and each one's states at the end. The i-th step is computed by pick(i)."""
    rng = random.Random(seed)
    slots = rng.sample(range(len(inputs) + 3), len(inputs))
    states = States.random(layer, len(inputs) + 3)
    for slot in slots:
        states.clear(slot)
    done = [0] * len(inputs)
    outs: list[list[Tensor]] = [[] for _ in inputs]
    step = 0
    while any(n < len(x) for n, x in zip(done, inputs, strict=True)):
        some = [b for b, x in enumerate(inputs) if done[b] < len(x) and rng.random() < 0.7]
        rng.shuffle(some)
        rows = [min(rng.choice((1, 1, 2, 3, 9, 30)), len(inputs[b]) - done[b]) for b in some]
        x = [inputs[b][done[b] : done[b] + n] for b, n in zip(some, rows, strict=True)]
        ops = pick(step)
        plan = ops.plan_states(step_of(rows, [done[b] for b in some], [slots[b] for b in some]))
        if some:
            out = layer(ops, torch.cat(x), states, plan)
            for b, n, part in zip(some, rows, out.split(rows), strict=True):
                done[b] += n
                outs[b].append(part)
        step += 1
    kept = [States(*(state[slot] for state in states)) for slot in slots]
    return [torch.cat(each) for each in outs], kept


def alone(layer: AnyLayer, ops: Ops, x: Tensor) -> tuple[Tensor, States]:
    """A sequence's rows in one step by itself, and its states after it."""
    states = States.random(layer, 1)
    states.clear(0)
    out = layer(ops, x, states, ops.plan_states(step_of([len(x)], [0], [0])))
    return out, States(*(state[0] for state in states))
