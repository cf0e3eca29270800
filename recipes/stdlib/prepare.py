"""The text that the recipes beside train on: Python's standard library, as JSON lines of four
kinds.

    .venv/bin/python recipes/stdlib/prepare.py

writes library.jsonl, tests.jsonl, docs.jsonl (help topics) and chat.jsonl into recipes/stdlib/text.
An object has the document's `text`, its `path` and its `split`. What is written depends on this
Python alone: the same one gives the same documents in the same order, and a document's split
follows from a hash of its path. The texts are under the PSF licence 2.0.
"""

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from moebius.errors import ConfigError, MoebiusError
from moebius.files import begins_with, check_target, make_directory, write_file
from moebius.train.corpus import SPLITS, Document, is_held_out
from moebius.train.tokenizer import IM_END, IM_START

KINDS = ("library", "tests", "docs", "chat")
HELDOUT_SHARE = 0.045
CHATS = 4000
SEED = 1

Message = dict[str, str]
_EXCLUDED_TOP = frozenset(
    {"site-packages", "dist-packages", "encodings", "pydoc_data", "lib-dynload"}
)
_EXCLUDED_FOLDERS = frozenset(
    {"__pycache__", "data", "cjkencodings", "encoded_modules", "tokenizedata"}
)
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_WINDOW = 5
_MAX_SHARED_WINDOWS = 0.2
_MIN_ANSWER = 40
_MAX_ANSWER = 1200
# How the files that this script writes begin.
_OURS = begins_with(b'{"path": "')


def read_library(heldout_share: float = HELDOUT_SHARE, root: Path | None = None) -> list[Document]:
    """The standard library under `root` (this Python's by default), split by whole documents.

    `heldout_share` is the expected share of documents held out, chosen by a hash of the path, so
    that adding or removing a file moves no other; near-duplicates of training documents are left
    out. Raises: ConfigError, when there is too little text to train on.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    texts: dict[str, tuple[str, str]] = {}
    for path, kind, text in (*_modules(folder), *_topics(folder)):
        texts.setdefault(text, (path, kind))
    documents = [
        Document(SPLITS[is_held_out(p, heldout_share)], kind, p, text)
        for text, (p, kind) in texts.items()
    ]
    known = {window for d in documents if d.split == "train" for window in _windows(d.text)}
    kept = [
        d for d in documents if d.split == "train" or _shared(d.text, known) <= _MAX_SHARED_WINDOWS
    ]
    if {d.split for d in kept} != set(SPLITS):
        raise ConfigError(
            f"{folder} holds {len(documents)} usable documents; training needs the standard "
            "library's .py sources"
        )
    return kept


def _modules(root: Path) -> Iterator[tuple[str, str, str]]:
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted(paths, key=lambda p: p.as_posix()):
        if path.parts[0] in _EXCLUDED_TOP or _EXCLUDED_FOLDERS.intersection(path.parts[:-1]):
            continue
        text = _readable_source((root / path).read_bytes())
        if text is not None and not _is_table(text):
            kind = "tests" if _TEST_FOLDERS.intersection(path.parts[:-1]) else "library"
            yield path.as_posix(), kind, text


def _readable_source(raw: bytes) -> str | None:
    """The text of a module that is UTF-8 and parses, with Unix line ends; None for the deliberately
    broken ones."""
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text


def _is_table(text: str) -> bool:
    """True for empty files, generated tables and files of data: many digits, or very long lines."""
    if len(text.strip()) < 64:
        return True
    digits = sum(text.count(digit) for digit in "0123456789")
    return digits > 0.1 * len(text) or max(map(len, text.split("\n"))) > 400


def _topics(root: Path) -> Iterator[tuple[str, str, str]]:
    """The language reference as `help()` shows it: one document a topic of pydoc_data/topics.py."""
    source = root / "pydoc_data" / "topics.py"
    if not source.exists():
        return
    topics: dict[str, str] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
    for name in sorted(topics):
        yield f"pydoc_data/topics/{name}", "docs", topics[name].strip() + "\n"


def _windows(text: str) -> set[int]:
    """Hashes of all runs of 5 consecutive non-blank lines, indentation ignored."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return {hash(tuple(lines[i : i + _WINDOW])) for i in range(max(1, len(lines) - _WINDOW + 1))}


