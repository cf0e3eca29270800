"""Files of a KV cache on disk: whose directory it is, what is believed, and how much there is."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import pytest

from moebius.engine.config import EngineConfig
from moebius.engine.disk_directory import launch_key, open_directory, read_secret
from moebius.engine.disk_store import DiskBounds, DiskStore
from moebius.errors import CacheDataError, ConfigError, StorageError

KEY = bytes(range(32))
MANY = DiskBounds(10**8, floor=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def opened(directory: Path) -> Iterator[Callable[..., DiskStore]]:
    """Opens stores of this directory, and closes them."""
    stores = []

    def make(bounds: DiskBounds = MANY, key: bytes = KEY, **ranks: int) -> DiskStore:
        stores.append(DiskStore(directory, key, bounds, **ranks))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def again(store: DiskStore, make: Callable[..., DiskStore], **options: object) -> DiskStore:
    """What the next launch finds."""
    store.close()
    store.close = lambda: None
    return make(**options)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def payload(number: int, nbytes: int = 1000) -> memoryview:
    """Bytes that end with a checksum of themselves, as a cache's do."""
    memory = random.Random(number).randbytes(nbytes)
    return memoryview(memory + blake2b(memory, digest_size=16).digest())


def checked(data: memoryview) -> bytes:
    if blake2b(data[:-16], digest_size=16).digest() != data[-16:]:
        raise CacheDataError("damaged")
    return bytes(data)


def only_file(directory: Path) -> Path:
    (found,) = (path for path in directory.rglob("*") if len(path.name) == 32)
    return found


def test_what_is_written_is_read_now_and_by_the_next_launch(
    opened: Callable[..., DiskStore], directory: Path
) -> None:
    store = opened()
    assert store.write(name(1), payload(1)) and name(1) in store
    assert store.read(name(1), checked) == payload(1)
    assert store.read(name(2), checked) is None
    store = again(store, opened)
    assert store.read(name(1), checked) == payload(1)
    stats = store.stats()
    assert (stats.files, stats.reads, stats.misses, stats.writes) == (1, 1, 0, 0)
    assert stats.nbytes == 4096 and stats.bytes_read == 1016


def test_nobody_else_can_read_anything(opened: Callable[..., DiskStore], directory: Path) -> None:
    before = os.umask(0)
    try:
        read = launch_key(EngineConfig(kv_cache_disk=str(directory), kv_cache_disk_bytes=10**6))
        opened().write(name(1), payload(1))
    finally:
        os.umask(before)
    assert len(read) == 32
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {path.name for path, mode in modes.items() if path.is_file() and mode == 0o600} == {
        "secret",
        "lock",
        name(1).hex(),
    }
    assert all(mode == 0o700 for path, mode in modes.items() if path.is_dir())


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o770])
def test_a_directory_that_others_can_read_is_refused(directory: Path, mode: int) -> None:
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(ConfigError, match=rf"others may read .*mode {mode:o}.*chmod 700"):
        open_directory(directory)


def test_a_directory_of_another_user_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_directory(directory)
    monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        open_directory(directory)


def test_what_is_no_directory_or_holds_something_else_is_refused(directory: Path) -> None:
    directory.write_text("a file")
    with pytest.raises(ConfigError, match="no directory"):
        open_directory(directory)
    directory.unlink()
    open_directory(directory)
    (directory / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"something else, such as thesis\.txt"):
        open_directory(directory)
    with pytest.raises(StorageError, match="cannot be used"):
        open_directory(directory / "thesis.txt" / "below")


def test_the_secret_lives_on_and_is_checked(directory: Path) -> None:
    open_directory(directory)
    key = read_secret(directory)
    assert len(key) == 32 and read_secret(directory) == key
    assert os.listdir(directory) == ["secret"]
    secret = directory / "secret"
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match=r"others may read .*secret"):
        read_secret(directory)
    secret.chmod(0o600)
    for wrong in (key[:-1], key + b"x"):
        secret.write_bytes(wrong)
        with pytest.raises(ConfigError, match="no secret of 32 bytes"):
            read_secret(directory)
    secret.unlink()
    secret.symlink_to("/etc/hostname")
    with pytest.raises(StorageError, match="cannot be used"):
        read_secret(directory)
    secret.unlink()
    assert read_secret(directory) != key, "a new secret is another one"


def test_without_a_disk_each_launch_has_a_key_of_its_own() -> None:
    keys = {launch_key(EngineConfig()) for _ in range(3)}
    assert len(keys) == 3 and all(len(key) == 32 for key in keys)


def test_a_folder_has_one_owner(directory: Path, opened: Callable[..., DiskStore]) -> None:
    opened(ranks=2)
    opened(rank=1, ranks=2)
    with pytest.raises(ConfigError, match="in use by another"):
        opened()


@pytest.mark.parametrize("place", [0, 8, 16, 20, 40, 44, 500, -20, -1])
def test_a_flipped_byte_is_a_miss_and_the_file_goes(
    opened: Callable[..., DiskStore], directory: Path, place: int
) -> None:
    store = opened()
    store.write(name(1), payload(1))
    path = only_file(directory)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert store.read(name(1), checked) is None
    assert name(1) not in store and not path.exists()
    stats = store.stats()
    assert (stats.misses, stats.reads, stats.files, stats.nbytes) == (1, 0, 0, 0)
    assert store.write(name(1), payload(1)) and store.read(name(1), checked) == payload(1)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(path.read_bytes() * 9),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
        lambda path: path.write_bytes(path.read_bytes()[:30]),
    ],
)
def test_whatever_happens_to_a_file_is_a_miss(
    opened: Callable[..., DiskStore], directory: Path, harm: Callable[[Path], object]
) -> None:
    store = opened()
    store.write(name(1), payload(1))
    harm(only_file(directory))
    assert store.read(name(1), checked) is None and name(1) not in store
    assert store.stats().misses == 1


