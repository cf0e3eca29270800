"""A recurrent layer of random weights, and each of its operations as a plain loop in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.ops import Ops, StatePlan
from moebius.ops.config import DeltaSizes
from moebius.ops.steps import StateInputs, StepInputs

EPS = 1e-6


class States(NamedTuple):
    """Of a layer, a row for each slot: (S, J - 1, C) and (S, H, K, V)."""

    conv: Tensor
    delta: Tensor

    @classmethod
    def random(cls, layer: Layer, slots: int) -> States:
        sizes = layer.sizes
        conv = torch.randn(slots, layer.taps - 1, sizes.qkv_size).to(layer.dtype)
        delta = torch.randn(slots, sizes.value_heads, sizes.key_dim, sizes.value_dim)
        return cls(conv, delta)

    def clear(self, slot: int) -> None:
        for state in self:
            state[slot] = 0


@dataclass
class Layer:
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

    def rows(self, count: int) -> Tensor:
        return torch.randn(count, self.width).to(self.dtype)

    def __call__(self, ops: Ops, x_TI: Tensor, states: States | None, plan: StatePlan) -> Tensor:
        """As a mixer computes it."""
        conv, delta = (None, None) if states is None else states
        qkv_TC = ops.causal_conv(x_TI, 0, self.conv_weight, conv, plan)
        out_TI = ops.gated_delta(
            qkv_TC, x_TI, self.gates_at, self.decay, self.dt_bias, delta, plan, self.sizes
        )
        return ops.gated_norm(out_TI, x_TI, self.sizes.qkv_size, self.norm, EPS)


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
    heads, share = sizes.value_heads, sizes.value_heads // sizes.key_heads
    state = [each for each in state_HKV.double()]
    rows = []
    for x, gates in zip(qkv_LC.double(), gates_LI, strict=True):
        q, k, v = x.split([sizes.key_heads * sizes.key_dim] * 2 + [sizes.out_size])
        outs = []
        for h in range(heads):
            g = h % sizes.key_heads if sizes.tiled else h // share
            of_key = slice(g * sizes.key_dim, (g + 1) * sizes.key_dim)
            query = q[of_key] / (q[of_key].square().sum() + 1e-6).sqrt() / math.sqrt(sizes.key_dim)
            key = k[of_key] / (k[of_key].square().sum() + 1e-6).sqrt()
            value = v[h * sizes.value_dim : (h + 1) * sizes.value_dim]
            # As it is rounded: float32's sigmoid may be another number's neighbour, but rarely.
            beta = gates[start + h].float().sigmoid().to(gates.dtype).double()
            a = gates[start + heads + h].double() + dt_bias_H[h].double()
            state[h] = state[h] * (decay_H[h].double() * a.exp().log1p()).exp()
            update = beta * (value - state[h].T @ key)
            state[h] = state[h] + torch.outer(key, update)
            outs.append(state[h].T @ query)
        rows.append(torch.cat(outs))
    return torch.stack(rows), torch.stack(state)
