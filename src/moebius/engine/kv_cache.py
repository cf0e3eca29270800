"""The tensors behind the blocks: one anonymous mapping for all layers, in huge pages, touched in
the background."""

import mmap
import sys
import time
import warnings
from collections.abc import Callable

import torch

from moebius.models.config import ModelConfig
from moebius.ops import LayerCache, Ops
from moebius.pages import populate

_HUGE_PAGE = 2 * 2**20
_IDLE_SECONDS = 0.2


class KVCache:
    """Every layer's cache of `num_blocks` blocks. `layers[i]` is opaque: only the operations'
    backend reads it."""

    def __init__(
        self,
        model: ModelConfig,
        ops: Ops,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        per_block = ops.kv_cache_bytes_per_block(
            block_size, model.num_kv_heads, model.head_dim, dtype
        )
        per_layer = num_blocks * per_block
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.nbytes = per_layer * model.num_layers
        self.last_used = 0.0
        buffer = _reserve(
            self.nbytes, device, lambda: time.monotonic() - self.last_used > _IDLE_SECONDS
        )
        self.layers: list[LayerCache] = [
            ops.make_kv_cache(
                buffer[i * per_layer : (i + 1) * per_layer],
                block_size,
                model.num_kv_heads,
                model.head_dim,
                dtype,
            )
            for i in range(model.num_layers)
        ]


def bytes_per_token(model: ModelConfig, ops: Ops, block_size: int, dtype: torch.dtype) -> int:
    """What one token takes in the cache, over all layers."""
    per_block = ops.kv_cache_bytes_per_block(block_size, model.num_kv_heads, model.head_dim, dtype)
    return -(-per_block // block_size) * model.num_layers


def _reserve(nbytes: int, device: torch.device, idle: Callable[[], bool]) -> torch.Tensor:
    if device.type != "cpu" or sys.platform != "linux":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    region = mmap.mmap(
        -1, -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    region.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = torch.frombuffer(region, dtype=torch.uint8, count=nbytes)
    populate(buffer.data_ptr(), len(region), write=True, keep=region, idle=idle)
    return buffer
