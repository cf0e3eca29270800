"""Mamba 2 (arXiv 2405.21060), as Granite 4 and Nemotron-H have it.

A convolution over time precedes a selective state space; what is read from the states meets gates,
then a norm. The states are all that is kept of the past.

I stands for what the projection gives side by side: gates, x and what writes to states and reads
them (B and C of each group), which are convolved (C), and time steps; V for all heads' values.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebius.errors import ConfigError
from moebius.nn.linear import Linear, ParameterModule
from moebius.nn.mixers.derived import Convolution, Derived
from moebius.nn.mixers.recurs import Recurs
from moebius.nn.rope import Positions
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Operation, Use
from moebius.ops.cache_spec import CacheSpec, Plane
from moebius.ops.config import ScanSizes


@dataclass(frozen=True, slots=True)
class Mamba2:
    """A Mamba 2 layer of these heads.

    taps         inputs that the convolution sees, the newest among them
    conv_bias    the convolution has one, and `bias`: both projections have
    published    decays are held as logarithms (A_log), and what there is of heads and groups flat,
                 as Hugging Face's checkpoints have it; else decays as such, -exp(A_log), and a row
                 for each head and group
    """

    sizes: ScanSizes
    taps: int = 4
    conv_bias: bool = True
    bias: bool = False
    published: bool = True

    def __post_init__(self) -> None:
        if self.taps < 2:
            raise ConfigError(
                f"a Mamba layer convolves {self.taps} input; a convolution sees 2 or more"
            )

    @property
    def step_start(self) -> int:
        """The column of I at which time steps begin; gates and what is convolved are before."""
        return self.sizes.out_size + self.sizes.xbc_size

    @property
    def in_size(self) -> int:
        return self.step_start + self.sizes.heads

    @property
    def activations(self) -> int:
        return self.in_size + self.sizes.xbc_size + 2 * self.sizes.out_size

    @property
    def scores(self) -> int:
        return 0

    @property
    def decay_name(self) -> str:
        return "A_log" if self.published else "decay"

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Of decays, and of what skips the state."""
        return (self.sizes.heads,) if self.published else (self.sizes.heads, 1)

    @property
    def norm_shape(self) -> tuple[int, ...]:
        """Of the norm's weight."""
        inner = self.sizes.out_size
        groups = self.sizes.groups
        return (inner,) if self.published else (groups, inner // groups)

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of MambaLayer."""
        sizes = self.sizes
        projections = {
            "in_proj": (self.in_size, hidden_size),
            "out_proj": (hidden_size, sizes.out_size),
        }
        for name, shape in projections.items():
            yield Parameter(f"{name}.weight", shape)
            if self.bias:
                yield Parameter(f"{name}.bias", shape[:1])
        yield Parameter("conv1d.weight", (sizes.xbc_size, 1, self.taps), float32=True)
        if self.conv_bias:
            yield Parameter("conv1d.bias", (sizes.xbc_size,), float32=True)
        yield Parameter(self.decay_name, self.head_shape, float32=True)
        yield Parameter("dt_bias", (sizes.heads,), float32=True)
        yield Parameter("D", self.head_shape, float32=True)
        yield Parameter("norm.weight", self.norm_shape)

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """The last inputs of the convolution, and the states, which are float32 in any model."""
        sizes = self.sizes
        of_heads = (sizes.heads, sizes.state_dim, sizes.head_dim)
        return CacheSpec(
            state=(
                Plane("conv", (self.taps - 1, sizes.xbc_size), dtype),
                Plane("scan", of_heads, torch.float32),
            )
        )

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        operations = (
            Operation.LINEAR,
            Operation.CAUSAL_CONV,
            Operation.SELECTIVE_SCAN,
            Operation.GROUPED_NORM,
        )
        for operation in operations:
            yield Use(operation, dtype)

    def build(self, place: Place) -> "MambaLayer":
        return MambaLayer(self, place)


class GroupedNorm(ParameterModule):
    """The norm behind the gates: its weight alone."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))


class MambaLayer(ParameterModule):
    """The module of a Mamba2 at one layer."""

    def __init__(self, spec: Mamba2, place: Place) -> None:
        super().__init__()
        sizes = spec.sizes
        self.spec = spec
        self.layer = place.layer
        self.ops = place.ops
        self.eps = place.norm_eps

        def linear(in_size: int, out_size: int) -> Linear:
            return Linear(place.ops, in_size, out_size, bias=spec.bias, dtype=place.dtype)

        def of_heads(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32))

        self.in_proj = linear(place.hidden_size, spec.in_size)
        self.conv1d = Convolution((sizes.xbc_size, 1, spec.taps), bias=spec.conv_bias)
        self.register_parameter(spec.decay_name, of_heads(*spec.head_shape))
        self.dt_bias = of_heads(sizes.heads)
        self.D = of_heads(*spec.head_shape)
        self.norm = GroupedNorm(spec.norm_shape, place.dtype)
        self.out_proj = linear(sizes.out_size, place.hidden_size)
        self._decay = Derived[Tensor]()

    @property
    def decay_H(self) -> Tensor:
        """How fast each head's state decays, below zero."""
        held_H = self.get_parameter(self.spec.decay_name)
        if not self.spec.published:
            return held_H.flatten()
        return self._decay.get(self.changes, lambda: -held_H.exp())

    def forward(self, x_TD: Tensor, positions: Positions, past: Recurs) -> Tensor:
        """What the layer adds to the residual stream (T, D)."""
        sizes = self.spec.sizes
        states, plan = past.recur(self, x_TD)
        in_TI = self.in_proj(x_TD)
        taps_CJ = self.conv1d.taps_CJ
        xbc_TC = self.ops.causal_conv(
            in_TI, sizes.out_size, taps_CJ, states.get("conv"), plan, self.conv1d.bias
        )
        out_TV = self.ops.selective_scan(
            xbc_TC,
            in_TI,
            self.spec.step_start,
            self.decay_H,
            self.dt_bias,
            self.D.flatten(),
            states.get("scan"),
            plan,
            sizes,
        )
        weight_V = self.norm.weight.flatten()
        out_TV = self.ops.grouped_norm(out_TV, in_TI, 0, weight_V, self.eps, sizes.groups)
        out_TD: Tensor = self.out_proj(out_TV)
        return out_TD
