"""What a KV cache on disk takes of the memory: counted in the plan, and never more."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moebius.engine import disk_memory
from moebius.engine.cache_sizes import CacheSizes
from moebius.engine.config import EngineConfig
from moebius.engine.disk_memory import most_files
from moebius.engine.disk_pace import Pace
from moebius.engine.disk_reader import DiskReader, Load, Read
from moebius.engine.disk_store import DiskBounds, DiskStore
from moebius.engine.load import load_engine, prepare
from moebius.errors import ConfigError, MemoryPlanError
from moebius.schedule.tiers import Piece
from oracle import save_tiny
from schedule.making import make_request

MIB = 2**20


def on_disk(directory: object = "kv", nbytes: int = 10**9, **options: Any) -> EngineConfig:
    return EngineConfig(kv_cache_disk=str(directory), kv_cache_disk_bytes=nbytes, **options)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # Staged, put into the cache, on its way out; and the names of 1,000 files of 1 MB.
        (CacheSizes((None,), 10**6), 64 * MIB + 32 * MIB + 10**6 + 1000 * 400),
        # A state is larger than what is put into the cache at a time; blocks are as small as ever.
        (CacheSizes((None,), 10**6, 40 * MIB), 64 * MIB + 2 * 40 * MIB + 1000 * 400),
        # And larger than what is staged, with no blocks at all: ten states of 100 MB.
        (CacheSizes((), 0, 10**8), 3 * 10**8 + 10 * 400),
    ],
)
def test_what_is_on_its_way_and_the_names_of_all(sizes: CacheSizes, expected: int) -> None:
    assert disk_memory.disk_memory(sizes, on_disk()) == expected
    assert disk_memory.disk_memory(sizes, EngineConfig()) == 0


def test_the_plan_counts_it(tiny_model: Path) -> None:
    """In what is left for the cache, in a row of its own, and where all is too much."""
    without = prepare(tiny_model, EngineConfig()).plan
    made = prepare(tiny_model, on_disk()).plan
    block = made.cache.block
    taken = 96 * MIB + block + 10**9 // block * 400
    assert without.disk == 0 and made.disk == taken
    assert without.available - without.left == made.available - made.left - taken
    assert "KV cache on disk" not in [row[0] for row in without.rows()]
    (row,) = [row for row in made.rows() if row[0] == "KV cache on disk"]
    assert row[1].endswith(" MiB") and "of memory" in row[2]
    with pytest.raises(MemoryPlanError, match=r"KV cache on disk takes .* lower --kv-cache-disk-b"):
        prepare(tiny_model, on_disk(nbytes=10**16))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_next"])
def test_a_disk_in_which_no_file_fits_is_refused(model_type: str, tmp_path: Path) -> None:
    """And in the least that is told files do fit, a state's among them."""
    save_tiny(tmp_path, model_type)

    def config(nbytes: int) -> EngineConfig:
        sizes = {"kv_cache_memory_bytes": 2**24, "max_num_seqs": 2}
        return on_disk(tmp_path / "kv", nbytes, **sizes)

    with pytest.raises(ConfigError, match=r"is 50, in which no file .* use at least \d+$") as told:
        prepare(tmp_path, config(50))
    least = int(str(told.value).rpartition(" ")[2])
    with pytest.raises(ConfigError, match=f"at least {least}"):
        prepare(tmp_path, config(least - 1))
    with pytest.raises(ConfigError, match=f"at least {2 * least}"):
        prepare(tmp_path, replace(config(least), ranks=2))
    engine = load_engine(tmp_path, config(least))
    cache, store = engine.runner.cache, DiskStore(tmp_path / "own", bytes(16), DiskBounds(least, 0))
    for slot in (0, None) if model_type == "qwen3_next" else (0,):
        described = cache.piece_bytes(slot) + 500
        assert store.write(bytes([slot is None] * 16), memoryview(bytes(described)))
    store.close()
    engine.close()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_next"])
def test_files_hold_what_the_plan_takes_for_them(model_type: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, model_type)
    config = EngineConfig(kv_cache_memory_bytes=2**24, max_num_seqs=2)
    sizes = prepare(tmp_path, config).plan.cache
    engine = load_engine(tmp_path, config)
    assert engine.runner.cache.piece_bytes(0) == sizes.block
    if sizes.state:
        assert engine.runner.cache.piece_bytes(None) == sizes.state
    assert (model_type == "qwen3_next") == bool(sizes.state)
    engine.close()


def test_names_take_no_more_than_is_counted(tmp_path: Path) -> None:
    """While they are written, when the next launch finds them, and as another rank's."""
    count = 3000
    counted = count * disk_memory._NAME_BYTES
    bounds = DiskBounds(10**9, floor=0)

    def taken(rank: int = 0) -> tuple[DiskStore, int]:
        tracemalloc.start()
        store = DiskStore(tmp_path / "kv", bytes(16), bounds, rank=rank, ranks=2)
        if rank == 0 and not store.stats().files:
            for number in range(count):
                store.write(number.to_bytes(16, "big"), memoryview(bytes(32)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return store, found

    for rank in (0, 0, 1):
        store, nbytes = taken(rank)
        store.close()
        assert counted / 4 < nbytes <= counted, nbytes / count
    assert most_files(CacheSizes((None,), 4096), on_disk(nbytes=4096 * count)) == count


class Files:
    """A store in which every file is good."""

    def read(self, name: bytes, check: object) -> list[memoryview]:
        return [memoryview(name)]


def test_no_more_is_staged_than_was_said() -> None:
    reader = DiskReader(Files(), None, Pace(), most=35)  # type: ignore[arg-type]
    load = Load(make_request("one", [1]), 1)
    reads = [Read(bytes([i]), 0, 10, [(load, Piece(0, i))]) for i in range(8)]
    reader.ask(reads)

    def settled() -> int:
        """How many were read, once no more are."""
        seen = -1
        while seen != (seen := sum(read.memory is not None for read in reads)):
            time.sleep(0.05)
        return seen

    assert settled() == 3
    assert len(reader.take(20)) == 2 and settled() == 5
    assert len(reader.take(1)) == 1 and settled() == 6, "one at least, however large"
    reader.close(5.0)
