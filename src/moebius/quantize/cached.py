"""A checkpoint in fewer bits, made once and kept beside the user's other caches.

The file is a GGUF container with the checkpoint's own tensors under their own names, so that
nothing else of the checkpoint changes: configuration, tokenizer and layout are the directory's. (A
file that other programs read is made by `moebius quantize`.) Its name tells what it was made of and
by what; where each tensor will lie in it is known before it is made, so that memory is planned
without it.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Self, TextIO

from moebius.errors import ConfigError, StorageError
from moebius.files import anyone
from moebius.gguf.reader import Value
from moebius.gguf.types import QUANTIZATION_VERSION
from moebius.gguf.writer import TensorToWrite, lay_out, write_gguf
from moebius.models.layout import Source
from moebius.models.store import Checkpoint, Store, StoredTensor, fingerprint
from moebius.models.store.gguf import block_type
from moebius.progress import Progress, silent
from moebius.quantize.encode import VERSION
from moebius.quantize.recipe import Recipe, format_of, recipe
from moebius.quantize.rows import Rows

log = logging.getLogger(__name__)

# Seconds since 1970 that a stamp is below; long past, so that no write leaves such a time.
_STAMPS = 2**29


def cache_directory() -> Path:
    """Where such files are kept: in XDG_CACHE_HOME, or else in the user's .cache.

    As the XDG Base Directory Specification has it, a relative path is no answer. Raises ConfigError
    for a user without a home.
    """
    told = os.environ.get("XDG_CACHE_HOME", "")
    try:
        caches = Path(told) if os.path.isabs(told) else Path.home() / ".cache"
    except RuntimeError:
        raise ConfigError(
            "--quantization keeps its files in your home's .cache, and there is no home; set "
            "XDG_CACHE_HOME to a directory for them"
        ) from None
    return caches / "moebius" / "quantized"


class QuantizedStore(Store):
    """The tensors of a file that is there, or will be, with this head."""

    dtypes = ()

    def __init__(self, tensors: Mapping[str, StoredTensor], head: bytes, dtype: str) -> None:
        self.tensors = tensors
        self.head = head
        self.dtype = dtype

    def header(self, file: Path) -> bytes:
        return self.head


@dataclass(frozen=True)
class Quantized:
    """What a checkpoint becomes by a recipe.

    file         where its tensors are, or will be
    checkpoint   the result: planned with at once, loaded once `make` was called
    original     what it is made of
    """

    file: Path
    checkpoint: Checkpoint
    original: Checkpoint
    recipe: Recipe

    @classmethod
    def by_name(cls, original: Checkpoint, name: str | None) -> Self | None:
        """As `of`; None for None."""
        return None if name is None else cls.of(original, name)

    @classmethod
    def of(cls, original: Checkpoint, name: str) -> Self:
        """Makes nothing. Raises ConfigError for a name that is no recipe."""
        chosen = recipe(name)
        file = cache_directory() / f"{fingerprint(original)}-{chosen.name}-{VERSION}.gguf"
        formats = _formats(original, chosen)
        tensors = _to_write(original, formats, None)
        layout = lay_out(_metadata(chosen), tensors)
        planned = {
            tensor.name: StoredTensor(
                file,
                tensor.name,
                tensor.type.name,
                formats[tensor.name],
                tensor.shape,
                start,
                start + tensor.nbytes,
            )
            for tensor, start in zip(tensors, layout.starts, strict=True)
        }
        store = QuantizedStore(planned, layout.head, original.dtype)
        sources = tuple(each.in_order if each.scattered else each for each in original.sources)
        checkpoint = replace(original, store=store, tensors=planned, sources=sources)
        return cls(file, checkpoint, original, chosen)

    def make(self, progress: Progress = silent) -> None:
        """Make the file, unless it is there and whole.

        While another process makes it, this one waits. Raises StorageError where it cannot be
        written, WeightsError for numbers that no format holds.
        """
        if self._is_there():
            return
        with _locked(self.file.with_suffix(".lock")):
            if not self._is_there():
                self._clear()
                self._write(progress)

    def _clear(self) -> None:
        """Remove what was begun of this very file by processes that ended in the middle of it."""
        for unfinished in self.file.parent.glob(f".{self.file.stem}.*"):
            unfinished.unlink(missing_ok=True)

    def _write(self, progress: Progress) -> None:
        formats = _formats(self.original, self.recipe)
        # A warning, because a person who waits for a minute wants to know what for.
        text = "%s is quantised to %s, this once; it is kept as %s"
        log.warning(text, self.original.path.name, self.recipe.name, self.file)
        with Rows() as rows:
            tensors = _to_write(self.original, formats, rows)
            total = sum(tensor.nbytes for tensor in tensors)
            with progress(f"quantising to {self.recipe.name}", total) as written:
                metadata = _metadata(self.recipe)
                write_gguf(self.file, metadata, tensors, ours=anyone, written=written)
        stamp = _stamp(self.file)
        os.utime(self.file, ns=(stamp, stamp))

    def _is_there(self) -> bool:
        """Whether the file is as it was made; the log tells of one that is not.

        Whoever has written to it since has left another time of modification.
        """
        try:
            found = self.file.stat()
            with self.file.open("rb") as file:
                head = file.read(len(self.head))
        except OSError:
            return False
        stop = max(tensor.stop for tensor in self.checkpoint.tensors.values())
        if head == self.head and found.st_size >= stop and found.st_mtime_ns == _stamp(self.file):
            return True
        log.warning("%s is damaged or was changed; it is made anew", self.file)
        return False

    @property
    def head(self) -> bytes:
        """What the file begins with."""
        assert isinstance(self.checkpoint.store, QuantizedStore)
        return self.checkpoint.store.head


def _metadata(recipe: Recipe) -> dict[str, Value]:
    return {
        "general.architecture": "moebius",
        "general.description": f"a checkpoint's own tensors as {recipe.name}, kept by Moebius",
        "general.file_type": recipe.file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        "moebius.quantizer": VERSION,
    }


def _formats(original: Checkpoint, recipe: Recipe) -> dict[str, str]:
    """The format of each tensor that a model of this configuration has, in the file's order."""
    formats: dict[str, str] = {}
    for source in original.sources:
        name = _name(source)
        if name not in formats:
            stored = original.tensors[source.name]
            wanted = format_of(recipe, source, original.config)
            widened = stored.parts or source.heads > 0
            formats[name] = wanted or (original.dtype if widened else str(stored.format))
    return formats


