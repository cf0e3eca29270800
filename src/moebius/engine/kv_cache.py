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
from moebius.ops.cache_spec import CacheSpec
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
        specs = model.caches(dtype)
        sizes = [num_blocks * _block_bytes(ops, spec, block_size) for spec in specs]
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.nbytes = sum(sizes)
        self.last_used = 0.0
        buffer = _reserve(
            self.nbytes, device, lambda: time.monotonic() - self.last_used > _IDLE_SECONDS
        )
        self.layers: list[LayerCache] = [
            ops.make_cache(part, spec, block_size) if spec.token else LayerCache()
            for part, spec in zip(torch.split(buffer, sizes), specs, strict=True)
        ]


def bytes_per_token(model: ModelConfig, ops: Ops, block_size: int, dtype: torch.dtype) -> int:
    """What one token takes in the cache, over all layers."""
    per_block = [_block_bytes(ops, spec, block_size) for spec in model.caches(dtype)]
    return sum(-(-nbytes // block_size) for nbytes in per_block)


def _block_bytes(ops: Ops, spec: CacheSpec, block_size: int) -> int:
    """Of one layer; none where it keeps nothing of the past."""
    return ops.cache_bytes_per_block(spec, block_size) if spec.token else 0


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
