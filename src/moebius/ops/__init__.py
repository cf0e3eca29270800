"""The operations that a decoder is made of: one name each, and which backend serves which device.

A backend is any object with the methods of `Ops`. `reference` (plain PyTorch) is the specification of all others, the
fallback on every device, and what training uses; `cpu` is csrc's kernels. A backend is chosen when a decoder is built
and handed to its modules; no global names it.

Legend of shape suffixes, used in all of the numerical code:
    T tokens of a step   B sequences   L rows whose logits are wanted   D model width   V vocabulary
    H query heads   G key/value heads   N head size   E experts   K experts a token   F expert width
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.config import Activation, RouterConfig

if TYPE_CHECKING:
    from moebius.ops.steps import StepInputs


log = logging.getLogger(__name__)

Pair = tuple[Tensor, Tensor]
# A step's final hidden states (T, D).
Compute = Callable[["StepInputs"], Tensor]


class ExpertWeights(NamedTuple):
    """One layer's experts: sequences of one tensor an expert, so that nothing mapped is ever stacked or copied.

    gate_FD, up_FD   E tensors (F, D); up is empty where experts have two matrices      down_DF   E tensors (D, F)
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

    def capture(self, compute: Compute, example: StepInputs, max_tokens: int) -> Compute:
        """A function that computes what `compute` does, in fewer calls where the backend can: it may record what
        `compute` calls on `example`, a step of one token, for steps of up to max_tokens (as CUDA graphs do). Its
        result may be overwritten by its next call."""

    def embed(self, input_ids_T: Tensor, table_VD: Tensor, multiplier: float = 1.0) -> Tensor:
        """multiplier * table[input_ids]: (T, D)."""

    def prepare_linear(self, *layers: tuple[Tensor, Tensor | None]) -> Any:
        """What `linear` needs to know of linear layers of one input, (weight (O, I), bias (O,) or None) each, worked
        out once; the tensors stay where they are."""

    def linear(self, x_TI: Tensor, layers: Any) -> Tensor:
        """x W^T + b of each of prepare_linear's layers, side by side: (T, sum of O)."""

    def logits(self, x_TI: Tensor, layers: Any) -> Tensor:
        """The same in float32, never rounded to the model's dtype. For the vocabulary and for routers."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, inside in float32 (arXiv 1910.07467)."""

    def add_rms_norm(self, x_TD: Tensor, update_TD: Tensor, multiplier: float, weight_D: Tensor, eps: float) -> Pair:
        """The residual stream x + multiplier * update, and its rms_norm."""

    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        """x with rms_norm over its columns from `start`, as many as the weight has; x itself may be changed."""

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        """cos and sin (T, R) float32, times `factor`, of positions (int64) times inverse frequencies (float32)."""

    def rotary(self, x_THN: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate the first 2R of a head's N values, pairing i with i + R (arXiv 2104.09864); cos, sin float32."""

    def rotate_and_store(
        self,
        qkv_TI: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        cache: Any,
        slot_mapping_T: Tensor,
        q_norm_N: Tensor | None = None,
        k_norm_N: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """The queries (T, H, N) of a step's query, key and value heads, which lie side by side: (T, (H + 2G) * N).

        Normed per head where a weight is given, then rotated. Keys, made likewise, and values go to the tokens' slots
        (block id * block_size + offset).
        """

    def route(self, logits_TE: Tensor, config: RouterConfig, selection_bias_E: Tensor | None = None) -> Pair:
        """Choose experts: weights (T, K) float32 and expert ids (T, K) int64, ties to the lowest id."""

    def prepare_experts(self, weights: ExpertWeights, activation: Activation) -> Any:
        """What `experts` needs to know of one layer's experts, worked out once; the tensors stay where they are."""

    def experts(self, x_TD: Tensor, weights_TK: Tensor | None, expert_ids_TK: Tensor | None, experts: Any) -> Tensor:
        """Gated feed-forward down(act(gate x) * up x) of each token's experts and their weighted sum: (T, D).

        Each expert's output is rounded to the model's dtype; the sum over k runs in routing order in float32. Without
        up it is down(act(gate x)), and an id of E stands for no expert: both for training, by `reference` alone.
        Without weights and ids there is one expert, which serves every token (a dense feed-forward).
        """

    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        """a + sigmoid(gate) * b, with float32 gates; a + b without: how a shared expert joins the others."""

    def kv_cache_bytes_per_block(self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one layer needs for one block of `block_size` tokens."""

    def make_kv_cache(
        self, buffer: Tensor, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Any:
        """One layer's cache over `buffer` (bytes, uint8; a multiple of kv_cache_bytes_per_block). Its layout is the
        backend's own; hand it back to rotate_and_store and paged_attention only."""

    def plan_attention(self, step: StepInputs, block_size: int, window: int | None = None) -> Any:
        """What paged_attention needs to know of a step, worked out once for all layers with the same window."""

    def paged_attention(
        self,
        q_THN: Tensor,
        cache: Any,
        plan: Any,
        scale: float,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of each row over its own sequence's cached keys and values: (T, H, N).

        The step's rows are its sequences' last tokens, in order, already written to the cache. A row at position p
        sees positions max(0, p - window + 1) to p. softcap: scores become c * tanh(scores / c) (Gemma 2, arXiv
        2408.00118). sinks_H: float32 scores of one more key a head, without a value (gpt-oss, arXiv 2508.10925).
        """

    def argmax(self, logits_LV: Tensor) -> Pair:
        """The most likely id of each row, ties to the lowest, (L,) int64, and whether all its logits are finite, (L,)
        bool; where they are not, the id means nothing."""

    def log_softmax_top_k(self, logits_LV: Tensor, k: int, temperature_L: Tensor | None = None) -> Pair:
        """What sampling needs of each row: logsumexp(logits / temperature) and the k most likely ids.

        logits float32, temperatures float32 (None for 1). (L,) float64, NaN where a logit is not finite, and (L, min(k,
        V)) int64, largest first, ties to the lowest id; of a row that is not finite the ids mean nothing.
        """

    def draw(self, logits_LV: Tensor, temperature_L: Tensor, uniform_L: Tensor) -> Tensor:
        """Of each row the first id whose exp(logit / temperature), summed in float64 with those of all ids before it,
        exceeds uniform (float64, between 0 and 1) times the whole sum: (L,) int64."""


def select_ops(device: torch.device | str, dtype: torch.dtype, threads: int | None = None) -> Ops:
    """The fastest backend for weights of `dtype` on `device`; `threads` of a CPU's, None for all that we may use.

    MOEBIUS_CPU_ISA=reference asks for plain PyTorch. Raises ConfigError for an instruction set that is not there.
    """
    from moebius.ops.reference import ReferenceOps

    if torch.device(device).type != "cpu" or os.environ.get("MOEBIUS_CPU_ISA") == "reference":
        return ReferenceOps()
    try:
        from moebius.ops.cpu import CpuOps
    except ImportError:
        log.warning(
            "the compiled kernels are missing: plain PyTorch serves, several times slower and without one answer in "
            "every batch; install a C++17 compiler (Debian: apt install g++) and install moebius again"
        )
        return ReferenceOps()
    return CpuOps(threads)
