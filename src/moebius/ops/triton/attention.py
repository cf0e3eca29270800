"""Attention over a paged cache by Triton kernels, in the reference's layout of the cache.

A token's heads stand side by side in it, each head's values one after the other: a tile of keys is
rows of a head's size, read whole.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moebius.ops.cache_spec import CacheSpec
from moebius.ops.capability import Operation
from moebius.ops.config import PLAIN_HEADS, HeadRows
from moebius.ops.prepared import AttentionPlan, LayerCache, own
from moebius.ops.reference.attention import ReferenceCache
from moebius.ops.steps import Rotation, Step, StepInputs
from moebius.ops.transfer import send
from moebius.ops.triton import linear
from moebius.ops.triton.kernels import attention as kernels
from moebius.ops.triton.store import rotated_and_stored
from moebius.ops.triton.tiles import ManyRows, SizedOps, enough
from moebius.ops.triton.weights import DTYPES

OPERATIONS = frozenset({Operation.ROTATE_AND_STORE, Operation.PAGED_ATTENTION})

# Keys are split at multiples of this, which is one of all tiles of keys.
SPLIT = 512
# A sequence that brings up to as many rows has a program for each of its splits, as its tiles alone
# are too few for a card; a longer chunk has many tiles, each of which goes through all splits.
ROWS_IN_PARTS = 16
# What the parts of splits may take at a time. More of them are made, and joined, one launch after
# the other; a tile whose parts alone take more has one program, which gives the same bits.
PARTS_BYTES = 2**27
_LOG2_E = math.log2(math.e)
# Products and sums are fused where the kernels say so: what the compiler makes of the same lines
# in another kernel, or beside others, is another row's bits.
_AS_WRITTEN = {"enable_fp_fusion": False}


def computes(dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Whether the kernels take rows of `dtype` beside such a cache."""
    return dtype in DTYPES and cache_dtype in (dtype, torch.int8)


class Sizes(NamedTuple):
    """What a kernel is compiled for.

    entries   pairs of a row and a query head in a tile
    keys      in a tile
    """

    entries: int
    keys: int
    warps: int
    stages: int

    def heads(self, share: int) -> int:
        """Query heads in a tile, of `share` that have one key head."""
        return min(1 << (share - 1).bit_length(), self.entries)

    def rows(self, share: int) -> int:
        """Rows in a tile."""
        return self.entries // self.heads(share)


