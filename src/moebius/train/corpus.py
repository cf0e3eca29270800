"""The text to train on: which documents there are, and which are held out."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from moebius.errors import ConfigError, require
from moebius.text.pieces import PIECE, pieces, word_end
from moebius.train.tables import CorpusRecipe

SPLITS = ("train", "heldout")
# How far before its share the held-out end of a text may begin, in characters, to begin with a
# line.
_REACH = 2**16


class Document(NamedTuple):
    """One text: `split` is one of SPLITS, `path` says where it is from, relative to the folder that
    was named.

    A long text comes as several in a row, of at most moebius.text.pieces.PIECE characters; all but
    the last `goes_on`.
    """

    split: str
    kind: str
    path: str
    text: str
    goes_on: bool = False


@dataclass(frozen=True)
class Corpus:
    """Text files, folders of them and .jsonl files, by kind; read anew at every pass, a piece at a
    time.

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
        stats = [
            (kind, name, p.stat().st_size, p.stat().st_mtime_ns)
            for kind, _, name, p in self._paths()
        ]
        return hashlib.sha256(repr((stats, self.recipe.text_key)).encode()).hexdigest()

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        self.empty.clear()
        kinds = Counter(kind for kind, _, _, _ in self._paths())
        for kind, named, name, path in self._paths():
            if path.suffix == ".jsonl":
                yield from self._lines(kind, name, path)
            elif (length := self._length(path, named)) and kinds[kind] == 1:
                at = _heldout_start(path, int(length * (1 - self.recipe.heldout_share)))
                yield from _in_pieces("train", kind, name, _between(_blocks(path), 0, at))
                yield from _in_pieces(
                    "heldout", kind, f"{name}:end", _between(_blocks(path), at, length)
                )
            elif length:
                yield from _in_pieces(self._split(name), kind, name, _blocks(path))

    def _paths(self) -> Iterator[tuple[str, bool, str, Path]]:
        """Kind, whether the file itself was named, the name, the path; in order."""
        for kind, roots in self.recipe.files.items():
            for root in map(Path, roots):
                require(root.exists(), f"corpus.files.{kind}: {root} does not exist")
                # It is read several times over, which a pipe or a device is not.
                again = root.is_dir() or root.is_file()
                require(again, f"corpus.files.{kind}: {root} is neither a file nor a directory")
                if not root.is_dir():
                    yield kind, True, root.name, root
                    continue
                for path in sorted(p for p in root.rglob("*") if p.is_file()):
                    relative = path.relative_to(root)
                    if not _is_hidden(relative):
                        yield kind, False, relative.as_posix(), path

    def _split(self, path: str) -> str:
        return SPLITS[is_held_out(path, self.recipe.heldout_share)]

    def _length(self, path: Path, named: bool) -> int:
        """How many characters of text a file has; 0 for one that is passed over."""
        length, blank, binary = 0, True, False
        try:
            for block in _blocks(path):
                length, blank, binary = (
                    length + len(block),
                    blank and block.isspace(),
                    binary or "\0" in block,
                )
        except UnicodeDecodeError:
            binary = True
        require(
            not (binary and named), f"{path} is binary: it is no UTF-8 text, or holds a zero byte"
        )
        if binary or blank:
            (self.skipped if binary else self.empty).append(str(path))
            return 0
        return length

    def _lines(self, kind: str, name: str, path: Path) -> Iterator[Document]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where, place = f"{path}, line {number}", f"{name}:{number}"
                try:
                    entry = json.loads(line)
                    text, split = (
                        entry[self.recipe.text_key],
                        entry.get("split", self._split(place)),
                    )
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    wanted = (
                        f"it must be a JSON object with a text under {self.recipe.text_key!r} "
                        "(corpus.text_key)"
                    )
                    raise ConfigError(f"{where}: {wanted}") from None
                require(isinstance(text, str), f"{where}: {self.recipe.text_key!r} is no text")
                require(
                    _is_unicode(text),
                    f"{where}: {self.recipe.text_key!r} holds half a surrogate pair",
                )
                require(
                    split in SPLITS,
                    f"{where}: split is {split!r}; it must be one of {', '.join(SPLITS)}",
                )
                if text.strip():
                    yield from _in_pieces(split, kind, place, [text])
                else:
                    self.empty.append(where)


def reads_below(root: Path, folder: Path) -> bool:
    """Whether what is in `folder` would be read as part of `root`."""
    folder, root = folder.resolve(), root.resolve()
    return folder.is_relative_to(root) and not _is_hidden(folder.relative_to(root))


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def is_held_out(path: str, share: float) -> bool:
    """By a hash of the path, so that adding or removing a document moves no other."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64 < share


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
            while block.endswith("\r") and (next_one := file.read(1)):
                block += next_one
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
    """Where a text's held-out end begins, which is to be at character `share`: with the line there,
    if it is not too long; else behind a word; else right there."""
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
