"""Attention: projections, norms and rotation here; what the keys are attended through is the
caller's `attend`.

Serving hands in a PagedAttend, training a CausalAttend; the decoder knows neither requests nor
documents.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moebius.config import ModelConfig
from moebius.nn.linear import Linear, RMSNorm
from moebius.ops import Ops
from moebius.ops.reference import visible
from moebius.ops.steps import StepInputs

# Queries of a row that are attended at a time: keys after them are never touched.
QUERY_BLOCK = 128

__all__ = ["Attend", "Attention", "CausalAttend", "PagedAttend", "Rotation", "StepInputs"]


class Rotation(NamedTuple):
    """What is done to a layer's query and key heads before they meet: a norm where the architecture
    has one, then the rotation by the step's cos and sin (T, R). kv_heads and head_dim say where the
    heads lie."""

    ops: Ops
    cos_TR: Tensor
    sin_TR: Tensor
    kv_heads: int
    head_dim: int
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(self, qkv_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, N) and k (T, G, N), ready to meet, and v (T, G, N)."""
        heads_TXN = qkv_TI.view(len(qkv_TI), qkv_TI.shape[1] // self.head_dim, self.head_dim)
        sizes = [heads_TXN.shape[1] - 2 * self.kv_heads, self.kv_heads, self.kv_heads]
        q_THN, k_TGN, v_TGN = torch.split(heads_TXN, sizes, dim=1)
        q_THN = q_THN if self.q_norm is None else self.q_norm(q_THN.contiguous())
        k_TGN = k_TGN if self.k_norm is None else self.k_norm(k_TGN.contiguous())
        return (
            self.ops.rotary(q_THN, self.cos_TR, self.sin_TR),
            self.ops.rotary(k_TGN, self.cos_TR, self.sin_TR),
            v_TGN,
        )


class Attend(Protocol):
    """How a layer's queries meet keys and values: heads as projected, side by side (T, (H + 2G) *
    N), to (T, H, N)."""

    def __call__(self, layer: int, qkv_TI: Tensor, rotation: Rotation) -> Tensor: ...


class PagedAttend:
    """Serving: store the step's keys and values in each layer's cache, attend over what the cache
    holds.

    caches are one per layer, as Ops.make_kv_cache made them, with blocks of block_size tokens;
    groups[i] is the block table that layer i's cache is found by (one for all without it).
    """

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        caches: Sequence[Any],
        step: StepInputs,
        block_size: int,
        groups: Sequence[int] | None = None,
    ) -> None:
        self._ops, self._config, self._caches, self._step = ops, config, caches, step
        self._groups = [0] * len(config.windows) if groups is None else groups
        kinds = dict.fromkeys(zip(self._groups, config.windows, strict=True))
        self._plans = {
            (group, window): ops.plan_attention(step.of(group), block_size, window)
            for group, window in kinds
        }

    def __call__(self, layer: int, qkv_TI: Tensor, rotation: Rotation) -> Tensor:
        group = self._groups[layer]
        cache, slots = self._caches[layer], self._step.of(group).slot_mapping
        q_norm, k_norm = (
            None if norm is None else norm.weight for norm in (rotation.q_norm, rotation.k_norm)
        )
        angles, eps = (rotation.cos_TR, rotation.sin_TR), self._config.norm_eps
        q_THN = self._ops.rotate_and_store(qkv_TI, *angles, cache, slots, q_norm, k_norm, eps)
        plan = self._plans[group, self._config.windows[layer]]
        return self._ops.paged_attention(q_THN, cache, plan, self._config.scale)