def _name(source: Source) -> str:
    """What the file calls the tensor that a parameter is in."""
    return source.in_order.name if source.scattered else source.name


def _to_write(
    original: Checkpoint, formats: Mapping[str, str], rows: Rows | None
) -> list[TensorToWrite]:
    """What goes into the file; `rows` None where nothing is to be read yet.

    Parameters whose rows are scattered lie row by row there, one behind the other.
    """
    scattered: defaultdict[str, list[Source]] = defaultdict(list)
    names: dict[str, str] = {}
    for source in original.sources:
        names[_name(source)] = source.name
        if source.scattered:
            scattered[_name(source)].append(source)
    found = []
    for name, format in formats.items():
        stored = original.tensors[names[name]]
        parts = sorted(scattered[name], key=lambda each: (each.entry or 0, each.start))
        shape = parts[0].in_order.stored_shape if parts else stored.shape
        pieces = partial(_pieces, rows, stored, parts, format) if rows else tuple
        found.append(TensorToWrite(name, block_type(format), shape, pieces))
    return found


def _pieces(
    rows: Rows, stored: StoredTensor, parts: Sequence[Source], format: str
) -> Iterator[memoryview]:
    """The bytes of a tensor; parts: the parameters that it is made of anew, where it is."""
    if not parts:
        yield from rows.pieces(stored, format)
    for source in parts:
        yield from rows.of(source, stored, format)


def _stamp(file: Path) -> int:
    """The time of modification by which a whole file is known, in nanoseconds: even seconds, which
    every file system keeps."""
    digest = blake2b(file.name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _STAMPS // 2 * 2 * 10**9


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes, where the system has such locks; one ends with its process.

    Raises StorageError where the file of the lock cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise StorageError(
            f"{path.parent} cannot be written to: {error.strerror}; set XDG_CACHE_HOME to a "
            "directory that can"
        ) from None
    with file:
        with suppress(ImportError, OSError):
            _lock(file)
        yield


def _lock(file: TextIO) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("another process is making the same file; this one waits for it")
        fcntl.flock(file, fcntl.LOCK_EX)
