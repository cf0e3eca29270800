"""The short convolutions of LFM2 (arXiv 2511.23404): a few inputs, mixed over time between two
gates. The last of these inputs are all that is kept of the past.

In the order of the input's projection: gates B before the convolution, gates C behind it, and x.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.nn.linear import Linear, ParameterModule
from moebius.nn.mixers.derived import Convolution, Derived, rows_of
from moebius.nn.mixers.recurs import Recurs
from moebius.nn.rope import Positions
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Operation, PreparedLinear, Use
from moebius.ops.cache_spec import CacheSpec, Plane
from moebius.ops.config import HeadGates


@dataclass(frozen=True, slots=True)
class ShortConv:
    """A short convolution of `size` channels, as many as the model is wide.

    taps   inputs that it sees, the newest among them
    bias   the convolution and both projections have biases
    """

    size: int
    taps: int = 3
    bias: bool = False

    def __post_init__(self) -> None:
        if self.taps < 2:
            raise ConfigError(
                f"conv_L_cache is {self.taps}; a convolution over time sees 2 or more"
            )

    @property
    def activations(self) -> int:
        return 6 * self.size

    @property
    def scores(self) -> int:
        return 0

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of ShortConvolution."""
        sizes = {"in_proj": (3 * self.size, hidden_size), "out_proj": (hidden_size, self.size)}
        for name, shape in sizes.items():
            yield Parameter(f"{name}.weight", shape)
            if self.bias:
                yield Parameter(f"{name}.bias", shape[:1])
        yield Parameter("conv.weight", (self.size, 1, self.taps), float32=True)
        if self.bias:
            yield Parameter("conv.bias", (self.size,), float32=True)

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """The last inputs of the convolution."""
        return CacheSpec(state=(Plane("conv", (self.taps - 1, self.size), dtype),))

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        for operation in (Operation.LINEAR, Operation.CAUSAL_CONV, Operation.GATE_HEADS):
            yield Use(operation, dtype)

    def build(self, place: Place) -> "ShortConvolution":
        return ShortConvolution(self, place)


class ShortConvolution(ParameterModule):
    """The module of a ShortConv at one layer."""

    def __init__(self, spec: ShortConv, place: Place) -> None:
        super().__init__()
        size = spec.size
        self.layer = place.layer
        self.ops = place.ops
        self.in_proj = Linear(
            place.ops, place.hidden_size, 3 * size, bias=spec.bias, dtype=place.dtype
        )
        self.conv = Convolution((size, 1, spec.taps), bias=spec.bias)
        self.out_proj = Linear(
            place.ops, size, place.hidden_size, bias=spec.bias, dtype=place.dtype
        )
        self._derived = Derived[tuple[PreparedLinear, PreparedLinear]]()
        self._before = HeadGates(0, size, function="identity")
        self._behind = HeadGates(size, size, function="identity")

    def prepared(self, dtype: torch.dtype) -> tuple[PreparedLinear, PreparedLinear]:
        """What makes both gates, side by side, and x."""

        def rows(first: int, last: int) -> PreparedLinear:
            bias = self.in_proj.bias
            weight = rows_of(self.in_proj.held(), first, last)
            layer = (weight, None if bias is None else bias[first:last])
            return self.ops.prepare_linear(layer, dtype=dtype)

        size = self._before.stride
        return self._derived.get(
            self.changes, lambda: (rows(0, 2 * size), rows(2 * size, 3 * size))
        )

    def forward(self, x_TD: Tensor, positions: Positions, past: Recurs) -> Tensor:
        """What the layer adds to the residual stream (T, D)."""
        states, plan = past.recur(self, x_TD)
        gates, values = self.prepared(x_TD.dtype)
        gates_TI = self.ops.linear(x_TD, gates)
        # One head of all channels, each with a gate of its own.
        x_T1D = self.ops.linear(x_TD, values).unsqueeze(1)
        x_T1D = self.ops.gate_heads(x_T1D, gates_TI, self._before)
        taps_CJ = self.conv.taps_CJ
        mixed_TD = self.ops.causal_conv(
            x_T1D.flatten(1), 0, taps_CJ, states.get("conv"), plan, self.conv.bias, silu=False
        )
        out_T1D = self.ops.gate_heads(mixed_TD.unsqueeze(1), gates_TI, self._behind)
        out_TD: Tensor = self.out_proj(out_T1D.flatten(1))
        return out_TD
