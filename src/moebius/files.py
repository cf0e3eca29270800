"""Files: how tables and JSON are read, and how anything is written.

What is written is there whole or not at all, through links, and never over what somebody else put
there.
"""

import json
import math
import os
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moebius.errors import ConfigError, StorageError, UsageError

Content = str | bytes | Callable[[Path], object]
"""Text, bytes, or a function that writes the file at a path that it is given."""

Ours = Callable[[Path], bool]
"""Whether a file that exists is one that we wrote before, and may replace."""

_HEAD_BYTES = 64 * 1024
_NEW_FILE_MODE = 0o644
_SHORT = 32


def anyone(path: Path) -> bool:
    """For files in a directory that is ours alone: whatever has the name may be replaced."""
    return True


def begins_with(*beginnings: bytes) -> Ours:
    """Recognises our files by their first bytes."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(max(map(len, beginnings))).startswith(beginnings)

    return ours


json_record: Ours = begins_with(b"{", b"[")
"""For records of measurements, which scripts write again and again: what is no JSON is none."""


def signed(mark: bytes) -> Ours:
    """Recognises our files by their maker's mark near beginning or end."""

    def ours(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            file.seek(max(0, path.stat().st_size - _HEAD_BYTES))
            return mark in head or mark in file.read()

    return ours


def make_directory(path: Path) -> None:
    """With its parents, unless it is there. Raises StorageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be made a directory: {error.strerror}") from error


def check_target(path: Path, ours: Ours) -> None:
    """Say before the work what `write_file` would say after it.

    Raises ConfigError where `path` is a directory or holds what is not ours, StorageError where it
    cannot be written.
    """
    final = _target(path)
    if not final.exists():
        if not os.access(final.parent, os.W_OK | os.X_OK):
            raise StorageError(
                f"{path} cannot be written: name a file in a directory that exists and is writable"
            )
        return
    if final.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a directory; name a file")
    if not _is_regular(final):
        return
    if final.stat().st_size and not ours(final):
        raise ConfigError(
            f"{path} holds something else and is left as it is; choose another name, or remove it"
        )
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{path} cannot be written: its directory is read-only")


def check_apart(**named: Path | None) -> None:
    """ConfigError where two outputs, by their options' names, are one file.

    The later would be written over the former; a device or a pipe takes both.
    """
    files: dict[str, Path] = {}
    for name, path in named.items():
        if path is not None:
            target = _target(path)
            if not target.exists() or target.is_file():
                files[f"--{name.replace('_', '-')}"] = target
    for (one, first), (other, second) in combinations(files.items(), 2):
        if first == second or (first.exists() and second.exists() and first.samefile(second)):
            raise ConfigError(f"{one} and {other} are one file, {second}; name two")


def write_file(path: Path | str, content: Content, *, ours: Ours) -> None:
    """Make `path` hold `content`: all of it, or what was there before, whatever happens meanwhile.

    It is written beside its place, flushed to the disk and renamed. A link stays and its target is
    replaced; a device or a pipe, which cannot be, is written to. Raises what `check_target` raises.
    """
    path = Path(path)
    check_target(path, ours)
    final = _target(path)
    try:
        if final.exists() and not _is_regular(final):
            _fill(final, content)
            return
        # The suffix stays: what writes charts or archives goes by it. A name may be as long as
        # names can be.
        descriptor, name = tempfile.mkstemp(
            final.suffix[-_SHORT:], f".{final.stem[:_SHORT]}.", final.parent
        )
        os.close(descriptor)
        partial = Path(name)
        try:
            _fill(partial, content)
            mode = stat.S_IMODE(final.stat().st_mode) if final.exists() else _NEW_FILE_MODE
            partial.chmod(mode)
            _flush(partial)
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)
        _flush(final.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def _target(path: Path) -> Path:
    """Where a file of this name really lies, or would."""
    try:
        final = path.resolve()
        final.exists()  # which a name that is too long cannot be asked
        return final
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{path} cannot be written: {error}") from error


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.stat().st_mode)


def _fill(path: Path, content: Content) -> None:
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", newline="\n")


def _flush(path: Path) -> None:
    """To the disk: a file's content, or a directory's names, which Windows writes by itself."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def short_name(path: Path) -> str:
    """`directory/file`, for messages; the file alone where it was named without a directory."""
    return Path(*path.parts[-2:]).as_posix()


def package_table(name: str) -> dict[str, Any]:
    """A TOML file of this package: tables that are data, kept beside the code that reads them."""
    return tomllib.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def read_text(path: Path) -> str:
    """A file's text, without the byte order mark that Windows' editors put before it.

    Raises OSError, or UnicodeDecodeError for what is no UTF-8.
    """
    return path.read_text(encoding="utf-8-sig")


def read_json(
    path: Path, *, default: dict[str, Any] | None = None, error: type[UsageError] = ConfigError
) -> dict[str, Any]:
    """The JSON object in a file; `default`, where given, if there is no file.

    Raises `error` naming what is wrong.
    """
    try:
        found = json.loads(read_text(path))
    except FileNotFoundError:
        if default is None:
            raise error(f"{path} does not exist") from None
        return default
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}") from None
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}; it must be a JSON object")
    return found


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON that every parser reads: null stands for infinity and NaN, which it does not have."""
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
