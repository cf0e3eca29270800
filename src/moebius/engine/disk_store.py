"""Files of a KV cache on disk: named by a key, checked before they are believed, bounded in bytes.

A file is a header (magic, version, key, length), a payload that ends with a checksum of itself, and
a keyed digest of header and checksum. It is written under another name and renamed, so that it is
there whole; a disk that lost power may have torn it all the same, which the checks see. Whatever
cannot be read, or is not what its name says, is a miss, and goes.

Each rank has a folder of its own, of which it alone counts the bytes and removes the least recently
used: no lock is held between processes but the one that says whose a folder is. What the other
ranks had there at the start is read as well, since the bits of a block are the same on all of them;
so it does not matter which rank a conversation comes back to after a restart. Folders of ranks that
are no more belong to the first.
"""

import hmac
import logging
import os
import shutil
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from moebius.engine.client import DiskStats
from moebius.engine.disk_directory import FOLDER, Folder, open_directory
from moebius.engine.faults import say
from moebius.errors import CacheDataError, frames

log = logging.getLogger(__name__)

VERSION = 1
NAME_BYTES = 16
_MAGIC = b"moebius kv file\n"
_HEAD = struct.Struct(f"<{len(_MAGIC)}sI{NAME_BYTES}sQ")
_DIGEST_BYTES = 16
_CHECKSUM_BYTES = 16
"""Of a payload's end: it stands for the whole, so that nothing is hashed twice."""
_PAGE = 4096
_TEMPORARY = ".part"
_FLOOR_PART = 20
_FLOOR_MOST = 4 * 2**30

Checked = TypeVar("Checked")


class _File(NamedTuple):
    folder: Path
    nbytes: int

    def path(self, name: bytes) -> Path:
        text = name.hex()
        return self.folder / text[:2] / text


@dataclass(frozen=True, slots=True)
class DiskBounds:
    """most   bytes that the files of all ranks together may take
    floor  bytes of the disk that stay free; None: a twentieth of it, 4 GiB at most
    """

    most: int
    floor: int | None = None


