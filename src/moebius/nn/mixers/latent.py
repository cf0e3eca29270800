"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).

All heads' keys and values are made of one latent a token, beside which stands the part of a key
that turns, the same for all heads: these two alone are kept of the past. They are computed with in
one form, whether a prompt or a single token is: see moebius.ops.latent.

Shape legend, beside that of moebius.ops: K size of what does not turn of a query, P of what does, C
of a latent, V of a value head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.nn.linear import Linear, RMSNorm, Weighted
from moebius.nn.rope import Positions, RopeConfig
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Feature, LayerCache, Operation, Ops, PreparedHeads, Use
from moebius.ops.cache_spec import CacheSpec, latent_spec
from moebius.ops.config import HeadGates, Temperature

CLASS_EPS = 1e-6
"""Of the norms within attention: transformers' classes leave it as it is, whatever rms_norm_eps
says."""


@dataclass(frozen=True, slots=True)
class MLA:
    """Multi-head latent attention of these sizes.

    num_heads, nope_dim, rope_dim, value_dim   H, K, P and V
    kv_rank       size C of a latent
    q_rank        queries are made of a latent of their own, of this size; None: of the stream
    rope          of what turns; None for none (NoPE)
    scale         of the scores; None for 1 / sqrt(K + P)
    bias          the projections of the stream to latents, and the output's, have biases
    gated         each head's output is multiplied by a sigmoid gate (bailing_hybrid)
    temperature   queries grow with their position; None: they do not
    norm_eps      of latents' norms
    """

    num_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None = None
    rope: RopeConfig | None = None
    scale: float | None = None
    bias: bool = False
    gated: bool = False
    temperature: Temperature | None = None
    norm_eps: float = CLASS_EPS

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim", "q_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} of latent attention is {value}; it must be at least 1")
        if self.rope is not None and self.rope.size(self.rope_dim) != self.rope_dim:
            raise ConfigError(
                f"all {self.rope_dim} values of qk_rope_head_dim turn, not a part of them"
            )

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def latent_size(self) -> int:
        """Of a token's latent and key, side by side."""
        return self.kv_rank + self.rope_dim

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.query_dim**-0.5 if self.scale is None else self.scale

    @property
    def activations(self) -> int:
        of_a_head = self.query_dim + self.latent_size + self.kv_rank + self.value_dim
        return self.num_heads * of_a_head + self.latent_size + (self.q_rank or 0)

    @property
    def scores(self) -> int:
        return self.num_heads

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of LatentAttention. What makes heads' keys and values of latents is a matrix for
        each: of head h rows h * C to (h + 1) * C of k_b_proj, as many of v_b_proj."""
        heads = self.num_heads
        of_latents = "kv_a_proj_with_mqa"
        if self.q_rank is None:
            yield Parameter("q_proj.weight", (heads * self.query_dim, hidden_size))
        else:
            yield from self._projection("q_a_proj", self.q_rank, hidden_size)
            yield Parameter("q_a_layernorm.weight", (self.q_rank,), norm=True)
            yield Parameter("q_b_proj.weight", (heads * self.query_dim, self.q_rank))
        yield from self._projection(of_latents, self.latent_size, hidden_size)
        yield Parameter("kv_a_layernorm.weight", (self.kv_rank,), norm=True)
        yield Parameter("k_b_proj.weight", (heads * self.kv_rank, self.nope_dim))
        yield Parameter("v_b_proj.weight", (heads * self.value_dim, self.kv_rank))
        yield from self._projection("o_proj", hidden_size, heads * self.value_dim)
        if self.gated:
            yield Parameter("gate_proj.weight", (heads, hidden_size))

    def _projection(self, name: str, rows: int, columns: int) -> Parameters:
        yield Parameter(f"{name}.weight", (rows, columns))
        if self.bias:
            yield Parameter(f"{name}.bias", (rows,))

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """A latent and a key of each token."""
        return latent_spec(self.kv_rank, self.rope_dim, kv_dtype or dtype)

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it asks of a backend."""
        coded = kv_dtype == torch.int8
        features = frozenset({Feature.LATENT, *([Feature.INT8_CACHE] if coded else ())})
        for operation in (Operation.LINEAR, Operation.ROTATION, Operation.HEAD_PRODUCTS):
            yield Use(operation, dtype)
        yield Use(Operation.ROTATE_AND_STORE_LATENT, dtype, features)
        yield Use(Operation.PAGED_ATTENTION, dtype, features | {Feature.VALUE_SIZE})
        if self.gated:
            yield Use(Operation.GATE_HEADS, dtype)

    def build(self, place: Place) -> "LatentAttention":
        return LatentAttention(self, place)


