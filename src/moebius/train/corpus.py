"""The text that ships with Python itself, or files of one's own: which documents there are, and which are held out.

What is read depends on the files alone: the same Python gives the same documents in the same order, and a document's
side follows from a hash of its path. The standard library's texts are under the PSF licence 2.0.
"""

import ast
import hashlib
import json
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moebius.config import require
from moebius.errors import ConfigError

KINDS = ("library", "tests", "docs", "chat")

_EXCLUDED_TOP = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload"})
_EXCLUDED_FOLDERS = frozenset({"__pycache__", "data", "cjkencodings", "encoded_modules", "tokenizedata"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_WINDOW = 5
_MAX_SHARED_WINDOWS = 0.2


@dataclass(frozen=True, slots=True)
class Document:
    """One text: `path` says where it is from, relative to the standard library or to the folder that was named."""

    path: str
    kind: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents; no near-duplicate of a training document is held out."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        yield from (("train", document) for document in self.train)
        yield from (("heldout", document) for document in self.heldout)

    @cached_property
    def key(self) -> str:
        """Fingerprint of every path and text, in order."""
        digest = hashlib.sha256()
        for split, document in self:
            add_document(digest, split, document)
        return digest.hexdigest()


def add_document(digest: Any, split: str, document: Document) -> None:
    """A document's part in the fingerprint of all."""
    for part in (split, document.kind, document.path, document.text):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)


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
            kind = "tests" if _TEST_FOLDERS.intersection(path.parts[:-1]) else "library"
            yield Document(path.as_posix(), kind, text)


def _readable_source(raw: bytes) -> str | None:
    """The text of a module that is UTF-8 and parses, with Unix line ends; None for the deliberately broken ones."""
    text = _readable(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text or "\0")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
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


@dataclass(frozen=True)
class FileCorpus:
    """Text files, folders of them and .jsonl files, by kind; read anew at every pass, never held as a whole.

    In a folder, files that are no UTF-8 text are passed over and counted in `skipped`, and hidden ones are not looked
    at. A document is held out by a hash of its path (and line); of a kind that is one text file, its end is.
    Raises: ConfigError naming the file, for one that is missing, binary or no JSON.
    """

    files: Mapping[str, tuple[str, ...]]
    text_key: str
    heldout_share: float
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def key(self) -> str:
        """Fingerprint of every file's path, size and time of change."""
        stats = [(kind, name, p.stat().st_size, p.stat().st_mtime_ns) for kind, _, name, p in self._paths()]
        return hashlib.sha256(repr((stats, self.text_key)).encode()).hexdigest()

    def __iter__(self) -> Iterator[tuple[str, Document]]:
        self.skipped.clear()
        kinds = Counter(kind for kind, _, _, _ in self._paths())
        for kind, named, name, path in self._paths():
            if path.suffix == ".jsonl":
                for number, text in self._lines(path):
                    yield self._side(Document(f"{name}:{number}", kind, text))
            elif (whole := self._text(path, named)) and whole.strip():
                if kinds[kind] == 1:
                    cut = whole.rfind("\n", 0, int(len(whole) * (1 - self.heldout_share))) + 1
                    yield "train", Document(name, kind, whole[:cut])
                    yield "heldout", Document(f"{name}:end", kind, whole[cut:])
                else:
                    yield self._side(Document(name, kind, whole))

    def _paths(self) -> Iterator[tuple[str, bool, str, Path]]:
        """Kind, whether the file itself was named, the name, the path; in order."""
        for kind, roots in self.files.items():
            for root in map(Path, roots):
                if root.is_dir():
                    for path in sorted(p for p in root.rglob("*") if p.is_file()):
                        relative = path.relative_to(root)
                        if not any(part.startswith(".") for part in relative.parts):
                            yield kind, False, relative.as_posix(), path
                else:
                    require(root.is_file(), f"corpus.files.{kind}: {root} does not exist")
                    yield kind, True, root.name, root

    def _side(self, document: Document) -> tuple[str, Document]:
        return "heldout" if _is_held_out(document.path, self.heldout_share) else "train", document

    def _text(self, path: Path, named: bool) -> str | None:
        text = _readable(path.read_bytes())
        require(text is not None or not named, f"{path} is binary: it is no UTF-8 text, or holds a zero byte")
        if text is None:
            self.skipped.append(str(path))
        return text

    def _lines(self, path: Path) -> Iterator[tuple[int, str]]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line) if line.strip() else {self.text_key: ""}
                    text = entry[self.text_key]
                    require(isinstance(text, str), f"{path}, line {number}: {self.text_key!r} is no text")
                except (ValueError, KeyError, TypeError) as error:
                    if isinstance(error, ConfigError):
                        raise
                    wanted = f"it must be a JSON object with a text under {self.text_key!r} (corpus.text_key)"
                    raise ConfigError(f"{path}, line {number}: {wanted}") from None
                if text.strip():
                    yield number, text


def _readable(raw: bytes) -> str | None:
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text
