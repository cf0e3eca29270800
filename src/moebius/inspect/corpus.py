"""Text files as rows of tokens: a bounded, evenly spread sample of what was given.

Shape legend: N tokens, L row.
"""

import codecs
import os
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.text import Tokenizer
from moebius.text.pieces import encode_in_pieces

# The most that is read of a corpus for each token that will be run, and the least of a file.
_BYTES_PER_TOKEN = 16
_LEAST_BYTES = 2**13
_MOST_KINDS = 12


class Document(NamedTuple):
    """A text, what to call it, and the kind of text it is."""

    name: str
    kind: str
    text: str


def read_documents(paths: Sequence[Path], max_tokens: int) -> list[Document]:
    """The text files among `paths` and below its directories; of a large corpus a piece of each.

    The pieces are at random places, but the choice is always the same; files that `max_tokens`
    leaves no room for are not read. A file's kind is its suffix, or its folder where all have the
    same one. In directories, hidden files and those that are no UTF-8 text are passed over; a file
    that was named must be text. Raises ConfigError naming what is wrong.
    """
    if not paths:
        raise ConfigError("name the text to run through the model: --text FILES or directories")
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    found = _read(files, set(paths), max_tokens * _BYTES_PER_TOKEN)
    if not found:
        named = ", ".join(map(str, paths[:3]))
        raise ConfigError(f"there is no text in {named}: nothing but empty or binary files")
    by_suffix = len({file.suffix for file, _ in found}) > 1
    top = Path(os.path.commonpath([file.parent.absolute() for file, _ in found]))
    documents = []
    for file, text in found:
        kind = (file.suffix or "no suffix") if by_suffix else _folder(file, top)
        documents.append(Document(str(file), kind, text))
    return documents


def _read(files: Sequence[Path], named: set[Path], most: int) -> list[tuple[Path, str]]:
    """The files that hold text, each with its text or a piece of it: `most` bytes in all."""
    sizes = {file: file.stat().st_size for file in files}
    share = min(1.0, most / max(1, sum(sizes.values())))
    left = most
    found: list[tuple[Path, str]] = []
    draw = random.Random(0)
    for file in files if share == 1.0 else draw.sample(files, len(files)):
        limit = min(left, max(_LEAST_BYTES, int(share * sizes[file])))
        start = draw.randint(0, max(0, sizes[file] - limit)) if limit else 0
        text = _text(file, start, limit) if limit else ""
        if text is None and file in named:
            raise ConfigError(f"{file} is binary or not UTF-8; --text takes text files")
        if text:
            found.append((file, text))
            left -= min(limit, sizes[file])
    return found


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise ConfigError(f"--text {path}: there is no such file or directory")
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise ConfigError(f"--text {path} is neither a file nor a directory; name text files")
    for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        if not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def _folder(file: Path, top: Path) -> str:
    parts = file.parent.absolute().relative_to(top).parts
    return parts[0] if parts else top.name


def _text(path: Path, start: int, limit: int) -> str | None:
    """`limit` bytes of a file from `start`, less the characters cut at its ends.

    None if they are no text.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(limit)
            whole = not file.read(1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if b"\0" in raw:
        return None
    if start:
        raw = raw.lstrip(bytes(range(0x80, 0xC0)))  # the end of a character that began before
    else:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
    except UnicodeDecodeError:
        return None


@dataclass(frozen=True)
class Rows:
    """Rows of L tokens, one after the other and in random order: what a model is run on.

    tokens_N, document_N   ids, and the number in `documents` of each
    read                   how many tokens the documents have; rows hold at most max_tokens of them
    """

    tokens_N: Tensor
    document_N: Tensor
    length: int
    documents: tuple[tuple[str, str], ...]
    read: int

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of document, those of most tokens first; the last may be `other`, for the rest."""
        counts: Counter[str] = Counter()
        tokens_by_document = self.document_N.bincount().tolist()
        # Documents without a token in the rows may be missing at the end.
        for (_, kind), tokens in zip(self.documents, tokens_by_document, strict=False):
            counts[kind] += tokens
        found = [kind for kind, tokens in counts.most_common() if tokens]
        if len(found) <= _MOST_KINDS:
            return found
        return [*found[: _MOST_KINDS - 1], "other"]

    @cached_property
    def kind_N(self) -> Tensor:
        """The kind of each token, as its place in `kinds`."""
        place = {kind: c for c, kind in enumerate(self.kinds)}
        last = len(place) - 1
        places = torch.tensor([place.get(kind, last) for _, kind in self.documents])
        return places[self.document_N]

    def facts(self) -> dict[str, Any]:
        """What the report says of the text."""
        kinds = dict(zip(self.kinds, self.kind_N.bincount().tolist(), strict=True))
        return {
            "documents": len(self.documents),
            "read": self.read,
            "run": len(self.tokens_N),
            "row_length": self.length,
            "kinds": kinds,
        }

    def context(
        self, position: int, tokenizer: Tokenizer, before: int = 12, after: int = 6
    ) -> tuple[str, str, str]:
        """The text before, of and after a token, within its row and document."""
        row = position // self.length * self.length
        near = slice(max(row, position - before), min(row + self.length, position + after + 1))
        ids = self.tokens_N[near].tolist()
        documents = self.document_N[near].tolist()
        here = position - near.start

        def text(start: int, stop: int) -> str:
            same = [ids[i] for i in range(start, stop) if documents[i] == documents[here]]
            return tokenizer.decode(same, skip_special_tokens=False)

        return text(0, here), text(here, here + 1), text(here + 1, len(ids))


def make_rows(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, max_tokens: int
) -> Rows:
    """Tokenise, put documents one behind the other, cut into rows, and keep a choice of them.

    The choice is random, but always the same.
    """
    start = tokenizer.encode("")
    ids = array("i")
    numbers = array("i")
    names = []
    for number, document in enumerate(documents):
        ids.extend(start)
        for piece in encode_in_pieces(document.text, tokenizer.encode_ordinary):
            ids.extend(piece)
        numbers.extend(repeat(number, len(ids) - len(numbers)))
        names.append((document.name, document.kind))
        if len(ids) > _BYTES_PER_TOKEN * max_tokens:
            break
    tokens_N = torch.tensor(ids, dtype=torch.int32)
    document_N = torch.tensor(numbers, dtype=torch.int32)
    if len(tokens_N) < 2:
        raise ConfigError("the text is empty: there are no tokens to route")
    length = min(length, len(tokens_N), max_tokens)
    order = torch.randperm(len(tokens_N) // length, generator=torch.Generator().manual_seed(0))
    starts = order[: max_tokens // length].unsqueeze(1) * length + torch.arange(length)
    return Rows(
        tokens_N=tokens_N[starts].flatten(),
        document_N=document_N[starts].flatten(),
        length=length,
        documents=tuple(names),
        read=len(tokens_N),
    )
