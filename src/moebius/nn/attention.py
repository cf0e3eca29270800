"""Grouped-query attention: its record, its parameters, and what it does to a step's rows.

How queries meet the keys and values of the past is the caller's: see `Attends`.

I stands for the values of all query, key and value heads side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from moebius.errors import ConfigError, require_word
from moebius.nn.linear import Linear, ParameterModule, RMSNorm
from moebius.nn.rope import Positions, RopeConfig
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Feature, Operation, PreparedLinear, Rotation, Use
from moebius.ops.cache_spec import CacheSpec, key_value_spec
from moebius.ops.config import GateFunction, HeadGates, HeadRows

QKNorm = Literal["none", "head", "full", "turned"]
Gated = Literal["none", "queries", "values", "heads"]


@dataclass(frozen=True, slots=True)
class GQA:
    """Grouped-query attention (arXiv 2305.13245) with what the architectures add to it.

    num_heads, num_kv_heads, head_dim   H, G and N
    value_dim     size of a value head, where it is not N
    window        a token sees itself and window - 1 before it; None for all
    rope          None for none (NoPE)
    qk_norm       queries and keys are normed each `head` by itself (Qwen3), once it is `turned`
                  (Hunyuan), or all heads as one vector, `full` (OLMoE)
    qkv_bias, output_bias   the projections have biases
    clip_qkv      queries, keys and values are cut off at +- this (OLMo)
    scale         of the scores; None for 1 / sqrt(N)
    softcap       scores become c * tanh(scores / c) (Gemma 2, arXiv 2408.00118)
    sinks         one more key a head, without a value, whose score is learned (gpt-oss)
    gated         the `values` of heads are multiplied by gates of a projection of their own
                  (AFMoE), or `heads` by one each (Laguna), behind gate_function; or values by
                  gates whose rows stand in q_proj behind those of each head's `queries`
                  (Qwen3-Next)
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    window: int | None = None
    rope: RopeConfig | None = None
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    clip_qkv: float | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    gated: Gated = "none"
    gate_function: GateFunction = "sigmoid"

    def __post_init__(self) -> None:
        require_word("qk_norm", self.qk_norm, QKNorm)
        require_word("gated", self.gated, Gated)
        unlike = self.qk_norm == "full" or (self.clip_qkv, self.value_dim) != (None, None)
        if self.gated == "queries" and unlike:
            raise ConfigError("gates behind queries go with no clip_qkv, value_dim or full qk_norm")
        for name in ("num_heads", "num_kv_heads", "head_dim", "value_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        for name in ("softcap", "clip_qkv"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ConfigError(f"{name} is {limit}; it must be positive, or left out")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads = {self.num_heads} is no multiple of num_key_value_heads = "
                f"{self.num_kv_heads}"
            )
        if self.rope is not None:
            self.rope.size(self.head_dim)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def q_rows(self) -> int:
        """Of q_proj: queries, and the gates behind them."""
        return self.q_size * (2 if self.gated == "queries" else 1)

    @property
    def k_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def v_size(self) -> int:
        return self.num_kv_heads * (self.value_dim or self.head_dim)

    @property
    def out_size(self) -> int:
        return self.num_heads * (self.value_dim or self.head_dim)

    @property
    def gate_size(self) -> int:
        """Of a projection of gates' own."""
        return {"values": self.out_size, "heads": self.num_heads}.get(self.gated, 0)

    @property
    def rows(self) -> HeadRows:
        """How a token's row holds them."""
        return HeadRows(self.gated == "queries", self.qk_norm == "turned")

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def activations(self) -> int:
        return self.q_rows + self.k_size + self.v_size + self.out_size + self.gate_size

    @property
    def scores(self) -> int:
        return self.num_heads

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of Attention."""
        for name, size in (("q", self.q_rows), ("k", self.k_size), ("v", self.v_size)):
            yield Parameter(f"{name}_proj.weight", (size, hidden_size))
            if self.qkv_bias:
                yield Parameter(f"{name}_proj.bias", (size,))
            if self.qk_norm != "none" and name != "v":
                normed = size if self.qk_norm == "full" else self.head_dim
                yield Parameter(f"{name}_norm.weight", (normed,), norm=True)
        yield Parameter("o_proj.weight", (hidden_size, self.out_size))
        if self.output_bias:
            yield Parameter("o_proj.bias", (hidden_size,))
        if self.gate_size:
            yield Parameter("gate_proj.weight", (self.gate_size, hidden_size))
        if self.sinks:
            yield Parameter("sinks", (self.num_heads,), float32=True)

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """Keys and values of the window's tokens."""
        return key_value_spec(
            self.num_kv_heads, self.head_dim, kv_dtype or dtype, self.value_dim, self.window
        )

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        wishes = {
            Feature.WINDOW: self.window is not None,
            Feature.SOFTCAP: self.softcap is not None,
            Feature.SINKS: self.sinks,
            Feature.VALUE_SIZE: self.value_dim not in (None, self.head_dim),
        }
        features = frozenset(feature for feature, wanted in wishes.items() if wanted)
        cached = frozenset({Feature.INT8_CACHE} if kv_dtype == torch.int8 else ())
        for operation in (Operation.LINEAR, Operation.ROTATION):
            yield Use(operation, dtype)
        yield Use(Operation.ROTATE_AND_STORE, dtype, cached)
        yield Use(Operation.PAGED_ATTENTION, dtype, features | cached)
        if self.qk_norm == "full":
            yield Use(Operation.RMS_NORM_PART, dtype)
        if self.clip_qkv is not None:
            yield Use(Operation.CLIP, dtype)
        if self.gated != "none":
            yield Use(Operation.GATE_HEADS, dtype)

    def build(self, place: Place) -> "Attention":
        return Attention(self, place)