class DiskStore:
    """The files of one rank. All methods are safe to call from any thread."""

    def __init__(
        self, directory: Path, key: bytes, bounds: DiskBounds, *, rank: int = 0, ranks: int = 1
    ) -> None:
        """Look what is there. Raises UsageError and StorageError.

        key   of the digests, 16 to 64 bytes
        """
        open_directory(directory)
        self._folder = Folder(directory, rank)
        self._key = key
        self._most = bounds.most // ranks
        total = shutil.disk_usage(directory).total
        self._floor = (
            min(total // _FLOOR_PART, _FLOOR_MOST) if bounds.floor is None else bounds.floor
        )
        self._lock = threading.Lock()
        self._files: OrderedDict[bytes, _File] = OrderedDict()  # least recently used first
        self._held = 0
        self._others: dict[bytes, _File] = {}  # of other ranks, as they were at the start
        self._stats = DiskStats()
        self._scan(directory, rank, ranks)
        self._remove(self._make_room(0))

    def __contains__(self, name: bytes) -> bool:
        with self._lock:
            return name in self._files or name in self._others

    def stats(self) -> DiskStats:
        with self._lock:
            return replace(self._stats, files=len(self._files), nbytes=self._held)

    def touch(self, names: Iterable[bytes]) -> None:
        """These are used, the last of them most recently."""
        with self._lock:
            for name in names:
                if name in self._files:
                    self._files.move_to_end(name)

    def read(self, name: bytes, check: Callable[[memoryview], Checked]) -> Checked | None:
        """What `check` makes of the payload. None where there is no such file, or no good one: then
        it has gone. `check` raises CacheDataError."""
        with self._lock:
            file = self._files.get(name) or self._others.get(name)
        if file is None:
            return None
        try:
            path = file.path(name)
            payload = self._payload(name, _read(path, file.nbytes))
            found = check(payload)
        except Exception as error:
            cause = error if isinstance(error, OSError | CacheDataError) else frames(error)
            say(log.warning, "a file of the KV cache on disk is of no use: %s", cause)
            self._forget((name,), missed=1)
            return None
        with suppress(OSError):
            os.utime(path)  # for the order that the next start finds
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
            stats = self._stats
            self._stats = replace(
                stats, reads=stats.reads + 1, bytes_read=stats.bytes_read + len(payload)
            )
        return found

    def write(self, name: bytes, payload: memoryview) -> bool:
        """Keep this under this name; False where it has no room, or cannot be written."""
        file = _File(self._folder.path, space_of(_HEAD.size + len(payload) + _DIGEST_BYTES))
        if name in self:
            return True
        try:
            room = shutil.disk_usage(self._folder.path).free - file.nbytes >= self._floor
            if room and file.nbytes <= self._most:
                self._remove(self._make_room(file.nbytes))
                self._put(file.path(name), name, payload)
            else:
                self.dropped(1)
                return False
        except OSError as error:
            say(log.warning, "the KV cache on disk cannot be written: %s", error)
            self.dropped(1)
            return False
        with self._lock:
            self._files[name] = file
            self._held += file.nbytes
            stats = self._stats
            self._stats = replace(
                stats, writes=stats.writes + 1, bytes_written=stats.bytes_written + len(payload)
            )
        return True

    def dropped(self, count: int) -> None:
        """So many were not written."""
        with self._lock:
            self._stats = replace(self._stats, dropped=self._stats.dropped + count)

    def close(self) -> None:
        """Let another process have the folder. Nothing may be written from now on."""
        self._folder.release()

    def _forget(self, names: tuple[bytes, ...], missed: int = 0) -> None:
        gone: list[Path] = []
        with self._lock:
            for name in names:
                own = self._files.pop(name, None)
                self._held -= 0 if own is None else own.nbytes
                other = self._others.pop(name, None)
                gone += [file.path(name) for file in (own, other) if file is not None]
            self._stats = replace(self._stats, misses=self._stats.misses + missed)
        self._remove(gone)

    def _make_room(self, nbytes: int) -> list[Path]:
        """Give up what was used longest ago until so many bytes fit; the files to remove."""
        gone: list[Path] = []
        with self._lock:
            while self._files and self._held + nbytes > self._most:
                name, file = self._files.popitem(last=False)
                self._held -= file.nbytes
                gone.append(file.path(name))
            self._stats = replace(self._stats, evictions=self._stats.evictions + len(gone))
        return gone

    @staticmethod
    def _remove(paths: Iterable[Path]) -> None:
        for path in paths:
            with suppress(OSError):
                path.unlink()

    def _payload(self, name: bytes, data: memoryview) -> memoryview:
        """The payload of a file's bytes, by its header. Raises CacheDataError."""
        least = _HEAD.size + _CHECKSUM_BYTES + _DIGEST_BYTES
        if len(data) < least:
            raise CacheDataError(f"a file has {len(data)} bytes; the shortest has {least}")
        magic, version, named, length = _HEAD.unpack_from(data)
        payload = data[_HEAD.size : -_DIGEST_BYTES]
        if (magic, version, named, length) != (_MAGIC, VERSION, name, len(payload)):
            raise CacheDataError("a file's header is not that of its name and length")
        if not hmac.compare_digest(
            self._digest(data[: _HEAD.size], payload), data[-_DIGEST_BYTES:]
        ):
            raise CacheDataError("a file's digest is not that of this directory's secret")
        return payload

    def _digest(self, head: bytes | memoryview, payload: memoryview) -> bytes:
        digest = blake2b(head, digest_size=_DIGEST_BYTES, key=self._key)
        digest.update(payload[-_CHECKSUM_BYTES:])
        return digest.digest()

    def _put(self, path: Path, name: bytes, payload: memoryview) -> None:
        """Write a file beside its place, and rename it."""
        path.parent.mkdir(mode=0o700, exist_ok=True)
        head = _HEAD.pack(_MAGIC, VERSION, name, len(payload))
        partial = path.with_suffix(_TEMPORARY)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        descriptor = os.open(partial, flags, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for part in (memoryview(head), payload, memoryview(self._digest(head, payload))):
                    _write_all(file.write, part)
            partial.rename(path)
        except BaseException:
            self._remove((partial,))
            raise

    def _scan(self, directory: Path, rank: int, ranks: int) -> None:
        """What earlier launches have left, by the time of its last use."""
        own: list[tuple[float, bytes, _File]] = []
        for folder in sorted(directory.glob(f"{FOLDER}*")):
            number = folder.name.removeprefix(FOLDER)
            if not number.isdecimal():
                continue
            mine = int(number) == rank or (rank == 0 and int(number) >= ranks)
            found = _files(folder, clean=mine)
            if mine:
                own += found
            else:
                self._others |= {name: file for _, name, file in found}
        for _, name, file in sorted(own, key=lambda each: each[:2]):
            self._files[name] = file
        self._held = sum(file.nbytes for file in self._files.values())


def _files(folder: Path, *, clean: bool) -> Iterator[tuple[float, bytes, _File]]:
    """The files in a folder: when they were used, their names and sizes. clean: what was never
    finished is removed."""
    for part in sorted(folder.glob("[0-9a-f][0-9a-f]")):
        with suppress(OSError), os.scandir(part) as entries:
            for entry in entries:
                if entry.name.endswith(_TEMPORARY):
                    if clean:
                        DiskStore._remove((Path(entry.path),))
                    continue
                name = _name(entry.name)
                if name is None or not entry.is_file(follow_symlinks=False):
                    continue
                found = entry.stat(follow_symlinks=False)
                yield found.st_mtime, name, _File(folder, space_of(found.st_size))


def _name(text: str) -> bytes | None:
    try:
        name = bytes.fromhex(text)
    except ValueError:
        return None
    return name if len(name) == NAME_BYTES and name.hex() == text else None


def space_of(nbytes: int) -> int:
    """What so many bytes take of a disk."""
    return -(-nbytes // _PAGE) * _PAGE


def _read(path: Path, on_disk: int) -> memoryview:
    """The bytes of a file that took so many of the disk when it was last looked at."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        if space_of(size) != on_disk:
            raise CacheDataError(f"a file has {size} bytes, which it had not before")
        data = np.empty(size, np.uint8).data
        filled = 0
        while filled < size:
            count = file.readinto(data[filled:])
            if not count:
                raise CacheDataError(f"a file ends after {filled} of {size} bytes")
            filled += count
    return data


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    while len(data):
        data = data[write(data) or 0 :]