def _shared(text: str, known: set[int]) -> float:
    windows = _windows(text)
    return len(windows & known) / len(windows)


def conversations(documents: Iterable[Document], limit: int, seed: int) -> list[list[Message]]:
    """At most `limit` conversations of two messages, made by rule from training documents of kind
    library and docs.

    No text is invented: a question is a fixed phrase around a function's name, signature or
    docstring, or around a help topic's name; the answer is the function's own source, its
    docstring's first paragraph, or the topic's first paragraph. Which ones, and their order, follow
    from a hash of `seed` and the text alone.
    """
    found: dict[str, list[Message]] = {}
    makers = {"library": _about_functions, "docs": _about_topic}
    for document in documents:
        if document.kind in makers and document.split == "train":
            for question, answer in makers[document.kind](document):
                if _MIN_ANSWER <= len(answer) <= _MAX_ANSWER:
                    key = hashlib.sha256(f"{seed}\0{question}\0{answer}".encode()).hexdigest()
                    found[key] = [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
    return [found[key] for key in sorted(found)[:limit]]


def _about_functions(document: Document) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(document.text)
    lines = document.text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("__"):
            continue
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        noun = "class" if isinstance(node, ast.ClassDef) else "function"
        docstring = ast.get_docstring(node)
        if docstring:
            summary = " ".join(docstring.split("\n\n")[0].split())
            yield f"Write a Python {noun} `{node.name}`: {summary}", source
            yield f"What does the {noun} `{node.name}` do?", docstring.split("\n\n")[0]
        head, _, body = source.partition("\n")
        if body and head.rstrip().endswith(":"):
            yield f"Complete this Python code:\n{head}", source


def _about_topic(document: Document) -> Iterator[tuple[str, str]]:
    name = document.path.rsplit("/", 1)[-1]
    paragraphs = [
        p
        for p in document.text.split("\n\n")
        if len(p) >= _MIN_ANSWER and not set(p) <= set("*=-~\n ")
    ]
    if paragraphs:
        yield f"Explain the Python topic `{name}`.", paragraphs[0]


def render_chat(messages: Iterable[Message]) -> str:
    """What the tokenizer's chat template renders for a finished conversation."""
    return "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)


def check_folder(folder: Path) -> None:
    """Say before the work what `write` would say after it: ConfigError or StorageError."""
    make_directory(folder)
    for kind in KINDS:
        check_target(folder / f"{kind}.jsonl", _OURS)


def write(documents: list[Document], folder: Path, chats: int = CHATS, seed: int = SEED) -> None:
    """The documents, and conversations made from them, as one file of JSON lines a kind.

    Raises ConfigError where a file of such a name is something else.
    """
    check_folder(folder)
    made = enumerate(conversations(documents, chats, seed))
    talks = [Document("train", "chat", f"chat/{i}", render_chat(chat)) for i, chat in made]
    for kind in KINDS:
        lines = [_line(document) for document in (*documents, *talks) if document.kind == kind]
        write_file(folder / f"{kind}.jsonl", "".join(lines), ours=_OURS)


def _line(document: Document) -> str:
    entry = {"path": document.path, "split": document.split, "text": document.text}
    return json.dumps(entry) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Python's standard library as JSON lines to train on."
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("text"))
    out = parser.parse_args(arguments).out
    check_folder(out)
    library = read_library()
    write(library, out)
    print(f"{len(library)} documents of Python's standard library in {out}")


if __name__ == "__main__":
    try:
        main()
    except MoebiusError as error:
        sys.exit(f"prepare.py: {error}")
