"""Attention over a paged cache in plain PyTorch. It loops over the sequences of a step that bring
more than one row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.cache_spec import (
    CacheSpec,
    Plane,
    check_key_offset,
    holds_latents,
    key_value_planes,
)
from moebius.ops.config import PLAIN_HEADS, HeadRows
from moebius.ops.interface import Ops
from moebius.ops.prepared import AttentionPlan, LayerCache, own
from moebius.ops.reference.codes import quantised, widened
from moebius.ops.steps import Rotation, Step, StepInputs

# Sequences that bring one row share a call where their visible tokens fill the same number of tiles
# of this size.
TILE = 64
# Layers' caches lie behind one another, and begin where any dtype may.
_ALIGNMENT = 4


@dataclass(frozen=True, slots=True)
class ReferenceCache(LayerCache):
    """One layer's keys and values: (blocks, block_size, G, N) and (..., Nv).

    scales       of keys and of values, (blocks, block_size, G), where these are codes
    key_offset   what keys are held less, (G, N)
    shared       values are a view of the first ones of keys
    """

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None = None
    key_offset: Tensor | None = None
    shared: bool = False

    @property
    def block_size(self) -> int:
        return self.k.shape[1]

    def write(self, k_TGN: Tensor, v_TGN: Tensor, slots_T: Tensor) -> None:
        """Rotated keys and values, codes of them where that is what there is."""
        if self.scales is None:
            planes = ((self.k, k_TGN), (self.v, v_TGN))
            for plane, new in planes[:1] if self.shared else planes:
                _put(plane, slots_T, new.to(plane.dtype))
            return
        held_TGN = k_TGN if self.key_offset is None else k_TGN - self.key_offset
        coded = zip((self.k, self.v), self.scales, (held_TGN, v_TGN), strict=True)
        for plane, scale, new in coded:
            codes, scales = quantised(new)
            _put(plane, slots_T, codes)
            _put(scale, slots_T, scales)

    def read(self, slots: Tensor, *, as_written: bool) -> tuple[Tensor, Tensor]:
        """Keys and values (..., G, N) in slots (...), codes widened to float32. as_written: what
        keys are held less is added back."""
        k = _taken(self.k, slots)
        v = k[..., : self.v.shape[3]] if self.shared else _taken(self.v, slots)
        if self.scales is None:
            return k, v
        k_scale, v_scale = self.scales
        k = widened(k, _taken(k_scale, slots))
        if as_written and self.key_offset is not None:
            k = k + self.key_offset
        return k, widened(v, _taken(v_scale, slots))


def _put(plane: Tensor, slots_T: Tensor, new: Tensor) -> None:
    """Entries of a plane (blocks, block_size, ...), whose blocks may lie apart."""
    if plane.is_contiguous():
        plane.flatten(0, 1).index_copy_(0, slots_T, new)
    else:
        size = plane.shape[1]
        plane.index_put_((slots_T // size, slots_T % size), new)


def _taken(plane: Tensor, slots: Tensor) -> Tensor:
    if plane.is_contiguous():
        return plane.flatten(0, 1)[slots]
    size = plane.shape[1]
    return plane[slots // size, slots % size]


def _planes_side_by_side(
    buffer: Tensor, kept: Sequence[Plane], block_size: int, blocks: int
) -> dict[str, Tensor]:
    """Each plane (blocks, block_size, ...), one behind the other."""
    planes = {}
    start = 0
    # Codes, of single bytes, behind what has to begin at even ones.
    for plane in sorted(kept, key=lambda plane: -plane.dtype.itemsize):
        stop = start + blocks * block_size * plane.nbytes
        shape = (blocks, block_size, *plane.shape)
        planes[plane.name] = buffer[start:stop].view(plane.dtype).view(shape)
        start = stop
    return planes


def _planes_of(
    buffer: Tensor, kept: Sequence[Plane], block_size: int, stride: int, block_bytes: int
) -> dict[str, Tensor]:
    """Each plane (blocks, block_size, ...) of blocks that lie `stride` bytes apart."""
    blocks = (len(buffer) + stride - block_bytes) // stride
    planes = {}
    start = 0
    for plane in sorted(kept, key=lambda plane: -plane.dtype.itemsize):
        size = plane.dtype.itemsize
        stop = start + (blocks - 1) * stride + block_size * plane.nbytes
        inner = torch.empty(block_size, *plane.shape, device="meta").stride()
        planes[plane.name] = (
            buffer[start:stop]
            .view(plane.dtype)
            .as_strided((blocks, block_size, *plane.shape), (stride // size, *inner))
        )
        start += block_size * plane.nbytes
    return planes


@dataclass(frozen=True, slots=True, eq=False)
class AttentionGroup:
    """Rows of a step that one call can serve.

    rows       the step's rows: a slice, or indices
    slots      (B, S) cache slots of the tokens that may be seen
    mask       which of them each row sees, (Q, S) or (B, 1, 1, S); None is causal
    one_row    each of the B sequences brings one row; otherwise B is 1
    distance   of each of them from each row, (Q, S) or (B, 1, S)
    """

    rows: slice | Tensor
    slots: Tensor
    mask: Tensor | None
    one_row: bool
    distance: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ReferencePlan(AttentionPlan):
    """The step's rows in as few calls as they need."""

    groups: list[AttentionGroup]


