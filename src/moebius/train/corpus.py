"""The text that ships with Python itself: which documents, which are held out, and their fingerprint.

Everything here is a pure function of the installed standard library: the same Python gives the same documents in the
same order. The texts are under the PSF licence 2.0.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from moebius.errors import ConfigError

Kind = Literal["library", "tests", "docs", "chat"]
KINDS: tuple[Kind, ...] = ("library", "tests", "docs", "chat")

_EXCLUDED_TOP = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload"})
_EXCLUDED_FOLDERS = frozenset({"__pycache__", "data", "cjkencodings", "encoded_modules", "tokenizedata"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_WINDOW = 5
_MAX_SHARED_WINDOWS = 0.2


@dataclass(frozen=True, slots=True)
class Document:
    """One file or one help topic: `path` is relative to the standard library, with forward slashes."""

    path: str
    kind: Kind
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents; no near-duplicate of a training document is held out."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of every path and text, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.heldout):
            for document in part:
                for field in (document.path, document.text):
                    encoded = field.encode()
                    digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    @property
    def python_version(self) -> str:
        return platform.python_version()


def read_corpus(heldout_share: float, root: Path | None = None) -> Corpus:
    """Read the standard library under `root` (this Python's by default) and split it by whole documents.

    `heldout_share` is the expected share of documents held out, chosen by a hash of the path, so that adding or
    removing a file moves no other.

    Raises: ConfigError, when there is too little text to train on.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents = list(_without_copies([*_modules(folder), *_topics(folder)]))
    train = tuple(d for d in documents if not _is_held_out(d.path, heldout_share))
    candidates = [d for d in documents if _is_held_out(d.path, heldout_share)]
    known = {window for d in train for window in _windows(d.text)}
    heldout = tuple(d for d in candidates if _shared_share(d.text, known) <= _MAX_SHARED_WINDOWS)
    if not train or not heldout:
        raise ConfigError(
            f"{folder} holds {len(documents)} usable documents; training needs the standard library's .py sources"
        )
    return Corpus(train, heldout)


def _modules(root: Path) -> Iterator[Document]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted(paths, key=lambda p: p.as_posix()):
        if path.parts[0] in _EXCLUDED_TOP or _EXCLUDED_FOLDERS.intersection(path.parts[:-1]):
            continue
        text = _readable_source((root / path).read_bytes())
        if text is not None and not _is_table(text):
            kind: Kind = "tests" if _TEST_FOLDERS.intersection(path.parts[:-1]) else "library"
            yield Document(path.as_posix(), kind, text)


def _readable_source(raw: bytes) -> str | None:
    """The text of a module that is UTF-8 and parses, with Unix line ends; None for the deliberately broken ones."""
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text


def _is_table(text: str) -> bool:
    """True for empty files, generated tables and files of data: many digits, or very long lines."""
    if len(text.strip()) < 64:
        return True
    digits = sum(text.count(digit) for digit in "0123456789")
    return digits > 0.1 * len(text) or max(map(len, text.split("\n"))) > 400


def _topics(root: Path) -> Iterator[Document]:
    """The language reference as `help()` shows it: one document a topic of pydoc_data/topics.py."""
    source = root / "pydoc_data" / "topics.py"
    if not source.exists():
        return
    topics: dict[str, str] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
    for name in sorted(topics):
        yield Document(f"pydoc_data/topics/{name}", "docs", topics[name].strip() + "\n")


def _without_copies(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            yield document


def _is_held_out(path: str, share: float) -> bool:
    draw = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    return draw < share


def _windows(text: str) -> set[int]:
    """Hashes of all runs of 5 consecutive non-blank lines, indentation ignored."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {hash(tuple(lines[i : i + _WINDOW])) for i in range(max(1, len(lines) - _WINDOW + 1))}


def _shared_share(text: str, known: set[int]) -> float:
    windows = _windows(text)
    return len(windows & known) / len(windows)