class CausalAttend:
    """Training and evaluation: T = R * row_length tokens in R packed rows, causal within each row.

    With document_ids_T a token sees only tokens of its row with its own id. The mask is made once
    for all layers, and queries go in blocks that touch no key behind them: on a CPU several times
    as fast as torch's own with a mask.
    """

    def __init__(
        self, config: ModelConfig, row_length: int, document_ids_T: Tensor | None = None
    ) -> None:
        self._windows, self._scale, self._length = config.windows, config.scale, row_length
        self._document_ids_T = document_ids_T
        self._biases: dict[int | None, Tensor] = {}

    def _bias(self, window: int | None, like: Tensor) -> Tensor:
        """What is added to scores, 0 or about -inf: (R or 1, L, L)."""
        if window not in self._biases:
            at = torch.arange(self._length, device=like.device)
            seen_RLL = visible(at, at, window).unsqueeze(0)
            if self._document_ids_T is not None:
                ids_RL = self._document_ids_T.view(-1, self._length)
                seen_RLL = seen_RLL & (ids_RL.unsqueeze(1) == ids_RL.unsqueeze(2))
            nothing_RLL = torch.zeros(seen_RLL.shape, dtype=like.dtype, device=like.device)
            self._biases[window] = nothing_RLL.masked_fill(~seen_RLL, torch.finfo(like.dtype).min)
        return self._biases[window]

    def __call__(self, layer: int, qkv_TI: Tensor, rotation: Rotation) -> Tensor:
        q_THN, k_TGN, v_TGN = rotation(qkv_TI)
        bias_RLL, length = self._bias(self._windows[layer], q_THN), self._length
        heads, groups, size = q_THN.shape[1], k_TGN.shape[1], q_THN.shape[2]
        rows = len(q_THN) // length
        # Query heads that share a key head stand side by side, as more queries of the same keys:
        # (R, G, L, H/G, N).
        q = q_THN.view(rows, length, groups, heads // groups, size).transpose(1, 2) * self._scale
        k = k_TGN.view(rows, length, groups, size).permute(0, 2, 3, 1)
        v = v_TGN.view(rows, length, groups, size).transpose(1, 2)
        blocks = []
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            shape = (rows, groups, stop - start, heads // groups, -1)
            scores = (q[:, :, start:stop].flatten(2, 3) @ k[..., :stop]).view(shape)
            scores = scores + bias_RLL[:, None, start:stop, None, :stop]
            out = torch.softmax(scores, dim=-1).flatten(2, 3) @ v[:, :, :stop]
            blocks.append(out.view(shape))
        return torch.cat(blocks, dim=2).transpose(1, 2).reshape(q_THN.shape)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, by architecture, biases, clipping and
    query/key norms."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.ops, self.layer = config, ops, layer
        self._projections: Any = None
        width, q_size, kv_size = config.hidden_size, config.q_size, config.kv_size
        self.q_proj = Linear(ops, width, q_size, bias=config.qkv_bias, dtype=dtype)
        self.k_proj = Linear(ops, width, kv_size, bias=config.qkv_bias, dtype=dtype)
        self.v_proj = Linear(ops, width, kv_size, bias=config.qkv_bias, dtype=dtype)
        self.o_proj = Linear(ops, q_size, width, bias=config.output_bias, dtype=dtype)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(
                ops, q_size if full else config.head_dim, config.norm_eps, dtype=dtype
            )
            self.k_norm = RMSNorm(
                ops, kv_size if full else config.head_dim, config.norm_eps, dtype=dtype
            )

    def _full_norm(self, qkv_TI: Tensor) -> Tensor:
        """Norm all query heads as one vector, and all key heads (OLMoE), then clip (OLMo)."""
        config = self.config
        if self.q_norm is not None and self.k_norm is not None and config.qk_norm == "full":
            for norm, start in ((self.q_norm, 0), (self.k_norm, config.q_size)):
                qkv_TI = self.ops.rms_norm_part(qkv_TI, start, norm.weight, norm.eps)
        return (
            qkv_TI if config.clip_qkv is None else qkv_TI.clamp(-config.clip_qkv, config.clip_qkv)
        )

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, attend: Attend) -> Tensor:
        config = self.config
        if self._projections is None:
            self._projections = self.ops.prepare_linear(
                *((p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj))
            )
        qkv_TI = self.ops.linear(x_TD, self._projections)
        if config.qk_norm == "full" or config.clip_qkv is not None:
            qkv_TI = self._full_norm(qkv_TI)
        norms = (self.q_norm, self.k_norm) if config.qk_norm == "head" else ()
        rotation = Rotation(self.ops, cos_TR, sin_TR, config.num_kv_heads, config.head_dim, *norms)
        out_TD: Tensor = self.o_proj(attend(self.layer, qkv_TI, rotation).flatten(1))
        return out_TD