class Attends(Protocol):
    """A past of keys and values: what `Attention` asks of whoever runs a step."""

    def attend(self, attention: "Attention", qkv_TI: Tensor, rotation: Rotation) -> Tensor:
        """(T, H, value size): each row's heads, as they were projected, over the keys and values
        that it may see, its own among them. `rotation` is cos and sin (T, R) of the rows."""


class Attention(ParameterModule):
    """The module of a GQA at one layer."""

    def __init__(self, spec: GQA, place: Place) -> None:
        super().__init__()
        self.spec = spec
        self.layer = place.layer
        self.ops = place.ops
        self.rotary = place.rotary(spec.rope, spec.head_dim)
        self.scale = spec.score_scale
        self.rows = spec.rows
        self.gates: HeadGates | None = None
        if spec.gated == "queries":
            self.gates = HeadGates(spec.head_dim, 2 * spec.head_dim, False, spec.gate_function)
        elif spec.gated != "none":
            stride = spec.gate_size // spec.num_heads
            self.gates = HeadGates(0, stride, spec.gated == "heads", spec.gate_function)
        self._projections: PreparedLinear | None = None

        def linear(in_size: int, out_size: int, bias: bool) -> Linear:
            return Linear(place.ops, in_size, out_size, bias=bias, dtype=place.dtype)

        def norm(size: int) -> RMSNorm | None:
            if spec.qk_norm == "none":
                return None
            normed = size if spec.qk_norm == "full" else spec.head_dim
            return RMSNorm(place.ops, normed, place.norm_eps, dtype=place.norm_dtype)

        self.q_proj = linear(place.hidden_size, spec.q_rows, spec.qkv_bias)
        self.k_proj: Linear | None = linear(place.hidden_size, spec.k_size, spec.qkv_bias)
        self.v_proj: Linear | None = linear(place.hidden_size, spec.v_size, spec.qkv_bias)
        self.o_proj = linear(spec.out_size, place.hidden_size, spec.output_bias)
        self.gate_proj: Linear | None = None
        if spec.gate_size:
            self.gate_proj = linear(place.hidden_size, spec.gate_size, bias=False)
        self.q_norm = norm(spec.q_size)
        self.k_norm = norm(spec.k_size)
        self.head_norms: tuple[RMSNorm, RMSNorm] | None = None
        """Of each query head and of each key head, where there are such."""
        each = spec.qk_norm in ("head", "turned")
        if each and self.q_norm is not None and self.k_norm is not None:
            self.head_norms = (self.q_norm, self.k_norm)
        self.sinks: nn.Parameter | None = None
        if spec.sinks:
            self.sinks = nn.Parameter(torch.empty(spec.num_heads, dtype=torch.float32))

    def _projected(self, x_TD: Tensor) -> Tensor:
        """Queries, keys and values side by side (T, I): clipped, and normed where all heads are."""
        spec = self.spec
        layers = [(p.held(), p.bias) for p in (self.q_proj, self.k_proj, self.v_proj) if p]
        if self._projections is None or not self._projections.is_of(*layers):
            self._projections = self.ops.prepare_linear(*layers, dtype=x_TD.dtype)
        qkv_TI = self.ops.linear(x_TD, self._projections)
        if spec.qk_norm == "full" and self.q_norm is not None and self.k_norm is not None:
            for norm, start in ((self.q_norm, 0), (self.k_norm, spec.q_size)):
                qkv_TI = self.ops.rms_norm_part(qkv_TI, start, norm.weight, norm.eps)
        if spec.clip_qkv is not None:
            qkv_TI = self.ops.clip(qkv_TI, spec.clip_qkv)
        return qkv_TI

    def forward(self, x_TD: Tensor, positions: Positions, past: Attends) -> Tensor:
        """What attention adds to the residual stream (T, D)."""
        qkv_TI = self._projected(x_TD)
        out_THN = past.attend(self, qkv_TI, positions.rotation(self.rotary))
        if self.gates is not None:
            gates_TI = qkv_TI if self.gate_proj is None else self.gate_proj(x_TD)
            out_THN = self.ops.gate_heads(out_THN, gates_TI, self.gates)
        out_TD: Tensor = self.o_proj(out_THN.flatten(1))
        return out_TD
