"""Every operation in plain PyTorch: the specification of the other backends, the fallback, and what
training uses.

Everything but the KV cache is differentiable. Nothing loops over tokens; paged attention loops over
the sequences of a step that bring more than one row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.config import Activation, RouterConfig
from moebius.ops.routing import count, route
from moebius.ops.sampling import SamplingOps
from moebius.ops.steps import (
    Captured,
    Compute,
    ExpertWeights,
    Logits,
    Pair,
    RouterTally,
    StepInputs,
)

# Sequences that bring one row share a call where their visible tokens fill the same number of tiles
# of this size.
TILE = 64
# Rows of a low-precision vocabulary matrix that are widened to float32 at a time.
LOGITS_ROWS = 16_384

Hidden = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class ReferenceCache:
    """One layer's keys and values: each (blocks, block_size, G, N)."""

    k: Tensor
    v: Tensor

    @property
    def block_size(self) -> int:
        return self.k.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """Rows of a step that one call can serve.

    rows       the step's rows: a slice, or indices
    slots      (B, S) cache slots of the tokens that may be seen
    mask       which of them each row sees, (Q, S) or (B, 1, 1, S); None is causal
    one_row    each of the B sequences brings one row; otherwise B is 1
    """

    rows: slice | Tensor
    slots: Tensor
    mask: Tensor | None
    one_row: bool


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The feed-forward's nonlinearity."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products run in: autocast's dtype where it is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class ReferenceOps(SamplingOps):
    """What a backend computes; here in plain PyTorch on any device, held to a tolerance, not to
    bits: torch picks its kernels by shape. Results have the input's dtype unless told otherwise.

    name         names the backend in the fingerprint
    one_answer   a row's result depends on nothing but the row, bit for bit (promise P1)
    """

    name = "reference"
    one_answer = False
    # Whether ids may stand for no expert: to look costs a wait for the device.
    drops = False

    def capture(
        self, compute: Compute, logits: Logits, example: StepInputs, max_tokens: int
    ) -> Captured:
        """What computes a step of up to max_tokens as `compute` does, and `logits` of rows of the
        last step's result.

        A backend may record what is called on `example`, a step of one token, and call that again
        (as CUDA graphs do). Results may be overwritten by the next call."""
        return compute, lambda x_TD, rows: logits(
            x_TD, torch.tensor(rows, dtype=torch.int64, device=x_TD.device)
        )

    def embed(self, input_ids_T: Tensor, table_VD: Tensor, multiplier: float = 1.0) -> Tensor:
        """multiplier * table[input_ids]: (T, D)."""
        x_TD = F.embedding(input_ids_T, table_VD)
        return x_TD if multiplier == 1.0 else x_TD * multiplier

    def prepare_linear(self, *layers: tuple[Tensor, Tensor | None]) -> Any:
        """What `linear` needs to know of linear layers of one input, (weight (O, I), bias (O,) or
        None) each, worked out once; the tensors stay where they are."""
        return layers

    def linear(self, x_TI: Tensor, layers: Any) -> Tensor:
        """x W^T + b of each of prepare_linear's layers, side by side: (T, sum of O)."""
        outs = [F.linear(x_TI, weight_OI, bias_O) for weight_OI, bias_O in layers]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def logits(self, x_TI: Tensor, layers: Any) -> Tensor:
        """The same in float32, never rounded to the model's dtype. For the vocabulary and for
        routers."""
        ((weight_OI, bias_O),) = layers
        with torch.autocast(x_TI.device.type, enabled=False):
            x = x_TI.float()
            bias = None if bias_O is None else bias_O.float()
            if (
                weight_OI.dtype == torch.float32
                or torch.is_grad_enabled()
                or weight_OI.shape[0] <= LOGITS_ROWS
            ):
                return F.linear(x, weight_OI.float(), bias)
            parts = [F.linear(x, rows.float()) for rows in torch.split(weight_OI, LOGITS_ROWS)]
            out = torch.cat(parts, dim=-1)
            return out if bias is None else out + bias

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, inside in float32 (arXiv
        1910.07467)."""
        x = x_TD.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x.to(x_TD.dtype) * weight_D.to(x_TD.dtype)

    def add_rms_norm(
        self, x_TD: Tensor, update_TD: Tensor, multiplier: float, weight_D: Tensor, eps: float
    ) -> Pair:
        """The residual stream x + multiplier * update, and its rms_norm."""
        x_TD = x_TD + (update_TD if multiplier == 1.0 else update_TD * multiplier)
        return x_TD, self.rms_norm(x_TD, weight_D, eps)

    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        """x with rms_norm over its columns from `start`, as many as the weight has; x itself may be
        changed."""
        before_TI, part_TD, after_TI = torch.tensor_split(
            x_TI, (start, start + len(weight_D)), dim=1
        )
        return torch.cat((before_TI, self.rms_norm(part_TD, weight_D, eps), after_TI), dim=1)

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        """cos and sin (T, R) float32, times `factor`, of positions (int64) times inverse
        frequencies (float32)."""
        angles_TR = positions_T.float().unsqueeze(1) * inverse_R
        return angles_TR.cos() * factor, angles_TR.sin() * factor

    def rotary(self, x_THN: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate the first 2R of a head's N values, pairing i with i + R (arXiv 2104.09864); cos,
        sin float32."""
        half = cos_TR.shape[-1]
        cos, sin = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
        a, b, rest = x_THN[..., :half], x_THN[..., half : 2 * half], x_THN[..., 2 * half :]
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THN.dtype)
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated

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
        """The queries (T, H, N) of a step's query, key and value heads, which lie side by side: (T,
        (H + 2G) * N).

        Normed per head where a weight is given, then rotated. Keys, made likewise, and values go to
        the tokens' slots (block id * block_size + offset).
        """
        heads_TXN = qkv_TI.view(
            len(qkv_TI), qkv_TI.shape[1] // cache.k.shape[-1], cache.k.shape[-1]
        )
        kv_heads = cache.k.shape[2]
        q_THN, k_TGN, v_TGN = torch.split(
            heads_TXN, [heads_TXN.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1
        )
        if q_norm_N is not None:
            q_THN = self.rms_norm(q_THN, q_norm_N, eps)
        if k_norm_N is not None:
            k_TGN = self.rms_norm(k_TGN, k_norm_N, eps)
        for store, new in ((cache.k, self.rotary(k_TGN, cos_TR, sin_TR)), (cache.v, v_TGN)):
            store.flatten(0, 1).index_copy_(0, slot_mapping_T, new.to(store.dtype))
        return self.rotary(q_THN, cos_TR, sin_TR)

    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
    ) -> Pair:
        """Choose experts: weights (T, K) float32 and expert ids (T, K) int64, ties to the lowest
        id. What was chosen is added to the tally, where there is one."""
        weights_TK, ids_TK = route(logits_TE, config, selection_bias_E)
        if tally is not None:
            count(tally, logits_TE, ids_TK, config)
        return weights_TK, ids_TK

    def prepare_experts(self, weights: ExpertWeights, activation: Activation) -> Any:
        """What `experts` needs to know of one layer's experts, worked out once; the tensors stay
        where they are."""
        return weights, activation

    def experts(
        self, x_TD: Tensor, weights_TK: Tensor | None, expert_ids_TK: Tensor | None, experts: Any
    ) -> Tensor:
        """Gated feed-forward down(act(gate x) * up x) of each token's experts and their weighted
        sum: (T, D).

        Each expert's output is rounded to the model's dtype; the sum over k runs in routing order
        in float32. Without up it is down(act(gate x)), and an id of E stands for no expert: both
        for training, by `reference` alone. Without weights and ids there is one expert, which
        serves every token (a dense feed-forward).
        """
        weights, activation = experts

        def hidden(gate: Tensor, up: Tensor | None) -> Tensor:
            inner = activate(gate, activation)
            return self.dropout(
                inner if up is None else inner * up, routed=expert_ids_TK is not None
            )

        if weights_TK is None or expert_ids_TK is None:
            return _one_expert(x_TD, weights, 0, hidden)
        (tokens, k), count = expert_ids_TK.shape, len(weights.gate_FD)
        flat_ids = expert_ids_TK.reshape(-1)
        order = torch.argsort(flat_ids, stable=True)
        chosen = order[: int((flat_ids < count).sum())] if self.drops else order
        rows_PD = x_TD.index_select(0, chosen.div(k, rounding_mode="floor") if k > 1 else chosen)
        if torch.is_grad_enabled() and _can_stack(weights, x_TD):
            every_E = torch.arange(count, device=x_TD.device)
            ends = torch.searchsorted(flat_ids[order], every_E, right=True)
            out_PD = _experts_stacked(rows_PD, ends.to(torch.int32), weights, hidden)
        else:
            counts = torch.bincount(flat_ids, minlength=count)[:count].tolist()
            out_PD = _experts_in_turn(rows_PD, counts, weights, hidden)
        if len(chosen) < len(order):
            out_PD = torch.cat(
                (out_PD, out_PD.new_zeros(len(order) - len(chosen), out_PD.shape[1]))
            )
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel(), device=order.device)
        out_TKD = out_PD.index_select(0, position).view(tokens, k, x_TD.shape[-1])
        return combine(out_TKD, weights_TK).to(x_TD.dtype)

    def dropout(self, x: Tensor, *, routed: bool) -> Tensor:
        """What fine-tuning does to the inner values of a feed-forward, of experts behind a router
        or of a dense one."""
        return x

    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        """a + sigmoid(gate) * b, with float32 gates; a + b without: how a shared expert joins the
        others."""
        return a_TD + (b_TD if gate_T1 is None else (torch.sigmoid(gate_T1) * b_TD).to(b_TD.dtype))

    def kv_cache_bytes_per_block(
        self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes that one layer needs for one block of `block_size` tokens."""
        return 2 * block_size * num_kv_heads * head_dim * dtype.itemsize

    def make_kv_cache(
        self, buffer: Tensor, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Any:
        """One layer's cache over `buffer` (bytes, uint8; a multiple of kv_cache_bytes_per_block).
        Its layout is the backend's own; hand it back to rotate_and_store and paged_attention
        only."""
        k, v = buffer.view(dtype).view(2, -1, block_size, num_kv_heads, head_dim)
        return ReferenceCache(k, v)

    cache_layout = "k and v, each token, head, value"
    """Names the order of values in a block, for bytes that leave the cache and come back."""

    def block_memory(self, cache: Any, block: int) -> Sequence[Tensor]:
        """All of what a layer's cache holds of a block, as tensors over its memory."""
        return (cache.k[block], cache.v[block])

    def plan_attention(self, step: StepInputs, block_size: int, window: int | None = None) -> Any:
        """What paged_attention needs to know of a step, worked out once for all layers with the
        same window."""
        starts, lengths = step.query_start_host, step.seq_lens_host
        decodes: dict[int, list[int]] = {}
        groups = []
        for b, seq_len in enumerate(lengths):
            rows = starts[b + 1] - starts[b]
            first = 0 if window is None else max(0, seq_len - rows - window + 1)
            if rows == 1:
                decodes.setdefault(-(-(seq_len - first) // TILE), []).append(b)
            elif rows > 1:
                groups.append(_plan_chunk(step, b, first, block_size, window))
        groups += [
            _plan_decodes(step, members, n * TILE, block_size, window)
            for n, members in decodes.items()
        ]
        return groups

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

        The step's rows are its sequences' last tokens, in order, already written to the cache. A
        row at position p sees positions max(0, p - window + 1) to p. softcap: scores become c *
        tanh(scores / c) (Gemma 2, arXiv 2408.00118). sinks_H: float32 scores of one more key a
        head, without a value (gpt-oss, arXiv 2508.10925).
        """
        out_THN = torch.empty_like(q_THN)
        for group in plan:
            out_THN[group.rows] = _attend(q_THN[group.rows], cache, group, scale, softcap, sinks_H)
        return out_THN


def visible(query_at: Tensor, key_at: Tensor, window: int | None) -> Tensor:
    """Which of the keys' positions (..., S) a query's position (..., Q) may see: (..., Q, S)
    bool."""
    distance = query_at.unsqueeze(-1) - key_at.unsqueeze(-2)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def combine(out_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum over k, in routing order, in float32: (T, D) float32."""
    total = out_TKD[:, 0].float() * weights_TK[:, :1]
    for k in range(1, out_TKD.shape[1]):
        total = torch.addcmul(total, out_TKD[:, k].float(), weights_TK[:, k : k + 1])
    return total


def _bias(biases: Sequence[Tensor], e: int) -> Tensor | None:
    return biases[e] if biases else None


def _one_expert(x_TD: Tensor, w: ExpertWeights, e: int, hidden: Hidden) -> Tensor:
    gate = F.linear(x_TD, w.gate_FD[e], _bias(w.gate_bias_F, e))
    up = F.linear(x_TD, w.up_FD[e], _bias(w.up_bias_F, e)) if w.up_FD else None
    return F.linear(hidden(gate, up), w.down_DF[e], _bias(w.down_bias_D, e))


def _experts_in_turn(
    rows_PD: Tensor, counts: list[int], w: ExpertWeights, hidden: Hidden
) -> Tensor:
    """Rows sorted by expert through their experts, one product an expert that has rows; no weight
    is copied."""
    parts = [
        _one_expert(rows, w, e, hidden)
        for e, rows in enumerate(torch.split(rows_PD, counts))
        if len(rows)
    ]
    return torch.cat(parts) if parts else rows_PD.new_zeros(rows_PD.shape)


def _can_stack(w: ExpertWeights, x_TD: Tensor) -> bool:
    """torch.grouped_mm wants rows of a multiple of 16 bytes, bfloat16 on a GPU, and adds no
    bias."""
    dtype = _compute_dtype(x_TD)
    if w.down_bias_D or (x_TD.is_cuda and dtype != torch.bfloat16):
        return False
    return all(size * dtype.itemsize % 16 == 0 for size in w.gate_FD[0].shape)


def _experts_stacked(rows_PD: Tensor, ends_E: Tensor, w: ExpertWeights, hidden: Hidden) -> Tensor:
    """The same in two or three grouped products, for training: few launches, no wait for the device
    to count rows."""
    dtype = _compute_dtype(rows_PD)
    rows = rows_PD.to(dtype)

    def product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return F.grouped_mm(x, torch.stack(tuple(weights)).to(dtype).transpose(1, 2), offs=ends_E)

    gated = hidden(product(rows, w.gate_FD), product(rows, w.up_FD) if w.up_FD else None)
    return product(gated, w.down_DF)


def _plan_chunk(
    step: StepInputs, b: int, first: int, block_size: int, window: int | None
) -> AttentionGroup:
    """Sequence b's rows, several consecutive positions, over its tokens from position `first`."""
    start, stop, seq_len = (
        step.query_start_host[b],
        step.query_start_host[b + 1],
        step.seq_lens_host[b],
    )
    at_S = torch.arange(first, seq_len, device=step.block_table.device)
    slots_S = _slots(step.block_table[b], at_S, block_size)
    whole = stop - start == seq_len and window is None
    mask = None if whole else visible(at_S[start - stop :], at_S, window)
    return AttentionGroup(slice(start, stop), slots_S.unsqueeze(0), mask, one_row=False)


def _plan_decodes(
    step: StepInputs, members: list[int], padded: int, block_size: int, window: int | None
) -> AttentionGroup:
    """One row each of several sequences, over as many tokens; positions beyond a sequence's end
    repeat its last."""
    device = step.block_table.device
    batch = torch.tensor(members, device=device)
    rows = torch.tensor([step.query_start_host[b] for b in members], device=device)
    last_B = torch.tensor([step.seq_lens_host[b] - 1 for b in members], device=device)
    first_B = torch.zeros_like(last_B) if window is None else (last_B - window + 1).clamp(min=0)
    at_BS = first_B.unsqueeze(1) + torch.arange(padded, device=device)
    slots_BS = _slots(step.block_table[batch], at_BS.minimum(last_B.unsqueeze(1)), block_size)
    mask_B1S = visible(last_B.unsqueeze(1), at_BS, window)
    return AttentionGroup(rows, slots_BS, mask_B1S.unsqueeze(1), one_row=True)


def _slots(block_table: Tensor, at: Tensor, block_size: int) -> Tensor:
    """The slots of positions (..., S) in block tables (..., blocks)."""
    return block_table.long().gather(-1, at // block_size) * block_size + at % block_size


def _gather(
    q_QHN: Tensor, cache: ReferenceCache, group: AttentionGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries, keys and values, heads before tokens.

    Where each sequence brings one row, the query heads that share a key head become the rows of one
    product.
    """
    count, heads, head_dim = q_QHN.shape
    kv_heads = cache.k.shape[2]
    if group.one_row:
        q = q_QHN.view(count, kv_heads, heads // kv_heads, head_dim)
    else:
        q = q_QHN.transpose(0, 1).unsqueeze(0)
    k, v = (
        store.flatten(0, 1)[group.slots].transpose(1, 2).to(q.dtype) for store in (cache.k, cache.v)
    )
    return q, k, v


def _attend(
    q_QHN: Tensor,
    cache: ReferenceCache,
    group: AttentionGroup,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Attention of a group's rows over the keys and values in its slots; by hand with capped scores
    or sinks, which torch's fused attention has not."""
    q, k, v = _gather(q_QHN, cache, group)
    share = q.shape[1] // k.shape[1]
    if softcap is None and sinks_H is None:
        mask, whole = group.mask, group.mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=share > 1
        )
    else:
        scores = (q @ k.repeat_interleave(share, 1).transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(scores.shape[-1], device=q.device)
        scores = scores.masked_fill(
            ~(visible(at, at, None) if group.mask is None else group.mask), -torch.inf
        )
        if sinks_H is not None:
            by_head = (1, k.shape[1], -1, 1) if group.one_row else (1, -1, 1, 1)
            scores = torch.cat(
                (scores, sinks_H.float().view(by_head).expand(*scores.shape[:-1], 1)), dim=-1
            )
        weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]].to(q.dtype)
        out = weights @ v.repeat_interleave(share, 1)
    return out.reshape(q_QHN.shape) if group.one_row else out.squeeze(0).transpose(0, 1)
