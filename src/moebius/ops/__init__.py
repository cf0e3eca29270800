"""The operations that a decoder is made of: one name each, and which backend serves which device.

A backend is any object with the methods of `Ops`. `reference` (plain PyTorch) is the specification of all others, the
fallback on every device, and what training uses. A backend is chosen when a decoder is built and handed to its
modules; no global names it.

Legend of shape suffixes, used in all of the numerical code:
    T tokens of a step   B sequences   L rows whose logits are wanted   D model width   V vocabulary
    H query heads   G key/value heads   N head size   E experts   K experts a token   F expert width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.config import Activation, RouterConfig

if TYPE_CHECKING:
    from moebius.ops.steps import StepInputs


class ExpertWeights(NamedTuple):
    """One layer's experts: sequences of one tensor an expert, so that nothing mapped is ever stacked or copied.

    gate_FD, up_FD   E tensors (F, D)       down_DF   E tensors (D, F)
    the biases       E tensors each, (F,), (F,) and (D,), or empty for none
    """

    gate_FD: Sequence[Tensor]
    up_FD: Sequence[Tensor]
    down_DF: Sequence[Tensor]
    gate_bias_F: Sequence[Tensor] = ()
    up_bias_F: Sequence[Tensor] = ()
    down_bias_D: Sequence[Tensor] = ()


class Ops(Protocol):
    """What a backend computes. Results have the input's dtype unless told otherwise.

    name         names the backend in the fingerprint
    one_answer   a row's result depends on nothing but the row, bit for bit (promise P1)
    """

    name: str
    one_answer: bool

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b: (T, O)."""

    def logits(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x W^T + b in float32, never rounded to the model's dtype: (T, O) float32. For the vocabulary and routers."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, inside in float32 (arXiv 1910.07467)."""

    def rotary(self, x_THN: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate the first 2R of a head's N values, pairing i with i + R (arXiv 2104.09864); cos, sin float32."""

    def route(
        self, logits_TE: Tensor, config: RouterConfig, selection_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: weights (T, K) float32 and expert ids (T, K) int64, ties to the lowest id."""

    def experts(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        expert_ids_TK: Tensor | None,
        weights: ExpertWeights,
        activation: Activation,
    ) -> Tensor:
        """Gated feed-forward down(act(gate x) * up x) of each token's experts and their weighted sum: (T, D).

        Each expert's output is rounded to the model's dtype; the sum over k runs in routing order in float32.
        Without weights and ids there is one expert, which serves every token (a dense feed-forward).
        """

    def kv_cache_bytes_per_block(self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one layer needs for one block of `block_size` tokens."""

    def make_kv_cache(
        self, buffer: Tensor, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Any:
        """One layer's cache over `buffer` (bytes, uint8; a multiple of kv_cache_bytes_per_block). Its layout is the
        backend's own; hand it back to write_kv and paged_attention only."""

    def write_kv(self, cache: Any, k_TGN: Tensor, v_TGN: Tensor, slot_mapping_T: Tensor) -> None:
        """Store each token's key and value in its slot (block id * block_size + offset)."""

    def plan_attention(self, step: StepInputs, block_size: int, window: int | None = None) -> Any:
        """What paged_attention needs to know of a step, worked out once for all layers with the same window."""

    def paged_attention(self, q_THN: Tensor, cache: Any, plan: Any, scale: float) -> Tensor:
        """Causal attention of each row over its own sequence's cached keys and values: (T, H, N).

        The step's rows are its sequences' last tokens, in order, already written to the cache. A row at position p
        sees positions max(0, p - window + 1) to p.
        """

    def causal_attention(
        self,
        q_THN: Tensor,
        k_TGN: Tensor,
        v_TGN: Tensor,
        row_length: int,
        scale: float,
        window: int | None = None,
        document_ids_T: Tensor | None = None,
    ) -> Tensor:
        """Attention for training: T = R * row_length tokens in R packed rows, causal within each row (T, H, N).

        With document ids a token sees only tokens of its row that carry its id.
        """


def select_ops(device: torch.device | str, dtype: torch.dtype) -> Ops:
    """The fastest backend for weights of `dtype` on `device`."""
    from moebius.ops.reference import ReferenceOps

    return ReferenceOps()