class AttentionOps(Ops):
    def rotate_and_store(
        self,
        qkv_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        q_norm_N: Tensor | None = None,
        k_norm_N: Tensor | None = None,
        eps: float = 0.0,
        heads: HeadRows = PLAIN_HEADS,
    ) -> Tensor:
        held = own(cache, ReferenceCache)
        kv_heads, size = held.k.shape[2:]
        value_size = held.v.shape[3]
        parts = heads.sizes(qkv_TI.shape[1], kv_heads, size, value_size)
        q_TI, k_TI, v_TI = torch.split(qkv_TI, parts, dim=1)
        rows = len(qkv_TI)
        of_head = 2 * size if heads.gated else size
        q_THN = q_TI.view(rows, parts[0] // of_head, of_head)[..., :size]

        def turned(x_THN: Tensor, norm_N: Tensor | None, *, wide: bool = False) -> Tensor:
            if heads.turned_first:
                x_THN = self.rotary(x_THN, rotation)
            if norm_N is not None:
                x_THN = self.rms_norm(x_THN, norm_N, eps)
            if wide:
                x_THN = x_THN.float()
            return x_THN if heads.turned_first else self.rotary(x_THN, rotation)

        if not heads.queries_alone:
            k_TGN = k_TI.view(rows, kv_heads, size)
            v_TGN = k_TGN if heads.keys_as_values else v_TI.view(rows, kv_heads, value_size)
            if heads.normed_values:
                v_TGN = self.rms_norm(v_TGN, torch.ones(value_size, device=v_TGN.device), eps)
            keys_TGN = turned(k_TGN, k_norm_N, wide=held.scales is not None)
            held.write(keys_TGN, v_TGN, slot_mapping_T)
        return turned(q_THN, q_norm_N)

    def cache_bytes_per_block(self, spec: CacheSpec, block_size: int) -> int:
        key_value_planes(spec)
        return -(-block_size * spec.bytes_per_token // _ALIGNMENT) * _ALIGNMENT

    def scratch_bytes(self, widest: int, spec: CacheSpec, block_size: int, context: int) -> int:
        return 0

    def make_cache(
        self,
        buffer: Tensor,
        spec: CacheSpec,
        block_size: int,
        key_offset_GN: Tensor | None = None,
        stride: int | None = None,
    ) -> LayerCache:
        keys, values = key_value_planes(spec)
        shared = holds_latents(spec)
        kept = (keys,) if shared else spec.token
        block_bytes = self.cache_bytes_per_block(spec, block_size)
        if stride is None:
            planes = _planes_side_by_side(buffer, kept, block_size, len(buffer) // block_bytes)
        else:
            planes = _planes_of(buffer, kept, block_size, stride, block_bytes)
        check_key_offset(spec, key_offset_GN)
        coded = "k_scale" in planes
        scales = (planes["k_scale"], planes["v_scale"]) if coded else None
        k = planes["k"]
        v = k[..., : values.shape[1]] if shared else planes["v"]
        return ReferenceCache(k, v, scales, key_offset_GN, shared)

    @property
    def cache_layout(self) -> str:
        return "k and v, each token, head, value"

    def block_memory(self, cache: LayerCache, block: int) -> Sequence[Tensor]:
        held = own(cache, ReferenceCache)
        planes = (held.k,) if held.shared else (held.k, held.v, *(held.scales or ()))
        return tuple(plane[block] for plane in planes)

    def plan_attention(
        self, step: Step, block_size: int, window: int | None = None
    ) -> AttentionPlan:
        given = own(step, StepInputs)
        starts = given.query_start_host
        lengths = given.seq_lens_host
        decodes: dict[int, list[int]] = {}
        groups: list[AttentionGroup] = []
        for b, seq_len in enumerate(lengths):
            rows = starts[b + 1] - starts[b]
            first = _first_key(given, b, window)
            if rows == 1 and not given.whole:
                decodes.setdefault(-(-(seq_len - first) // TILE), []).append(b)
            elif rows:
                groups.append(_plan_chunk(given, b, first, block_size, window))
        groups += [
            _plan_decodes(given, members, n * TILE, block_size, window)
            for n, members in decodes.items()
        ]
        return ReferencePlan(groups)

    def paged_attention(
        self,
        q_THN: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        scale: float,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
        bias_HR: Tensor | None = None,
    ) -> Tensor:
        held = own(cache, ReferenceCache)
        added = (softcap, sinks_H, bias_HR)
        out_THN = q_THN.new_empty((*q_THN.shape[:2], held.v.shape[3]))
        for group in own(plan, ReferencePlan).groups:
            out_THN[group.rows] = _attend(q_THN[group.rows], held, group, scale, *added)
        return out_THN


def visible(query_at: Tensor, key_at: Tensor, window: int | None) -> Tensor:
    """Which of the keys' positions (..., S) a query's position (..., Q) may see: (..., Q, S)
    bool."""
    distance = query_at.unsqueeze(-1) - key_at.unsqueeze(-2)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _first_key(step: StepInputs, b: int, window: int | None) -> int:
    """The first position that a row of sequence b sees."""
    first = 0 if step.first_keys_host is None else step.first_keys_host[b]
    if window is None:
        return first
    rows = step.query_start_host[b + 1] - step.query_start_host[b]
    return max(first, step.seq_lens_host[b] - rows - window + 1)


def by_distance(bias_HR: Tensor, distance: Tensor) -> Tensor:
    """What each head adds to scores of keys so far away (...): (H, ...)."""
    reach = bias_HR.shape[1] // 2
    return bias_HR[:, distance.clamp(-reach, reach) + reach]


def _plan_chunk(
    step: StepInputs, b: int, first: int, block_size: int, window: int | None
) -> AttentionGroup:
    """Sequence b's rows, several consecutive positions, over its tokens from position `first`."""
    start = step.query_start_host[b]
    stop = step.query_start_host[b + 1]
    seq_len = step.seq_lens_host[b]
    at_S = torch.arange(first, seq_len, device=step.block_table.device)
    slots_S = _slots(step.block_table[b], at_S, block_size)
    at_Q = torch.arange(seq_len - (stop - start), seq_len, device=at_S.device)
    distance = at_S - at_Q.unsqueeze(1)
    mask: Tensor | None = None
    if step.whole:
        mask = torch.ones_like(distance, dtype=torch.bool)
    elif len(at_Q) != len(at_S) or window is not None:
        mask = visible(at_Q, at_S, window)
    slots_1S = slots_S.unsqueeze(0)
    return AttentionGroup(slice(start, stop), slots_1S, mask, one_row=False, distance=distance)


def _plan_decodes(
    step: StepInputs, members: list[int], padded: int, block_size: int, window: int | None
) -> AttentionGroup:
    """One row each of several sequences, over as many tokens; positions beyond a sequence's end
    repeat its last."""
    device = step.block_table.device
    batch = torch.tensor(members, device=device)
    rows = torch.tensor([step.query_start_host[b] for b in members], device=device)
    last_B = torch.tensor([step.seq_lens_host[b] - 1 for b in members], device=device)
    first_B = torch.tensor([_first_key(step, b, window) for b in members], device=device)
    at_BS = first_B.unsqueeze(1) + torch.arange(padded, device=device)
    slots_BS = _slots(step.block_table[batch], at_BS.minimum(last_B.unsqueeze(1)), block_size)
    mask_B1S = visible(last_B.unsqueeze(1), at_BS, window)
    distance = (at_BS - last_B.unsqueeze(1)).unsqueeze(1)
    return AttentionGroup(rows, slots_BS, mask_B1S.unsqueeze(1), one_row=True, distance=distance)


def _slots(block_table: Tensor, at: Tensor, block_size: int) -> Tensor:
    """The slots of positions (..., S) in block tables (..., blocks)."""
    return block_table.long().gather(-1, at // block_size) * block_size + at % block_size


def _gather(
    q_QHN: Tensor, cache: ReferenceCache, group: AttentionGroup, *, shifts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries, keys and values, heads before tokens; in float32 where the cache has
    codes.

    Where each sequence brings one row, the query heads that share a key head become the rows of one
    product. shifts: all scores of a query may be more or less by the same.
    """
    count, heads, head_dim = q_QHN.shape
    kv_heads = cache.k.shape[2]
    if group.one_row:
        q = q_QHN.view(count, kv_heads, heads // kv_heads, head_dim)
    else:
        q = q_QHN.transpose(0, 1).unsqueeze(0)
    k, v = cache.read(group.slots, as_written=not shifts)
    if cache.scales is not None:
        q = q.float()
    return q, k.transpose(1, 2).to(q.dtype), v.transpose(1, 2).to(q.dtype)


def _attend(
    q_QHN: Tensor,
    cache: ReferenceCache,
    group: AttentionGroup,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    bias_HR: Tensor | None,
) -> Tensor:
    """Attention of a group's rows over the keys and values in its slots; by hand with capped
    scores, sinks or biases, which torch's fused attention has not."""
    plain = softcap is None and sinks_H is None and bias_HR is None
    q, k, v = _gather(q_QHN, cache, group, shifts=plain)
    share = q.shape[1] // k.shape[1]
    if plain:
        mask = group.mask
        whole = mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=share > 1
        )
    else:
        scores = (q @ k.repeat_interleave(share, 1).transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias_HR is not None:
            bias = by_distance(bias_HR, group.distance)
            scores = scores + (bias.movedim(0, 1).reshape_as(scores) if group.one_row else bias)
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
    out = out.to(q_QHN.dtype)
    return out.reshape(*q_QHN.shape[:2], -1) if group.one_row else out.squeeze(0).transpose(0, 1)
