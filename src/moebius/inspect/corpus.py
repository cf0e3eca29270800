"""Text files as rows of tokens: a bounded, evenly spread sample of what was given. Shape legend: N
tokens, L row."""

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

from moebius.errors import ConfigError, require
from moebius.text import Tokenizer
from moebius.text.pieces import encode_in_pieces

# Of a corpus so much is read for each token that will be run, at most, and of a file so much at
# least.
_BYTES_PER_TOKEN, _LEAST_BYTES = 16, 2**13
_MOST_KINDS = 12


class Document(NamedTuple):
    """A text, what to call it, and the kind of text it is."""

    name: str
    kind: str
    text: str


def read_documents(paths: Sequence[Path], max_tokens: int) -> list[Document]:
    """The text files among `paths` and below its directories; of a large corpus a piece of each, at
    a random place.

    The choice is always the same; files that `max_tokens` leaves no room for are not read. A file's
    kind is its suffix, or its folder where all have the same one. In directories, hidden files and
    those that are no UTF-8 text are passed over; a file that was named must be text. Raises
    ConfigError naming what is wrong.
    """
    require(bool(paths), "name the text to run through the model: --text FILES or directories")
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    sizes = {file: file.stat().st_size for file in files}
    left = max_tokens * _BYTES_PER_TOKEN
    share = min(1.0, left / max(1, sum(sizes.values())))
    found: list[tuple[Path, str]] = []
    draw = random.Random(0)
    for file in files if share == 1.0 else draw.sample(files, len(files)):
        limit = min(left, max(_LEAST_BYTES, int(share * sizes[file])))
        text = _text(file, draw.randint(0, max(0, sizes[file] - limit)), limit) if limit else ""
        require(
            text is not None or file not in paths,
            f"{file} is binary or not UTF-8; --text takes text files",
        )
        if text:
            found.append((file, text))
            left -= min(limit, sizes[file])
    require(
        bool(found),
        f"there is no text in {', '.join(map(str, paths[:3]))}: nothing but empty or binary files",
    )
    by_suffix = len({file.suffix for file, _ in found}) > 1
    top = Path(os.path.commonpath([file.parent.absolute() for file, _ in found]))
    return [
        Document(str(f), (f.suffix or "no suffix") if by_suffix else _folder(f, top), text)
        for f, text in found
    ]


def _files(path: Path) -> Iterator[Path]:
    require(path.exists(), f"--text {path}: there is no such file or directory")
    require(
        path.is_dir() or path.is_file(),
        f"--text {path} is neither a file nor a directory; name text files",
    )
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        yield from (
            p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
    else:
        yield path


def _folder(file: Path, top: Path) -> str:
    parts = file.parent.absolute().relative_to(top).parts
    return parts[0] if parts else top.name


def _text(path: Path, start: int, limit: int) -> str | None:
    """`limit` bytes of a file from `start`, less the characters cut at its ends; None if they are
    no text."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw, whole = file.read(limit), not file.read(1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    raw = raw.lstrip(bytes(range(0x80, 0xC0))) if start else raw.removeprefix(codecs.BOM_UTF8)
    try:
        return (
            None
            if b"\0" in raw
            else codecs.getincrementaldecoder("utf-8")().decode(raw, final=whole)
        )
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
        """Kinds of document, those of most tokens first; the last may be `other`, which stands for
        the rest."""
        counts: Counter[str] = Counter()
        for (_, kind), tokens in zip(
            self.documents, self.document_N.bincount().tolist(), strict=False
        ):
            counts[kind] += tokens
        found = [kind for kind, tokens in counts.most_common() if tokens]
        return found if len(found) <= _MOST_KINDS else [*found[: _MOST_KINDS - 1], "other"]

    @cached_property
    def kind_N(self) -> Tensor:
        """The kind of each token, as its place in `kinds`."""
        place = {kind: c for c, kind in enumerate(self.kinds)}
        return torch.tensor([place.get(kind, len(place) - 1) for _, kind in self.documents])[
            self.document_N
        ]

    def facts(self) -> dict[str, Any]:
        """What the report says of the text."""
        kinds = dict(zip(self.kinds, self.kind_N.bincount().tolist(), strict=True))
        counts = {"documents": len(self.documents), "read": self.read, "run": len(self.tokens_N)}
        return counts | {"row_length": self.length, "kinds": kinds}

    def context(
        self, position: int, tokenizer: Tokenizer, before: int = 12, after: int = 6
    ) -> tuple[str, str, str]:
        """The text before, of and after a token, within its row and document."""
        row = position // self.length * self.length
        near = slice(max(row, position - before), min(row + self.length, position + after + 1))
        ids, documents = self.tokens_N[near].tolist(), self.document_N[near].tolist()
        here = position - near.start
        same = [i for i, document in enumerate(documents) if document == documents[here]]
        parts = (
            [ids[i] for i in same if i < here],
            [ids[here]],
            [ids[i] for i in same if i > here],
        )
        left, token, right = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
        return left, token, right


def make_rows(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, max_tokens: int
) -> Rows:
    """Tokenise, put documents one behind the other, cut into rows, and keep a random (always the
    same) choice."""
    start = tokenizer.encode("")
    ids, numbers = array("i"), array("i")
    names = []
    for number, (name, kind, text) in enumerate(documents):
        ids.extend(start)
        for piece in encode_in_pieces(text, tokenizer.encode_ordinary):
            ids.extend(piece)
        numbers.extend(repeat(number, len(ids) - len(numbers)))
        names.append((name, kind))
        if len(ids) > _BYTES_PER_TOKEN * max_tokens:
            break
    tokens_N, document_N = (torch.tensor(each, dtype=torch.int32) for each in (ids, numbers))
    require(len(tokens_N) >= 2, "the text is empty: there are no tokens to route")
    length = min(length, len(tokens_N), max_tokens)
    order = torch.randperm(len(tokens_N) // length, generator=torch.Generator().manual_seed(0))
    starts = order[: max_tokens // length].unsqueeze(1) * length + torch.arange(length)
    return Rows(
        tokens_N[starts].flatten(),
        document_N[starts].flatten(),
        length,
        tuple(names),
        len(tokens_N),
    )