def test_a_file_is_not_believed_under_another_name_or_secret(
    opened: Callable[..., DiskStore], directory: Path
) -> None:
    store = opened()
    store.write(name(1), payload(1))
    path = only_file(directory)
    path.rename(path.with_name(name(2).hex()))
    store = again(store, opened)
    assert name(2) in store and store.read(name(2), checked) is None
    store.write(name(3), payload(3))
    store = again(store, opened, key=bytes(32))
    assert store.read(name(3), checked) is None


def test_what_was_used_longest_ago_goes_first(opened: Callable[..., DiskStore]) -> None:
    """Each file takes 4,096 bytes of the disk: there is room for four."""
    store = opened(DiskBounds(4 * 4096 + 100, floor=0))
    for number in range(4):
        assert store.write(name(number), payload(number))
    store.touch([name(0)])
    assert store.read(name(1), checked) is not None
    store.write(name(4), payload(4))
    store.write(name(5), payload(5))
    assert [number for number in range(6) if name(number) in store] == [0, 1, 4, 5]
    stats = store.stats()
    assert (stats.evictions, stats.files, stats.nbytes) == (2, 4, 4 * 4096)
    assert not store.write(name(6), payload(6, 5 * 4096)), "more than there can ever be"
    assert store.stats().files == 4 and store.stats().dropped == 1


def test_the_next_launch_goes_on_with_the_order_of_use(
    opened: Callable[..., DiskStore], directory: Path
) -> None:
    store = opened()
    for number in range(4):
        store.write(name(number), payload(number))
        path = directory / "rank-0" / "00" / name(number).hex()
        os.utime(path, (1000 + number, 1000 + number))
    store.read(name(0), checked)
    store = again(store, opened, bounds=DiskBounds(2 * 4096, floor=0))
    assert [number for number in range(4) if name(number) in store] == [0, 3]
    assert len([path for path in directory.rglob("*") if len(path.name) == 32]) == 2


def test_the_disk_keeps_a_floor_of_free_space(opened: Callable[..., DiskStore]) -> None:
    store = opened(DiskBounds(10**9, floor=10**18))
    assert not store.write(name(1), payload(1)) and name(1) not in store
    assert store.stats().dropped == 1


def test_a_disk_that_cannot_be_written_is_no_error(
    opened: Callable[..., DiskStore], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        assert not store.write(name(1), payload(1))
    assert [path.name for path in directory.rglob("*.part")] == []
    assert store.stats().dropped == 1 and store.write(name(1), payload(1))


def test_what_was_never_finished_is_removed_and_what_is_not_ours_stays(
    opened: Callable[..., DiskStore], directory: Path
) -> None:
    store = opened()
    store.write(name(1), payload(1))
    part = directory / "rank-0" / "00"
    (part / (name(2).hex() + ".part")).write_bytes(b"half")
    (part / "note").write_text("not ours")
    (part / name(3).hex().upper().replace("0", "A")).write_text("not ours")
    store = again(store, opened)
    assert store.stats().files == 1
    left = sorted(path.name for path in part.iterdir())
    assert len(left) == 3 and not any(each.endswith(".part") for each in left)


def test_ranks_read_one_another_and_remove_their_own_alone(
    opened: Callable[..., DiskStore], directory: Path
) -> None:
    """Of two ranks each has half the bytes. After a restart each reads what both have written."""
    bounds = DiskBounds(4 * 4096, floor=0)
    stores = [opened(bounds, rank=rank, ranks=2) for rank in range(2)]
    for number in range(3):
        stores[0].write(name(number), payload(number))
    stores[1].write(name(7), payload(7))
    assert stores[0].stats().files == 2 and name(7) not in stores[0]
    stores = [again(each, opened, bounds=bounds, rank=i, ranks=2) for i, each in enumerate(stores)]
    assert stores[0].read(name(7), checked) == payload(7)
    assert stores[1].read(name(2), checked) == payload(2)
    assert [each.stats().files for each in stores] == [2, 1]
    for number in range(10, 14):
        stores[1].write(name(number), payload(number))
    assert stores[0].read(name(7), checked) is None, "its own rank has removed it"
    assert stores[0].stats().misses == 1
    assert stores[0].stats().files == 2


def test_the_first_rank_has_what_ranks_left_that_are_no_more(
    opened: Callable[..., DiskStore], directory: Path
) -> None:
    both = [opened(rank=rank, ranks=2) for rank in range(2)]
    for rank, each in enumerate(both):
        each.write(name(rank), payload(rank))
    both[1].close()
    both[1].close = lambda: None
    store = again(both[0], opened, bounds=DiskBounds(2 * 4096, floor=0))
    assert store.stats().files == 2 and store.read(name(1), checked) == payload(1)
    store.write(name(2), payload(2))
    assert name(0) not in store and store.stats().files == 2


def test_a_config_names_both_or_none() -> None:
    for wrong in ({"kv_cache_disk": "/tmp/x"}, {"kv_cache_disk_bytes": 10**9}):
        with pytest.raises(ConfigError, match="go together"):
            EngineConfig(**wrong)
    with pytest.raises(ConfigError, match="enable_prefix_caching is off"):
        EngineConfig(kv_cache_disk="x", kv_cache_disk_bytes=1, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="kv_cache_disk is empty"):
        EngineConfig(kv_cache_disk="", kv_cache_disk_bytes=1)
    with pytest.raises(ConfigError, match="must be at least 1"):
        EngineConfig(kv_cache_disk="x", kv_cache_disk_bytes=0)
