"""Attention of an encoder and a decoder as T5 has it (arXiv 1910.10683): scores are not scaled, and
a learned bias by distance is what says where a key is.

An encoder's rows see all of their prompt. A decoder's see what stands before them, and by attention
of their own what the encoder made of the prompt: its keys and values are computed once a request.

I stands for the values of all heads of queries, keys and values side by side, B for buckets of
distances, R for distances.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebius.errors import ConfigError
from moebius.nn.linear import Linear, ParameterModule
from moebius.nn.mixer import Past
from moebius.nn.rope import Positions
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Feature, Operation, PreparedLinear, Rotation, Use
from moebius.ops.cache_spec import CacheSpec, key_value_spec
from moebius.ops.prepared import StatePlan


@dataclass(frozen=True, slots=True)
class Heads:
    """num_heads H of head_dim N values each; as many of queries as of keys."""

    num_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def size(self) -> int:
        return self.num_heads * self.head_dim

    def projections(self, hidden_size: int) -> Parameters:
        """Those of Projected."""
        for name in ("q", "k", "v"):
            yield Parameter(f"{name}_proj.weight", (self.size, hidden_size))
        yield Parameter("o_proj.weight", (hidden_size, self.size))


@dataclass(frozen=True, slots=True)
class Buckets:
    """Distances that share a bias: near ones have their own, farther ones share it with more.

    count         of buckets; where keys may stand on both sides, half of them are for each
    max_distance  from which on all distances share one
    """

    count: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        if self.count < 4 or self.count % 4:
            raise ConfigError(
                f"relative_attention_num_buckets is {self.count}; it must be a multiple of 4"
            )
        if self.max_distance <= self.count // 2:
            raise ConfigError(
                f"relative_attention_max_distance is {self.max_distance}; it must be more than "
                f"{self.count // 2}, half of the buckets"
            )

    def of(self, distance_R: Tensor, *, both_sides: bool) -> Tensor:
        """The bucket of each distance, the key's position less the query's: int64 (R,)."""
        count = self.count
        found_R = torch.zeros_like(distance_R)
        if both_sides:
            count //= 2
            found_R = (distance_R > 0).long() * count
            far_R = distance_R.abs()
        else:
            far_R = (-distance_R).clamp(min=0)
        exact = count // 2
        # In float32, as the published models were trained.
        ratio_R = torch.log(far_R.clamp(min=exact).float() / exact)
        ratio_R = ratio_R / math.log(self.max_distance / exact)
        shared_R = (exact + (ratio_R * (count - exact)).long()).clamp(max=count - 1)
        return found_R + far_R.where(far_R < exact, shared_R)


@dataclass(frozen=True, slots=True)
class RelativeAttention:
    """A stack's attention to its own rows.

    encoder   rows see all of their prompt; else what stands before them
    biases    this layer has the stack's biases, which all its layers add
    """

    heads: Heads
    buckets: Buckets = Buckets()
    encoder: bool = False
    biases: bool = False

    @property
    def activations(self) -> int:
        return 4 * self.heads.size

    @property
    def scores(self) -> int:
        return self.heads.num_heads

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of RelativeSelfAttention."""
        yield from self.heads.projections(hidden_size)
        if self.biases:
            shape = (self.buckets.count, self.heads.num_heads)
            yield Parameter("relative_attention_bias.weight", shape, float32=True)

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """A decoder's keys and values, of its own tokens and, for the layer behind, of what the
        encoder gave: one block table serves both. An encoder's are needed for its step alone, and
        lie meanwhile where a decoder's will."""
        if kv_dtype == torch.int8:
            raise ConfigError(
                "kv_cache_dtype int8 does not go with an encoder and a decoder, whose attention "
                "scores are not scaled; use auto"
            )
        heads = self.heads
        if self.encoder:
            return CacheSpec()
        return key_value_spec(heads.num_heads, heads.head_dim, kv_dtype or dtype)

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        for operation in (Operation.LINEAR, Operation.ROTATION, Operation.ROTATE_AND_STORE):
            yield Use(operation, dtype)
        yield Use(Operation.PAGED_ATTENTION, dtype, frozenset({Feature.BIAS}))

    def build(self, place: Place) -> "RelativeSelfAttention":
        return RelativeSelfAttention(self, place)


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """A decoder's attention to what the encoder gave. Its keys and values are in the cache of the
    layer before it, at the prompt's positions."""

    heads: Heads

    @property
    def activations(self) -> int:
        return 4 * self.heads.size

    @property
    def scores(self) -> int:
        return self.heads.num_heads

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of SourceAttention."""
        yield from self.heads.projections(hidden_size)

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """None of its own."""
        return CacheSpec()

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        for operation in (
            Operation.LINEAR,
            Operation.ROTATION,
            Operation.ROTATE_AND_STORE,
            Operation.PAGED_ATTENTION,
        ):
            yield Use(operation, dtype)

    def build(self, place: Place) -> "SourceAttention":
        return SourceAttention(self, place)


class SourcePast(ABC):
    """What an encoder and a decoder ask of whoever runs a step, beside what all mixers do.

    A step's `source` rows are those of the encoder: S of them, of whole prompts. Made for one step.
    """

    def __init__(self) -> None:
        self._shared: dict[bool, Tensor] = {}

    def share(self, encoder: bool, bias_HR: Tensor) -> None:
        """A stack's first layer has worked out what all of its layers add to scores."""
        self._shared[encoder] = bias_HR

    @abstractmethod
    def source(self, input_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids of the encoder's rows, and a number of each: int64 (S,) both. input_ids_T: the
        decoder's."""

    @abstractmethod
    def sequences(self) -> StatePlan:
        """Which of the encoder's rows are of which prompt."""

    @abstractmethod
    def attend_own(
        self, attention: "RelativeSelfAttention", qkv_TI: Tensor, rotation: Rotation
    ) -> Tensor:
        """(T, H, N): rows over those of their own stack, with the biases that were shared. No head
        turns: `rotation` has no angles."""

    @abstractmethod
    def keep_source(self, attention: "SourceAttention", kv_SI: Tensor, rotation: Rotation) -> None:
        """Keys and values of the encoder's rows, for this step and all that follow."""

    @abstractmethod
    def attend_source(self, attention: "SourceAttention", q_THN: Tensor) -> Tensor:
        """(T, H, N): a decoder's rows over all of their prompts' kept keys and values."""


def source_past(past: Past) -> SourcePast:
    """`past`, which must know of an encoder. Raises TypeError for another."""
    if not isinstance(past, SourcePast):
        raise TypeError(f"{type(past).__name__} knows of no encoder, which this layer asks for")
    return past


class RelativeBias(ParameterModule):
    """weight (B, H): a bias for each bucket and head."""

    def __init__(self, spec: RelativeAttention) -> None:
        super().__init__()
        self.spec = spec
        shape = (spec.buckets.count, spec.heads.num_heads)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self._table: tuple[Tensor, int] | None = None

    def table(self) -> Tensor:
        """By distance (H, R), from -max_distance to max_distance: beyond, all share a bucket."""
        now = self.changes.count
        if self._table is None or self._table[1] != now or torch.is_grad_enabled():
            reach = self.spec.buckets.max_distance
            distance_R = torch.arange(-reach, reach + 1, device="cpu")
            bucket_R = self.spec.buckets.of(distance_R, both_sides=self.spec.encoder)
            bias_HR = self.weight[bucket_R].t().contiguous()
            self._table = (bias_HR, now)
        return self._table[0]


class Projected(ParameterModule):
    """Queries, keys and values of heads, and their way back to the residual stream."""

    def __init__(self, heads: Heads, place: Place) -> None:
        super().__init__()
        self.heads = heads
        self.layer = place.layer
        self.ops = place.ops
        self.rotary = place.rotary(None, heads.head_dim)
        self._prepared: PreparedLinear | None = None

        def linear(in_size: int, out_size: int) -> Linear:
            return Linear(place.ops, in_size, out_size, dtype=place.dtype)

        self.q_proj = linear(place.hidden_size, heads.size)
        self.k_proj = linear(place.hidden_size, heads.size)
        self.v_proj = linear(place.hidden_size, heads.size)
        self.o_proj = linear(heads.size, place.hidden_size)

    def projected(self, x_TD: Tensor, *layers: Linear) -> Tensor:
        """What these layers make of x, side by side."""
        held = [(layer.held(), layer.bias) for layer in layers]
        if self._prepared is None or not self._prepared.is_of(*held):
            self._prepared = self.ops.prepare_linear(*held, dtype=x_TD.dtype)
        return self.ops.linear(x_TD, self._prepared)


class RelativeSelfAttention(Projected):
    """The module of a RelativeAttention at one layer."""

    def __init__(self, spec: RelativeAttention, place: Place) -> None:
        super().__init__(spec.heads, place)
        self.spec = spec
        self.relative_attention_bias = RelativeBias(spec) if spec.biases else None

    def forward(self, x_TD: Tensor, positions: Positions, past: Past) -> Tensor:
        """What attention adds to the residual stream (T, D)."""
        known = source_past(past)
        if self.relative_attention_bias is not None:
            known.share(self.spec.encoder, self.relative_attention_bias.table())
        qkv_TI = self.projected(x_TD, self.q_proj, self.k_proj, self.v_proj)
        out_THN = known.attend_own(self, qkv_TI, positions.rotation(self.rotary))
        out_TD: Tensor = self.o_proj(out_THN.flatten(1))
        return out_TD


class SourceAttention(Projected):
    """The module of a CrossAttention at one layer."""

    def __init__(self, spec: CrossAttention, place: Place) -> None:
        super().__init__(spec.heads, place)
        self.spec = spec

    def keep(self, encoded_SD: Tensor, positions_S: Positions, past: SourcePast) -> None:
        """Work out the keys and values of what the encoder gave."""
        kv_SI = self.projected(encoded_SD, self.k_proj, self.v_proj)
        past.keep_source(self, kv_SI, positions_S.rotation(self.rotary))

    def forward(self, x_TD: Tensor, positions: Positions, past: Past) -> Tensor:
        """What attention adds to the residual stream (T, D)."""
        heads = self.heads
        q_THN = self.q_proj(x_TD).view(len(x_TD), heads.num_heads, heads.head_dim)
        out_THN = source_past(past).attend_source(self, q_THN)
        out_TD: Tensor = self.o_proj(out_THN.flatten(1))
        return out_TD
