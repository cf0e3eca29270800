"""The gated delta net (arXiv 2412.06464), as Qwen3-Next and Qwen3.5 have it.

Queries, keys and values pass a causal convolution and write to a state of one matrix a value head,
from which values are read; the result is normed, gated and projected. The state is all that is
kept of the past.

I stands for what all projections give side by side, C for queries, keys and values, V for all value
heads' values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moebius.errors import ConfigError, require_word
from moebius.nn.linear import Linear, ParameterModule, RMSNorm
from moebius.nn.mixers.derived import Convolution, Derived, rows_of
from moebius.nn.mixers.recurs import Recurs
from moebius.nn.rope import Positions
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Operation, PreparedLinear, Use
from moebius.ops.cache_spec import CacheSpec, Plane
from moebius.ops.config import DeltaSizes

Projections = Literal["apart", "gates grouped", "grouped"]


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """A gated delta net of these heads.

    taps          inputs that the convolution sees, the newest among them
    projections   how checkpoints hold the input's projections. `apart`: queries, keys and values
                  in one matrix, output gates z, and the gates b and a of each value head. `grouped`
                  (Qwen3-Next): one matrix in which each key head's rows follow one another, query,
                  key, its values, their z, and one for b and a alike. `gates grouped`: only the
                  latter
    logarithm     checkpoints hold the logarithm of how fast states decay (A_log), and not the
                  decay itself, which is -exp(A_log)
    """

    sizes: DeltaSizes
    taps: int = 4
    projections: Projections = "apart"
    logarithm: bool = True

    def __post_init__(self) -> None:
        require_word("a gated delta net's projections", self.projections, Projections)
        if self.taps < 2:
            raise ConfigError(
                f"linear_conv_kernel_dim is {self.taps}; a convolution over time sees at least 2"
            )

    @property
    def gate_start(self) -> int:
        """The column of I at which z begins; queries, keys and values are before it."""
        return self.sizes.qkv_size

    @property
    def head_start(self) -> int:
        """The column of I at which b begins, and a behind it."""
        return self.sizes.qkv_size + self.sizes.out_size

    @property
    def in_size(self) -> int:
        return self.head_start + 2 * self.sizes.value_heads

    @property
    def activations(self) -> int:
        return self.in_size + self.sizes.qkv_size + 2 * self.sizes.out_size

    @property
    def scores(self) -> int:
        return 0

    @property
    def matrices(self) -> dict[str, int]:
        """The input's projections as checkpoints hold them, and how many rows each has."""
        sizes = self.sizes
        heads = sizes.value_heads
        flat = {"in_proj_qkv": sizes.qkv_size, "in_proj_z": sizes.out_size}
        if self.projections == "apart":
            return {**flat, "in_proj_b": heads, "in_proj_a": heads}
        if self.projections == "grouped":
            flat = {"in_proj_qkvz": self.head_start}
        return {**flat, "in_proj_ba": 2 * heads}

    def pieces(self) -> list[tuple[str, int, int]]:
        """(matrix, first row, last and one): the rows of `matrices` that make I, in order."""
        sizes = self.sizes
        shared = sizes.value_heads // sizes.key_heads
        values = shared * sizes.value_dim
        whole = [(name, 0, rows) for name, rows in self.matrices.items()]
        if self.projections == "apart":
            return whole
        heads = whole[:2]
        if self.projections == "grouped":
            parts = (sizes.key_dim, sizes.key_dim, values, values)
            heads = _of_groups("in_proj_qkvz", sizes.key_heads, parts)
        return heads + _of_groups("in_proj_ba", sizes.key_heads, (shared, shared))

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of GatedDeltaNet."""
        sizes = self.sizes
        for name, rows in self.matrices.items():
            yield Parameter(f"{name}.weight", (rows, hidden_size))
        yield Parameter("conv1d.weight", (sizes.qkv_size, 1, self.taps), float32=True)
        decay = "A_log" if self.logarithm else "decay"
        yield Parameter(decay, (sizes.value_heads,), float32=True)
        yield Parameter("dt_bias", (sizes.value_heads,), float32=True)
        yield Parameter("norm.weight", (sizes.value_dim,))
        yield Parameter("out_proj.weight", (hidden_size, sizes.out_size))

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """The last inputs of the convolution, and the state, which is float32 in any model."""
        sizes = self.sizes
        matrix = (sizes.value_heads, sizes.key_dim, sizes.value_dim)
        return CacheSpec(
            state=(
                Plane("conv", (self.taps - 1, sizes.qkv_size), dtype),
                Plane("delta", matrix, torch.float32),
            )
        )

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        operations = (
            Operation.LINEAR,
            Operation.CAUSAL_CONV,
            Operation.GATED_DELTA,
            Operation.GATED_NORM,
        )
        for operation in operations:
            yield Use(operation, dtype)

    def build(self, place: Place) -> "GatedDeltaNet":
        return GatedDeltaNet(self, place)


def _of_groups(matrix: str, groups: int, parts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Rows of a matrix whose groups consist of parts of so many rows: each part of all groups."""
    size = sum(parts)
    found = []
    for part, rows in enumerate(parts):
        before = sum(parts[:part])
        for group in range(groups):
            first = group * size + before
            found.append((matrix, first, first + rows))
    return found