def sizes_of(key_size: int, value_size: int, dtype: torch.dtype, *, codes: bool = False) -> Sizes:
    """For heads of these sizes: no more registers than two sums of values leave, and no more shared
    memory than 99 KiB, what a block of threads of the smaller chips since Ampere has.

    A decode leaves most of a tile empty: its products are still faster than its keys come. codes:
    the cache's, which take registers to be widened in.
    """
    widest = max(key_size, value_size)
    if widest <= 128:
        found = Sizes(entries=64, keys=64, warps=4, stages=2)
    elif widest <= 256:
        found = Sizes(entries=64, keys=32, warps=8, stages=2)
    else:
        found = Sizes(entries=32, keys=32, warps=8, stages=1)
    if dtype == torch.float32:
        found = found._replace(keys=max(16, found.keys // 2), stages=1)
    elif codes:
        found = found._replace(keys=32)
    return found


def sizes_for_many(sizes: Sizes, dtype: torch.dtype) -> Sizes:
    """For prompts' rows, which fill larger tiles and so read a key for more of them at once.

    A row is computed by the same instructions: there are as many warps more as there are entries,
    each with all keys of its own entries, and keys are tiled alike. Heads beyond 128 values leave
    no registers for that.
    """
    if sizes.warps > 4 or dtype.itemsize != 2:
        return sizes
    return sizes._replace(entries=2 * sizes.entries, warps=2 * sizes.warps)


def key_tiles(size: int) -> tuple[int, int]:
    """A head's values as a power of two and a smaller one, or 0: 80 are 64 and 16."""
    whole = max(16, triton.next_power_of_2(size))
    if whole == size or size <= 16:
        return whole, 0
    rest = max(16, triton.next_power_of_2(size - whole // 2))
    return (whole, 0) if rest == whole // 2 else (whole // 2, rest)


class Tiles(NamedTuple):
    """Tiles of a step's rows, (P, 6) int32 each, as kernels/attention.py reads them.

    chunks          of sequences with many rows; one program goes through all splits
    in_order        of those with few, which have one split
    in_parts        of those with few and several splits, which have a program each
    splits          the most that one of `in_parts` has
    rows_in_parts   of all of `in_parts` together
    most_rows       of one of them
    """

    chunks: Tensor
    in_order: Tensor
    in_parts: Tensor
    splits: int
    rows_in_parts: int
    most_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class TritonPlan(AttentionPlan):
    """What the kernels read of a step.

    rows_seen_T3   int32: of each row the first key that it sees, the one behind the last, and its
                   own position; on the host
    tiles          by how many rows are in a tile
    """

    step: StepInputs
    block_size: int
    window: int | None
    rows_seen_T3: Tensor
    on_device: Tensor
    tiles: dict[int, Tiles] = field(default_factory=dict)

    def of_rows(self, rows: int) -> Tiles:
        """Tiles of up to so many rows of one sequence, made once for all layers."""
        if rows not in self.tiles:
            self.tiles[rows] = _tiles(self.step, self.rows_seen_T3, rows)
        return self.tiles[rows]


def _rows_seen(step: StepInputs, window: int | None) -> Tensor:
    """(T, 3) int32, as in TritonPlan. Raises ValueError for first keys of other sequences, or
    behind the first row."""
    start_B = torch.tensor(step.query_start_host, dtype=torch.int64)
    keys_B = torch.tensor(step.seq_lens_host, dtype=torch.int64)
    rows_B = start_B.diff()
    position_T = torch.arange(int(start_B[-1])) + (keys_B - start_B[1:]).repeat_interleave(rows_B)
    first_B = torch.zeros_like(keys_B)
    if step.first_keys_host is not None:
        if len(step.first_keys_host) != len(keys_B):
            raise ValueError(
                f"first keys of {len(step.first_keys_host)} sequences, where there are "
                f"{len(keys_B)}"
            )
        first_B = torch.tensor(step.first_keys_host, dtype=torch.int64)
        for first, rows, keys in zip(first_B, rows_B, keys_B, strict=True):
            if rows and not 0 <= first <= keys - rows:
                raise ValueError(
                    f"a sequence of {keys} tokens, {rows} of them new, sees none before {first}"
                )
    low_T = first_B.repeat_interleave(rows_B)
    high_T = position_T + 1
    if step.whole:
        high_T = keys_B.repeat_interleave(rows_B)
    if window is not None:
        low_T = torch.maximum(low_T, position_T - window + 1)
    return torch.stack((low_T, high_T, position_T), dim=1).int()


def _tiles(step: StepInputs, seen_T3: Tensor, rows: int) -> Tiles:
    start_B = torch.tensor(step.query_start_host, dtype=torch.int64)
    rows_B = start_B.diff()
    tiles_B = -(-rows_B // rows)
    sequence_P = torch.arange(len(rows_B)).repeat_interleave(tiles_B)
    place_P = torch.arange(len(sequence_P)) - (tiles_B.cumsum(0) - tiles_B)[sequence_P]
    first_P = start_B[sequence_P] + place_P * rows
    count_P = (start_B[sequence_P + 1] - first_P).clamp(max=rows)
    low_P = seen_T3[first_P, 0].long()
    high_P = seen_T3[first_P + count_P - 1, 1].long()
    splits_P = -(-high_P // SPLIT) - low_P // SPLIT
    few_P = rows_B[sequence_P] <= ROWS_IN_PARTS
    parted_P = few_P & (splits_P > 1)
    parted_count_P = count_P.where(parted_P, 0)
    part_row_P = parted_count_P.cumsum(0) - parted_count_P
    columns = (sequence_P, first_P, count_P, low_P, high_P, part_row_P)
    tiles_P6 = torch.stack(columns, dim=1).int()
    return Tiles(
        send(tiles_P6[~few_P], step.device),
        send(tiles_P6[few_P & ~parted_P], step.device),
        send(tiles_P6[parted_P], step.device),
        int(splits_P.where(parted_P, 0).amax()) if len(splits_P) else 0,
        int(parted_count_P.sum()),
        int(parted_count_P.amax()) if len(splits_P) else 0,
    )


class AttentionOps(SizedOps):
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
        if held.shared or not computes(qkv_TI.dtype, held.k.dtype):
            return super().rotate_and_store(
                qkv_TI, rotation, cache, slot_mapping_T, q_norm_N, k_norm_N, eps, heads
            )
        norms = (q_norm_N, k_norm_N, eps)
        return rotated_and_stored(qkv_TI, rotation, held, slot_mapping_T, norms, heads)

    def scratch_bytes(self, widest: int, spec: CacheSpec, block_size: int, context: int) -> int:
        """The parts of splits; what else is allocated lives as long as a step's activations."""
        parts = PARTS_BYTES if context > SPLIT else 0
        return parts + (linear.PARTS_BYTES if widest >= linear.LONG else 0)

    def plan_attention(
        self, step: Step, block_size: int, window: int | None = None
    ) -> AttentionPlan:
        given = own(step, StepInputs)
        seen_T3 = _rows_seen(given, window)
        return TritonPlan(given, block_size, window, seen_T3, send(seen_T3, given.device))

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
        planned = own(plan, TritonPlan)
        if not computes(q_THN.dtype, held.k.dtype):
            plain = super().plan_attention(planned.step, planned.block_size, planned.window)
            return super().paged_attention(q_THN, cache, plain, scale, softcap, sinks_H, bias_HR)
        scores = _Scores(scale, softcap, sinks_H, bias_HR)
        _check_shapes(q_THN, held, scores)
        return _attend(q_THN.contiguous(), held, planned, scores, self.many_rows)


class _Scores(NamedTuple):
    """What becomes of products of queries and keys, as Ops.paged_attention has it."""

    scale: float
    softcap: float | None
    sinks_H: Tensor | None
    bias_HR: Tensor | None


def _check_shapes(q_THN: Tensor, held: ReferenceCache, scores: _Scores) -> None:
    """Raises ValueError for queries, sinks or biases that do not go with one another."""
    key_heads, key_size = held.k.shape[2:]
    heads, size = q_THN.shape[1:]
    if heads < 1 or heads % key_heads or size != key_size:
        raise ValueError(
            f"{heads} query heads of {size} values cannot share {key_heads} key heads of {key_size}"
        )
    sinks_H = scores.sinks_H
    bias_HR = scores.bias_HR
    if sinks_H is not None and sinks_H.shape != (heads,):
        raise ValueError(f"sinks are {tuple(sinks_H.shape)}; they must be {(heads,)}")
    if bias_HR is not None and (len(bias_HR) != heads or bias_HR.shape[1] % 2 == 0):
        raise ValueError(
            f"biases by distance are {tuple(bias_HR.shape)}; they must be of {heads} heads, and of "
            "as many distances on both sides of 0"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Attention:
    """What all launches of one attention share: what they read, and where results go.

    share: query heads of a key head.
    """

    reads: dict[str, object]
    held: ReferenceCache
    sinks_H: Tensor | None
    share: int
    out: Tensor

    def groups(self, sizes: Sizes) -> int:
        """Programs of a tile of rows: each has query heads of one key head."""
        return self.held.k.shape[2] * -(-self.share // sizes.heads(self.share))

    def given(self, sizes: Sizes) -> dict[str, object]:
        """What is read, and what kernels/attention.py is compiled for."""
        held = self.held
        key_size = held.k.shape[3]
        value_size = held.v.shape[3]
        main, rest = key_tiles(key_size)
        return {
            **self.reads,
            "KEY_SIZE": key_size,
            "VALUE_SIZE": value_size,
            "KEY_MAIN": main,
            "KEY_REST": rest,
            "VALUE_TILE": max(16, triton.next_power_of_2(value_size)),
            "BLOCK_SIZE": held.block_size,
            "VALUE_STEP": key_size if held.shared else value_size,
            "SHARED": held.shared and main == value_size,
            "M": sizes.entries,
            "HEADS": sizes.heads(self.share),
            "KEYS": sizes.keys,
            "SPLIT": SPLIT,
            "num_warps": sizes.warps,
            "num_stages": sizes.stages,
            **_AS_WRITTEN,
        }

    def in_order(self, tiles_P6: Tensor, sizes: Sizes) -> None:
        if len(tiles_P6):
            kernels.attend_in_order[(len(tiles_P6), self.groups(sizes))](
                **self.given(sizes), tiles=tiles_P6, sinks=self.sinks_H, out=self.out
            )

    def in_parts(self, tiles: Tiles, sizes: Sizes, at_once: int) -> None:
        """So many tiles at a time."""
        rows = min(tiles.rows_in_parts, at_once * tiles.most_rows)
        shape = (rows, self.out.shape[1], tiles.splits)
        part_acc = self.out.new_empty((*shape, self.out.shape[2]), dtype=torch.float32)
        part_sums = self.out.new_empty((*shape, 2), dtype=torch.float32)
        for some in torch.split(tiles.in_parts, at_once):
            kernels.attend_split[(len(some), self.groups(sizes), tiles.splits)](
                **self.given(sizes), tiles=some, part_acc=part_acc, part_sums=part_sums
            )
            _join(part_acc, part_sums, some, tiles, self.sinks_H, self.out)


def _attend(
    q_THN: Tensor, held: ReferenceCache, plan: TritonPlan, scores: _Scores, when: ManyRows
) -> Tensor:
    share = q_THN.shape[1] // held.k.shape[2]
    out = q_THN.new_empty((*q_THN.shape[:2], held.v.shape[3]))
    attention = _Attention(_reads(q_THN, held, plan, scores), held, scores.sinks_H, share, out)
    few = sizes_of(held.k.shape[3], held.v.shape[3], q_THN.dtype, codes=bool(held.scales))
    tiles = plan.of_rows(few.rows(share))
    attention.in_order(tiles.in_order, few)
    at_once = _tiles_at_once(tiles, out)
    if at_once:
        attention.in_parts(tiles, few, at_once)
    else:
        attention.in_order(tiles.in_parts, few)
    if len(tiles.chunks):
        many = sizes_for_many(few, q_THN.dtype)
        larger = plan.of_rows(many.rows(share)).chunks
        if enough(len(larger) * attention.groups(many), 1.0, q_THN.device, when):
            attention.in_order(larger, many)
        else:
            attention.in_order(tiles.chunks, few)
    return out


def _reads(
    q_THN: Tensor, held: ReferenceCache, plan: TritonPlan, scores: _Scores
) -> dict[str, object]:
    heads = q_THN.shape[1]
    key_heads = held.k.shape[2]
    k_scale, v_scale = held.scales or (None, None)
    softcap = scores.softcap
    # All of a query's scores may be more or less by the same, where nothing else joins them.
    shifts = softcap is None and scores.sinks_H is None
    return {
        "q": q_THN,
        "k": held.k,
        "v": held.v,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "key_offset": None if shifts else held.key_offset,
        "bias": scores.bias_HR,
        "table": plan.step.block_table,
        "rows_seen": plan.on_device,
        "scale": scores.scale * _LOG2_E,
        "softcap": None if softcap is None else softcap * _LOG2_E,
        "reach": 0 if scores.bias_HR is None else scores.bias_HR.shape[1] // 2,
        "heads": heads,
        "table_width": plan.step.max_blocks,
        "k_block": held.k.stride(0),
        "v_block": held.v.stride(0),
        "scale_block": 0 if k_scale is None else k_scale.stride(0),
        "key_heads": key_heads,
        "share": heads // key_heads,
    }


def _tiles_at_once(tiles: Tiles, out: Tensor) -> int:
    """How many tiles' parts are there at a time: none where those of one are too many."""
    heads, value_size = out.shape[1:]
    floats = tiles.most_rows * heads * tiles.splits * (value_size + 2)
    return min(len(tiles.in_parts), PARTS_BYTES // (4 * floats)) if floats else 0


def _join(
    part_acc: Tensor,
    part_sums: Tensor,
    some: Tensor,
    tiles: Tiles,
    sinks_H: Tensor | None,
    out: Tensor,
) -> None:
    heads, value_size = out.shape[1:]
    kernels.join_splits[(len(some), heads, tiles.most_rows)](
        part_acc,
        part_sums,
        sinks_H,
        some,
        out,
        heads,
        tiles.splits,
        VALUE_SIZE=value_size,
        VALUE_TILE=max(16, triton.next_power_of_2(value_size)),
        SPLIT=SPLIT,
        num_warps=1,
        **_AS_WRITTEN,
    )