class AttendsLatent(Protocol):
    """A past of latents: what `LatentAttention` asks of whoever runs a step."""

    def attend_latent(self, rows: "LatentRows") -> Tensor:
        """(T, H, C): what each row's heads find among the latents that it may see."""


class LatentRows(NamedTuple):
    """The rows of a step, as a layer has them.

    q_THN       (T, H, C + P), queries that meet latents, and behind them what is to turn
    latent_TI   (T, C + P), their own latents and keys, neither normed nor turned
    """

    mixer: "LatentAttention"
    q_THN: Tensor
    latent_TI: Tensor
    positions: Positions

    def store(self, cache: LayerCache, slot_mapping_T: Tensor) -> Tensor:
        """The queries, turned; latents and keys go to the cache."""
        mixer = self.mixer
        temperature = mixer.spec.temperature
        return mixer.ops.rotate_and_store_latent(
            self.q_THN,
            self.latent_TI,
            self.positions.rotation(mixer.rotary),
            cache,
            slot_mapping_T,
            mixer.kv_a_layernorm.weight,
            mixer.kv_a_layernorm.eps,
            temperature=temperature,
            positions_T=None if temperature is None else self.positions.positions_T,
        )


class HeadProducts(Weighted):
    """Each head's own matrix, (H * O, I), one below the other."""

    def __init__(self, ops: Ops, heads: int, rows: int, columns: int, *, dtype: torch.dtype):
        super().__init__(heads * rows, columns, dtype)
        self.ops = ops
        self.heads = heads
        self._prepared: PreparedHeads | None = None

    def forward(self, x_THN: Tensor) -> Tensor:
        """(T, H, O + N - I): see Ops.head_products."""
        held = self.held()
        if self._prepared is None or not self._prepared.is_of(held):
            self._prepared = self.ops.prepare_heads(held, self.heads, x_THN.dtype)
        return self.ops.head_products(x_THN, self._prepared)


class LatentAttention(torch.nn.Module):
    """The module of an MLA at one layer."""

    def __init__(self, spec: MLA, place: Place) -> None:
        super().__init__()
        self.spec = spec
        self.layer = place.layer
        self.ops = place.ops
        self.scale = spec.score_scale
        self.rotary = place.rotary(spec.rope, spec.rope_dim)
        self.gates = HeadGates(0, 1, single=True)
        heads = spec.num_heads
        width = place.hidden_size

        def linear(in_size: int, out_size: int, *, bias: bool = False) -> Linear:
            return Linear(place.ops, in_size, out_size, bias=bias, dtype=place.dtype)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(place.ops, size, spec.norm_eps, dtype=place.norm_dtype)

        def products(rows: int, columns: int) -> HeadProducts:
            return HeadProducts(place.ops, heads, rows, columns, dtype=place.dtype)

        self.q_proj: Linear | None = None
        if spec.q_rank is None:
            self.q_proj = linear(width, heads * spec.query_dim)
        else:
            self.q_a_proj = linear(width, spec.q_rank, bias=spec.bias)
            self.q_a_layernorm = norm(spec.q_rank)
            self.q_b_proj = linear(spec.q_rank, heads * spec.query_dim)
        self.kv_a_proj_with_mqa = linear(width, spec.latent_size, bias=spec.bias)
        self.kv_a_layernorm = norm(spec.kv_rank)
        self.k_b_proj = products(spec.kv_rank, spec.nope_dim)
        self.v_b_proj = products(spec.value_dim, spec.kv_rank)
        self.o_proj = linear(heads * spec.value_dim, width, bias=spec.bias)
        self.gate_proj = linear(width, heads) if spec.gated else None

    def forward(self, x_TD: Tensor, positions: Positions, past: AttendsLatent) -> Tensor:
        """What attention adds to the residual stream (T, D)."""
        spec = self.spec
        if self.q_proj is not None:
            q_TI = self.q_proj(x_TD)
        else:
            q_TI = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))
        latent_TI = self.kv_a_proj_with_mqa(x_TD)
        q_THN = self.k_b_proj(q_TI.view(len(x_TD), spec.num_heads, spec.query_dim))
        found_THC = past.attend_latent(LatentRows(self, q_THN, latent_TI, positions))
        out_THN = self.v_b_proj(found_THC)
        if self.gate_proj is not None:
            out_THN = self.ops.gate_heads(out_THN, self.gate_proj(x_TD), self.gates)
        out_TD: Tensor = self.o_proj(out_THN.flatten(1))
        return out_TD