class GatedDeltaNet(ParameterModule):
    """The module of a GatedDelta at one layer."""

    def __init__(self, spec: GatedDelta, place: Place) -> None:
        super().__init__()
        sizes = spec.sizes
        self.spec = spec
        self.layer = place.layer
        self.ops = place.ops
        self._matrices = {
            name: Linear(place.ops, place.hidden_size, rows, dtype=place.dtype)
            for name, rows in spec.matrices.items()
        }
        for name, matrix in self._matrices.items():
            self.add_module(name, matrix)
        self._derived = Derived[tuple[PreparedLinear, Tensor]]()
        self.conv1d = Convolution((sizes.qkv_size, 1, spec.taps))
        decay = nn.Parameter(torch.empty(sizes.value_heads, dtype=torch.float32))
        self.register_parameter("A_log" if spec.logarithm else "decay", decay)
        self.dt_bias = nn.Parameter(torch.empty(sizes.value_heads, dtype=torch.float32))
        self.norm = RMSNorm(place.ops, sizes.value_dim, place.norm_eps, dtype=place.dtype)
        self.out_proj = Linear(place.ops, sizes.out_size, place.hidden_size, dtype=place.dtype)

    def prepared(self, dtype: torch.dtype) -> tuple[PreparedLinear, Tensor]:
        """What makes I, and the decay (H,).

        Of matrices whose rows are wanted in another order, each run of rows is a layer of its own,
        where it lies.
        """

        def make() -> tuple[PreparedLinear, Tensor]:
            layers = [
                (rows_of(self._matrices[name].held(), first, last), None)
                for name, first, last in self.spec.pieces()
            ]
            held = self.get_parameter("A_log" if self.spec.logarithm else "decay")
            decay_H = -held.exp() if self.spec.logarithm else held
            return self.ops.prepare_linear(*layers, dtype=dtype), decay_H

        return self._derived.get(self.changes, make)

    def forward(self, x_TD: Tensor, positions: Positions, past: Recurs) -> Tensor:
        """What the layer adds to the residual stream (T, D)."""
        spec = self.spec
        states, plan = past.recur(self, x_TD)
        projections, decay_H = self.prepared(x_TD.dtype)
        in_TI = self.ops.linear(x_TD, projections)
        qkv_TC = self.ops.causal_conv(in_TI, 0, self.conv1d.taps_CJ, states.get("conv"), plan)
        out_TV = self.ops.gated_delta(
            qkv_TC,
            in_TI,
            spec.head_start,
            decay_H,
            self.dt_bias,
            states.get("delta"),
            plan,
            spec.sizes,
        )
        norm = self.norm
        out_TV = self.ops.gated_norm(out_TV, in_TI, spec.gate_start, norm.weight, norm.eps)
        out_TD: Tensor = self.out_proj(out_TV)
        return out_TD
