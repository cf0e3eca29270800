"""Attention: projections, norms and rotation here; what the keys are attended through is the caller's `attend`.

Serving hands in a PagedAttend, training a CausalAttend; the decoder knows neither requests nor documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moebius.config import ModelConfig
from moebius.nn.linear import Linear, RMSNorm
from moebius.ops import Ops
from moebius.ops.steps import StepInputs

__all__ = ["Attend", "Attention", "CausalAttend", "PagedAttend", "StepInputs"]


class Attend(Protocol):
    """How a layer's queries meet keys and values: (layer, q_THN, k_TGN, v_TGN) -> o_THN."""

    def __call__(self, layer: int, q_THN: Tensor, k_TGN: Tensor, v_TGN: Tensor) -> Tensor: ...


class PagedAttend:
    """Serving: store the step's keys and values in each layer's cache, attend over what the cache holds.

    caches are one per layer, as Ops.make_kv_cache made them, with blocks of block_size tokens.
    """

    def __init__(self, ops: Ops, config: ModelConfig, caches: Sequence[Any], step: StepInputs, block_size: int) -> None:
        self._ops, self._config, self._caches, self._step = ops, config, caches, step
        self._plans = {window: ops.plan_attention(step, block_size, window) for window in set(config.windows)}

    def __call__(self, layer: int, q_THN: Tensor, k_TGN: Tensor, v_TGN: Tensor) -> Tensor:
        cache = self._caches[layer]
        self._ops.write_kv(cache, k_TGN, v_TGN, self._step.slot_mapping)
        plan = self._plans[self._config.windows[layer]]
        return self._ops.paged_attention(q_THN, cache, plan, self._config.scale)


class CausalAttend:
    """Training and evaluation: T = R * row_length tokens, causal within each row.

    With document_ids_T a token sees only tokens of its row with its own id (documents packed into rows).
    """

    def __init__(self, ops: Ops, config: ModelConfig, row_length: int, document_ids_T: Tensor | None = None) -> None:
        self._ops, self._config = ops, config
        self._row_length, self._document_ids_T = row_length, document_ids_T

    def __call__(self, layer: int, q_THN: Tensor, k_TGN: Tensor, v_TGN: Tensor) -> Tensor:
        return self._ops.causal_attention(
            q_THN,
            k_TGN,
            v_TGN,
            self._row_length,
            self._config.scale,
            self._config.windows[layer],
            self._document_ids_T,
        )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, by architecture, biases, clipping and query/key norms."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.ops, self.layer = config, ops, layer
        width, q_size, kv_size = config.hidden_size, config.q_size, config.kv_size
        self.q_proj = Linear(ops, width, q_size, bias=config.qkv_bias, dtype=dtype)
        self.k_proj = Linear(ops, width, kv_size, bias=config.qkv_bias, dtype=dtype)
        self.v_proj = Linear(ops, width, kv_size, bias=config.qkv_bias, dtype=dtype)
        self.o_proj = Linear(ops, q_size, width, bias=config.output_bias, dtype=dtype)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(ops, q_size if full else config.head_dim, config.norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(ops, kv_size if full else config.head_dim, config.norm_eps, dtype=dtype)

    def _heads(self, x_TI: Tensor, norm: RMSNorm | None) -> Tensor:
        """Norm, clip and split into heads (T, heads, N)."""
        if norm is not None and self.config.qk_norm == "full":
            x_TI = norm(x_TI)
        if self.config.clip_qkv is not None:
            x_TI = x_TI.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        heads = x_TI.view(x_TI.shape[0], x_TI.shape[1] // self.config.head_dim, self.config.head_dim)
        if norm is not None and self.config.qk_norm == "head":
            heads = norm(heads)
        return heads

    def forward(self, x_TD: Tensor, cos_TR: Tensor, sin_TR: Tensor, attend: Attend) -> Tensor:
        q_THN = self.ops.rotary(self._heads(self.q_proj(x_TD), self.q_norm), cos_TR, sin_TR)
        k_TGN = self.ops.rotary(self._heads(self.k_proj(x_TD), self.k_norm), cos_TR, sin_TR)
        v_TGN = self._heads(self.v_proj(x_TD), None)
        out_TD: Tensor = self.o_proj(attend(self.layer, q_THN, k_TGN, v_TGN).flatten(1))
        return out_TD
