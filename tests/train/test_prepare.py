"""recipes/stdlib/prepare.py: which of the standard library's files are documents, and which are
held out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from moebius.errors import ConfigError
from moebius.train.corpus import Corpus, Document
from moebius.train.tables import CorpusRecipe
from stdlib import prepare as script
from stdlib.prepare import read_library, write

CODE = "def function_{n}(argument):\n    return argument + some_name_{n}\n\n\n"


def _write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def _module(n: int) -> str:
    return "".join(
        CODE.format(n=f"{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10]}{i}x") for i in "abcdefgh"
    )


def _fraction(path: str) -> float:
    return int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) / 16**16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return _write(tmp_path, {f"m{n}.py": _module(n) for n in range(40)})


def test_every_document_is_on_the_side_its_path_hashes_to(root: Path) -> None:
    found = {
        split: [d.path for d in read_library(0.3, root) if d.split == split]
        for split in ("train", "heldout")
    }
    assert set(found["heldout"]) == {f"m{n}.py" for n in range(40) if _fraction(f"m{n}.py") < 0.3}
    assert set(found["train"]) == {f"m{n}.py" for n in range(40) if _fraction(f"m{n}.py") >= 0.3}
    assert found["train"] == sorted(found["train"])


def test_what_is_written_is_what_training_reads(root: Path, tmp_path: Path) -> None:
    documents = read_library(0.3, root)
    write(documents, tmp_path / "text")
    corpus = Corpus(
        CorpusRecipe({"library": (str(tmp_path / "text" / "library.jsonl"),)}, "text", 0.5)
    )
    found = [d._replace(path=documents[i].path) for i, d in enumerate(corpus)]
    assert found == documents and isinstance(found[0], Document)


def test_what_is_left_out(root: Path) -> None:
    _write(
        root,
        {
            "encodings/cp437.py": _module(50),
            "site-packages/thing.py": _module(51),
            "__pycache__/m1.py": _module(52),
            "lib2to3/tests/data/py2.py": _module(53),
            "broken.py": "def f(:\n" + _module(54),
            "latin.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n" + _module(55).encode(),
            "table.py": "TABLE = {\n" + "".join(f"    {n}: {n * 7},\n" for n in range(400)) + "}\n",
            "long.py": _module(56) + f"DATA = '{'x' * 500}'\n",
            "empty.py": "",
            "copy_of_m0.py": _module(0),
            "test/test_kept.py": _module(57),
        },
    )
    documents = {d.path: d.kind for d in read_library(0.3, root)}
    # Of two equal files the first by path stays.
    expected = {f"m{n}.py" for n in range(1, 40)} | {"copy_of_m0.py", "test/test_kept.py"}
    assert set(documents) == expected
    assert documents["test/test_kept.py"] == "tests"
    assert documents["m1.py"] == "library"


def test_a_near_copy_of_a_training_document_is_not_held_out(root: Path) -> None:
    trained = next(n for n in range(40) if _fraction(f"m{n}.py") >= 0.3)
    name = next(f"near{n}.py" for n in range(100) if _fraction(f"near{n}.py") < 0.3)
    indented = "class Wrapped:\n" + "".join(
        f"    {line}\n" for line in _module(trained).split("\n")
    )
    _write(root, {name: indented})
    assert name not in {d.path for d in read_library(0.3, root) if d.split == "heldout"}
    _write(root, {name: _module(77)})
    assert name in {d.path for d in read_library(0.3, root) if d.split == "heldout"}


def test_help_topics_are_plain_text(root: Path) -> None:
    topics = {"if": "\nThe if statement\n", "for": "Loops " * 20}
    _write(root, {"pydoc_data/topics.py": f"topics = {topics!r}\n"})
    found = {d.path: d.text for d in read_library(0.3, root) if d.kind == "docs"}
    assert found == {
        "pydoc_data/topics/if": "The if statement\n",
        "pydoc_data/topics/for": ("Loops " * 20).strip() + "\n",
    }


def test_a_python_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0 usable documents.*\.py sources"):
        read_library(0.05, tmp_path)


def test_files_of_others_are_left_alone_and_said_before_the_work(tmp_path: Path) -> None:
    notes = tmp_path / "docs.jsonl"
    notes.write_text("a year of notes")
    with pytest.raises(ConfigError, match=r"docs\.jsonl holds something else"):
        script.main(["--out", str(tmp_path)])
    assert notes.read_text() == "a year of notes"
    assert list(tmp_path.iterdir()) == [notes]


def test_its_own_files_are_written_anew(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write([Document("train", "docs", "topics/if", text)], tmp_path)
        found = json.loads((tmp_path / "docs.jsonl").read_text())
        assert found == {"path": "topics/if", "split": "train", "text": text}
    assert (tmp_path / "chat.jsonl").read_text() == ""
