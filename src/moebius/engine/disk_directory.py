"""The directory of a KV cache on disk: whose it is, its secret, and one owner for each folder.

Keys and values tell what text they were made of. So the directory is its user's alone, and so is
the secret in it, by which the prefix hashes are keyed as long as the directory lives: whoever loses
it has a cold cache, and whoever has not seen it cannot aim for another's prefix.
"""

import os
import secrets
import stat
import time
from contextlib import suppress
from pathlib import Path

from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError, StorageError

SECRET = "secret"
SECRET_BYTES = 32
FOLDER = "rank-"
_LOCK = "lock"
_LOCK_SECONDS = 5.0
_RETRY_SECONDS = 0.05
_OPTION = "kv_cache_disk (--kv-cache-disk)"


def launch_key(config: EngineConfig) -> bytes:
    """The key of a launch's prefix hashes: drawn for it alone, or, where there is a KV cache on
    disk, the directory's. Raises UsageError and StorageError."""
    if config.kv_cache_disk is None:
        return secrets.token_bytes(SECRET_BYTES)
    path = Path(config.kv_cache_disk)
    open_directory(path)
    return read_secret(path)


def open_directory(path: Path) -> None:
    """Make the directory, or check that the one that is there is ours.

    ConfigError for one that others can read or own, or that holds something else; StorageError
    where it cannot be made.
    """
    if not hasattr(os, "geteuid"):
        raise ConfigError(f"{_OPTION} needs a system with owners of files; leave it out here")
    try:
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{_OPTION} is {path}, which is no directory; name one")
        _check_ours(path, found, "chmod 700")
        strange = [each for each in os.listdir(path) if not _ours(each)]
    except OSError as error:
        raise StorageError(f"{_OPTION}: {path} cannot be used: {error.strerror}") from error
    if strange:
        raise ConfigError(
            f"{_OPTION}: {path} holds something else, such as {min(strange)}; name a directory "
            "for this alone"
        )


def read_secret(path: Path) -> bytes:
    """The directory's secret, made where there is none. Raises ConfigError where others can read
    it or have made it, StorageError where it cannot be read or made."""
    secret = path / SECRET
    try:
        if not secret.exists():
            _make_secret(secret)
        descriptor = os.open(secret, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            _check_ours(secret, os.fstat(descriptor), "remove it")
            key = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{_OPTION}: {secret} cannot be used: {error.strerror}") from error
    if len(key) != SECRET_BYTES:
        raise ConfigError(
            f"{_OPTION}: {secret} is no secret of {SECRET_BYTES} bytes; remove it, and what "
            "was kept is forgotten"
        )
    return key


class Folder:
    """A rank's part of the directory, locked for this process: nobody else counts what is in it,
    or removes it."""

    def __init__(self, directory: Path, rank: int, wait: float = _LOCK_SECONDS) -> None:
        """ConfigError where another process has it for longer than `wait` seconds, as an engine
        that was lost may for a moment; StorageError where it cannot be made."""
        self.path = directory / f"{FOLDER}{rank}"
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._lock = os.open(self.path / _LOCK, flags, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be used: {error.strerror}") from error
        until = time.monotonic() + wait
        while not _locked(self._lock):
            if time.monotonic() >= until:
                os.close(self._lock)
                raise ConfigError(
                    f"{_OPTION}: {directory} is in use by another engine; name another one"
                )
            time.sleep(_RETRY_SECONDS)

    def release(self) -> None:
        os.close(self._lock)


def _locked(descriptor: int) -> bool:
    import fcntl  # not on every system, as owners of files are not

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ours(name: str) -> bool:
    return name.startswith((SECRET, FOLDER))


def _check_ours(path: Path, found: os.stat_result, how: str) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{_OPTION}: {path} belongs to another user; name one of your own")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(
            f"{_OPTION}: others may read {path} (mode {mode:o}), and what is in it tells your "
            f"users' texts; {how}, or name another one"
        )


def _make_secret(path: Path) -> None:
    """Whole or not at all; where two processes make one, both find the first."""
    draft = path.with_name(f"{SECRET}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()
