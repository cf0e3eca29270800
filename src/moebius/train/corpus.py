"""The text to train on: which documents there are, and which are held out."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from moebius.errors import ConfigError
from moebius.text.pieces import PIECE, pieces, word_end
from moebius.train.tables import CorpusRecipe

SPLITS = ("train", "heldout")
# How many characters before its share the held-out end may begin, to begin with a line.
_REACH = 2**16


class Document(NamedTuple):
    """One text.

    split   one of SPLITS
    path    where it is from, relative to the folder that was named

    A long text comes as several in a row, of at most moebius.text.pieces.PIECE characters; all but
    the last `goes_on`.
    """

    split: str
    kind: str
    path: str
    text: str
    goes_on: bool = False


class _File(NamedTuple):
    """A file of a corpus: its kind of text, and what it is called there.

    named   whether the recipe names the file itself, and not a folder above it
    """

    kind: str
    name: str
    path: Path
    named: bool


@dataclass(frozen=True)
class Corpus:
    """Text files, folders of them and .jsonl files, by kind; every pass reads them anew.

    Hidden files in a folder are not looked at; those that are no UTF-8 text are passed over and
    listed in `skipped`, and what holds nothing but white space in `empty`. A document is held out
    by a hash of its path (and line), unless its JSON object has a `split`; of a kind that is one
    text file, its end is. Of a .jsonl file a line is in memory. Raises: ConfigError naming the
    file, for one that is missing, binary or no JSON.
    """

    recipe: CorpusRecipe
    skipped: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def key(self) -> str:
        """Fingerprint of every file's path, size and time of change."""
        stats = []
        for file in self._files():
            stat = file.path.stat()
            stats.append((file.kind, file.name, stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(repr((stats, self.recipe.text_key)).encode()).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        self.empty.clear()
        files_of_kind = Counter(file.kind for file in self._files())
        for file in self._files():
            if file.path.suffix == ".jsonl":
                yield from self._lines(file)
                continue
            length = self._length(file)
            if not length:
                continue
            if files_of_kind[file.kind] == 1:
                yield from self._cut(file, length)
            else:
                split = self._split(file.name)
                yield from _in_pieces(split, file.kind, file.name, _blocks(file.path))

    def _cut(self, file: _File, length: int) -> Iterator[Document]:
        """The only file of its kind, as two documents: of its text the end is held out."""
        at = _heldout_start(file.path, int(length * (1 - self.recipe.heldout_share)))
        start = _between(_blocks(file.path), 0, at)
        yield from _in_pieces("train", file.kind, file.name, start)
        end = _between(_blocks(file.path), at, length)
        yield from _in_pieces("heldout", file.kind, f"{file.name}:end", end)

    def _files(self) -> Iterator[_File]:
        """In order."""
        for kind, roots in self.recipe.files.items():
            for root in map(Path, roots):
                if not root.exists():
                    raise ConfigError(f"corpus.files.{kind}: {root} does not exist")
                # It is read several times over, which a pipe or a device is not.
                if not root.is_dir() and not root.is_file():
                    raise ConfigError(
                        f"corpus.files.{kind}: {root} is neither a file nor a directory"
                    )
                if not root.is_dir():
                    yield _File(kind, root.name, root, named=True)
                    continue
                for path in sorted(p for p in root.rglob("*") if p.is_file()):
                    relative = path.relative_to(root)
                    if not _is_hidden(relative):
                        yield _File(kind, relative.as_posix(), path, named=False)

    def _split(self, path: str) -> str:
        return SPLITS[is_held_out(path, self.recipe.heldout_share)]

    def _length(self, file: _File) -> int:
        """How many characters of text a file has; 0 for one that is passed over."""
        length = 0
        blank = True
        binary = False
        try:
            for block in _blocks(file.path):
                length += len(block)
                blank = blank and block.isspace()
                binary = binary or "\0" in block
        except UnicodeDecodeError:
            binary = True
        if binary and file.named:
            raise ConfigError(f"{file.path} is binary: it is no UTF-8 text, or holds a zero byte")
        if binary:
            self.skipped.append(str(file.path))
            return 0
        if blank:
            self.empty.append(str(file.path))
            return 0
        return length

    def _lines(self, file: _File) -> Iterator[Document]:
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{file.path}, line {number}"
                place = f"{file.name}:{number}"
                split, text = self._entry(line, where, place)
                if text.strip():
                    yield from _in_pieces(split, file.kind, place, [text])
                else:
                    self.empty.append(where)

    def _entry(self, line: bytes, where: str, place: str) -> tuple[str, str]:
        """Split and text of a .jsonl file's line. Raises ConfigError."""
        key = self.recipe.text_key
        try:
            entry = json.loads(line)
            text = entry[key]
            split = entry.get("split", self._split(place))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(
                f"{where}: it must be a JSON object with a text under {key!r} (corpus.text_key)"
            ) from None
        if not isinstance(text, str):
            raise ConfigError(f"{where}: {key!r} is no text")
        if not _is_unicode(text):
            raise ConfigError(f"{where}: {key!r} holds half a surrogate pair")
        if split not in SPLITS:
            raise ConfigError(f"{where}: split is {split!r}; it must be one of {', '.join(SPLITS)}")
        return split, text


def reads_below(root: Path, folder: Path) -> bool:
    """Whether what is in `folder` would be read as part of `root`."""
    inner = folder.resolve()
    outer = root.resolve()
    return inner.is_relative_to(outer) and not _is_hidden(inner.relative_to(outer))


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def is_held_out(path: str, share: float) -> bool:
    """By a hash of the path, so that adding or removing a document moves no other."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _blocks(path: Path) -> Iterator[str]:
    """A file's text with Unix line ends, some of it at a time. Raises UnicodeDecodeError."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        while block := file.read(PIECE):
            # A line end of two characters stays in one block.
            while block.endswith("\r"):
                following = file.read(1)
                if not following:
                    break
                block += following
            yield block.replace("\r\n", "\n")


def _between(blocks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """What the blocks hold of the text from character `start` to `stop`."""
    at = 0
    for block in blocks:
        if part := block[max(0, start - at) : max(0, stop - at)]:
            yield part
        at += len(block)
        if at >= stop:
            return


def _heldout_start(path: Path, share: int) -> int:
    """Where a text's held-out end begins, which is to be at character `share`.

    With the line there, if it is not too long; else behind a word; else right there.
    """
    start = share - min(_REACH, share // 2)
    near = "".join(_between(_blocks(path), start, share))
    line = near.rfind("\n") + 1
    return start + (line or word_end(near, 0, len(near)))


def _in_pieces(split: str, kind: str, path: str, blocks: Iterable[str]) -> Iterator[Document]:
    """A text as a document, or as several where it is long."""
    before = None
    for piece in pieces(blocks, PIECE):
        if before is not None:
            yield Document(split, kind, path, before, goes_on=True)
        before = piece
    if before is not None:
        yield Document(split, kind, path, before)
