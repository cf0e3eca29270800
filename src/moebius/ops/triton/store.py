"""Heads of a row turned, and keys and values written to the cache, by a Triton kernel."""

import triton
from torch import Tensor

from moebius.ops.config import HeadRows
from moebius.ops.reference.attention import ReferenceCache
from moebius.ops.steps import Rotation
from moebius.ops.triton.kernels import store as kernels

# Heads' values that one program stores at once.
_VALUES_AT_ONCE = 1024


def _query_heads(width: int, half: int, held: ReferenceCache, heads: HeadRows) -> int:
    """How many there are in a row of `width`. Raises ValueError for one that does not go with the
    cache."""
    key_heads, key_size = held.k.shape[2:]
    value_size = held.v.shape[3]
    q_width, _, _ = heads.sizes(width, key_heads, key_size, value_size)
    q_heads, over = divmod(q_width, 2 * key_size if heads.gated else key_size)
    unlike = heads.keys_as_values and key_size != value_size
    if q_width < 0 or over or 2 * half > key_size or unlike:
        raise ValueError(
            f"{width} columns, rotated in {half} pairs a head, are not the queries, keys and "
            f"values of {key_heads} key heads of {key_size} values"
        )
    return q_heads


def rotated_and_stored(
    qkv_TI: Tensor,
    rotation: Rotation,
    held: ReferenceCache,
    slots_T: Tensor,
    norms: tuple[Tensor | None, Tensor | None, float],
    heads: HeadRows,
) -> Tensor:
    """As Ops.rotate_and_store; norms: weights of queries' and keys', and their eps."""
    rows, width = qkv_TI.shape
    key_heads, key_size = held.k.shape[2:]
    value_size = held.v.shape[3]
    half = rotation.cos_TR.shape[1]
    q_heads = _query_heads(width, half, held, heads)
    key_tile = triton.next_power_of_2(key_size)
    value_tile = triton.next_power_of_2(value_size)
    heads_in_tile = max(1, _VALUES_AT_ONCE // max(key_tile, value_tile))
    q_tiles = -(-q_heads // heads_in_tile)
    key_tiles = 0 if heads.queries_alone else -(-key_heads // heads_in_tile)
    out = qkv_TI.new_empty((rows, q_heads, key_size))
    x = qkv_TI if qkv_TI.stride(1) == 1 else qkv_TI.contiguous()
    k_scale, v_scale = held.scales or (None, None)
    if rows and q_tiles + key_tiles:
        kernels.rotate_and_store[(rows, q_tiles + 2 * key_tiles)](
            x,
            x.stride(0),
            rotation.cos_TR.contiguous(),
            rotation.sin_TR.contiguous(),
            *norms,
            slots_T,
            held.key_offset,
            out,
            held.k,
            held.v,
            k_scale,
            v_scale,
            q_heads,
            key_heads,
            q_tiles,
            key_tiles,
            held.k.stride(0),
            held.v.stride(0),
            0 if k_scale is None else k_scale.stride(0),
            KEY_SIZE=key_size,
            VALUE_SIZE=value_size,
            KEY_TILE=key_tile,
            VALUE_TILE=value_tile,
            HALF=half,
            BLOCK_SIZE=held.block_size,
            INTERLEAVED=rotation.interleaved,
            Q_STEP=2 * key_size if heads.gated else key_size,
            TURNED_FIRST=heads.turned_first,
            KEYS_AS_VALUES=heads.keys_as_values,
            NORMED_VALUES=heads.normed_values,
            HEADS=heads_in_tile,
        )
    return out
