"""What a KV cache on disk takes of the memory, beside the cache that it fills."""

from moebius.engine.cache_sizes import CacheSizes
from moebius.engine.config import EngineConfig
from moebius.engine.disk_store import space_of
from moebius.errors import ConfigError

MOST_STAGED_BYTES = 64 * 2**20
"""Files that were read, or are just being read, and wait for the engine's thread."""
MOST_LANDED_BYTES = 32 * 2**20
"""Those that it puts into the cache between two steps: milliseconds."""
_NAME_BYTES = 400
"""A file's name, size and place in the order of use: by tracemalloc 390 when they are sorted."""
_DESCRIPTION_BYTES = 4096
"""More than what describes a file's bytes takes in it."""


def most_files(cache: CacheSizes, config: EngineConfig) -> int:
    """How many files the disk may ever hold, of all ranks: each knows those of the others."""
    return (config.kv_cache_disk_bytes or 0) // min(_pieces(cache))


def disk_memory(cache: CacheSizes, config: EngineConfig) -> int:
    """Bytes that are taken at most; 0 without a KV cache on disk. Raises ConfigError where no file
    would ever fit into what the disk may hold.

    One file goes each way, however large it is: a state may be larger than all that is staged.
    """
    if config.kv_cache_disk is None:
        return 0
    largest = max(_pieces(cache))
    least = config.ranks * space_of(largest + _DESCRIPTION_BYTES)
    if (config.kv_cache_disk_bytes or 0) < least:
        raise ConfigError(
            f"kv_cache_disk_bytes (--kv-cache-disk-bytes) is {config.kv_cache_disk_bytes}, in "
            f"which no file of this model's KV cache fits; use at least {least}"
        )
    coming = max(MOST_STAGED_BYTES, largest) + max(MOST_LANDED_BYTES, largest)
    return coming + largest + most_files(cache, config) * _NAME_BYTES


def _pieces(cache: CacheSizes) -> list[int]:
    """Bytes of what is kept in a file each: a block of keys and values, a state."""
    return [size for size in (cache.block, cache.state) if size]
