"""Kimi delta attention (arXiv 2510.26692): a gated delta net in which each channel of a key decays
by itself, as Kimi Linear and Ling 3 have it.

I stands for what all projections of the layer's input give side by side, C for queries, keys and
values, V for all heads' values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moebius.errors import ConfigError, require_word
from moebius.nn.linear import Linear, ParameterModule, RMSNorm
from moebius.nn.mixers.derived import Convolution, Derived
from moebius.nn.mixers.recurs import Recurs
from moebius.nn.rope import Positions
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Operation, PreparedLinear, Use
from moebius.ops.cache_spec import CacheSpec, Plane
from moebius.ops.config import ChannelDecay, DeltaSizes

HeldDecay = Literal["logarithm", "decay", "rate"]
_QKV = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class KimiDelta:
    """Kimi delta attention of so many heads, whose keys and values have one size.

    decay      what decays are made of
    low_rank   decays and output gates are projected by two matrices, f_a and f_b, g_a and g_b, with
               as many values as a head has between them; else by one each
    taps       inputs that the convolutions see, the newest among them
    held       checkpoints hold the logarithm of how fast heads decay (A_log), as Hugging Face's do;
               or the `decay` itself, -exp(A_log), or the `rate`, exp(A_log), as llama.cpp's
    """

    heads: int
    head_dim: int
    decay: ChannelDecay = field(default_factory=ChannelDecay)
    low_rank: bool = True
    taps: int = 4
    held: HeldDecay = "logarithm"

    def __post_init__(self) -> None:
        require_word("how decays of heads are held", self.held, HeldDecay)
        if self.taps < 2:
            raise ConfigError(
                f"Kimi delta attention convolves {self.taps} inputs; a convolution over time sees "
                "2 or more"
            )
        # Which checks what there is of heads.
        assert self.sizes

    @property
    def sizes(self) -> DeltaSizes:
        return DeltaSizes(self.heads, self.heads, self.head_dim, self.head_dim)

    @property
    def size(self) -> int:
        """Of queries, of keys, of values, of decays and of output gates."""
        return self.heads * self.head_dim

    @property
    def matrices(self) -> dict[str, int]:
        """The projections whose results are I, in order, and how many rows each has."""
        rows = {f"{x}_proj": self.size for x in _QKV} | {"b_proj": self.heads}
        return rows if self.low_rank else {**rows, "f_proj": self.size, "g_proj": self.size}

    @property
    def in_size(self) -> int:
        return sum(self.matrices.values())

    @property
    def activations(self) -> int:
        low = 2 * (self.head_dim + self.size) if self.low_rank else 0
        return self.in_size + low + 5 * self.size

    @property
    def scores(self) -> int:
        return 0

    @property
    def published(self) -> bool:
        return self.held == "logarithm"

    @property
    def decay_name(self) -> str:
        return "A_log" if self.published else "decay"

    @property
    def decay_shape(self) -> tuple[int, ...]:
        """As checkpoints have it: Kimi's as what it is multiplied with, (1, 1, H, 1)."""
        if not self.published:
            return (self.heads, 1)
        return (1, 1, self.heads, 1) if self.low_rank else (self.heads,)

    @property
    def taps_shape(self) -> tuple[int, ...]:
        """Of each convolution's weight, likewise."""
        return (self.size, 1, self.taps) if self.published else (1, self.size, 1, self.taps)

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of KimiDeltaAttention."""
        for name, rows in self.matrices.items():
            yield Parameter(f"{name}.weight", (rows, hidden_size))
        if self.low_rank:
            for x in "fg":
                yield Parameter(f"{x}_a_proj.weight", (self.head_dim, hidden_size))
                yield Parameter(f"{x}_b_proj.weight", (self.size, self.head_dim))
        for x in _QKV:
            yield Parameter(f"{x}_conv1d.weight", self.taps_shape, float32=True)
        yield Parameter(self.decay_name, self.decay_shape, float32=True)
        yield Parameter("dt_bias", (self.size,), float32=True)
        yield Parameter("o_norm.weight", (self.head_dim,), float32=True)
        yield Parameter("o_proj.weight", (hidden_size, self.size))

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """The last inputs of the convolutions, and the states, which are float32 in any model."""
        return CacheSpec(
            state=(
                Plane("conv", (self.taps - 1, 3 * self.size), dtype),
                Plane("delta", (self.heads, self.head_dim, self.head_dim), torch.float32),
            )
        )

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        operations = (
            Operation.LINEAR,
            Operation.CAUSAL_CONV,
            Operation.KIMI_DELTA,
            Operation.GATED_NORM,
        )
        for operation in operations:
            yield Use(operation, dtype)

    def build(self, place: Place) -> "KimiDeltaAttention":
        return KimiDeltaAttention(self, place)


class _Prepared(NamedTuple):
    """What the layer computes with beside its modules."""

    projections: PreparedLinear
    taps_CJ: Tensor
    decay_H: Tensor


class KimiDeltaAttention(ParameterModule):
    """The module of a KimiDelta at one layer."""

    def __init__(self, spec: KimiDelta, place: Place) -> None:
        super().__init__()
        self.spec = spec
        self.layer = place.layer
        self.ops = place.ops

        def linear(in_size: int, out_size: int) -> Linear:
            return Linear(place.ops, in_size, out_size, dtype=place.dtype)

        self._matrices = {
            name: linear(place.hidden_size, rows) for name, rows in spec.matrices.items()
        }
        for name, matrix in self._matrices.items():
            self.add_module(name, matrix)
        if spec.low_rank:
            self.f_a_proj = linear(place.hidden_size, spec.head_dim)
            self.f_b_proj = linear(spec.head_dim, spec.size)
            self.g_a_proj = linear(place.hidden_size, spec.head_dim)
            self.g_b_proj = linear(spec.head_dim, spec.size)
        self._convolutions = [Convolution(spec.taps_shape) for _ in _QKV]
        for x, convolution in zip(_QKV, self._convolutions, strict=True):
            self.add_module(f"{x}_conv1d", convolution)
        decay = nn.Parameter(torch.empty(spec.decay_shape, dtype=torch.float32))
        self.register_parameter(spec.decay_name, decay)
        self.dt_bias = nn.Parameter(torch.empty(spec.size, dtype=torch.float32))
        self.o_norm = RMSNorm(place.ops, spec.head_dim, place.norm_eps, dtype=torch.float32)
        self.o_proj = linear(spec.size, place.hidden_size)
        self._derived = Derived[_Prepared]()

    def prepared(self, dtype: torch.dtype) -> _Prepared:
        def make() -> _Prepared:
            layers = [(matrix.held(), None) for matrix in self._matrices.values()]
            taps_CJ = torch.cat([each.taps_CJ for each in self._convolutions])
            held_H = self.get_parameter(self.spec.decay_name).flatten()
            if self.spec.published:
                held_H = held_H.exp()
            decay_H = held_H if self.spec.held == "decay" else -held_H
            return _Prepared(self.ops.prepare_linear(*layers, dtype=dtype), taps_CJ, decay_H)

        return self._derived.get(self.changes, make)

    def _gates(self, x_TD: Tensor, in_TI: Tensor) -> tuple[Tensor, int, Tensor, int]:
        """What decays are made of and in which column they begin, and output gates likewise."""
        if self.spec.low_rank:
            decays_TC = self.f_b_proj(self.f_a_proj(x_TD))
            gates_TC = self.g_b_proj(self.g_a_proj(x_TD))
            return decays_TC, 0, gates_TC, 0
        start = self.spec.in_size - 2 * self.spec.size
        return in_TI, start, in_TI, start + self.spec.size

    def forward(self, x_TD: Tensor, positions: Positions, past: Recurs) -> Tensor:
        """What the layer adds to the residual stream (T, D)."""
        spec = self.spec
        states, plan = past.recur(self, x_TD)
        projections, taps_CJ, decay_H = self.prepared(x_TD.dtype)
        in_TI = self.ops.linear(x_TD, projections)
        decays_TI, decays_start, gates_TI, gates_start = self._gates(x_TD, in_TI)
        qkv_TC = self.ops.causal_conv(in_TI, 0, taps_CJ, states.get("conv"), plan)
        out_TV = self.ops.kimi_delta(
            qkv_TC,
            in_TI,
            3 * spec.size,
            decays_TI,
            decays_start,
            decay_H,
            self.dt_bias.view(spec.heads, spec.head_dim),
            states.get("delta"),
            plan,
            spec.sizes,
            spec.decay,
        )
        norm = self.o_norm
        out_TV = self.ops.gated_norm(
            out_TV, gates_TI, gates_start, norm.weight, norm.eps, "sigmoid"
        )
        out_TD: Tensor = self.o_proj(out_TV)
        return out_TD
