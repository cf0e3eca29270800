from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from moebius.errors import ConfigError
from moebius.train.corpus import FileCorpus, read_corpus

CODE = "def function_{n}(argument):\n    return argument + some_name_{n}\n\n\n"


def _write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def _module(n: int) -> str:
    return "".join(CODE.format(n=f"{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10]}{i}x") for i in "abcdefgh")


def _fraction(path: str) -> float:
    return int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) / 16**16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return _write(tmp_path, {f"m{n}.py": _module(n) for n in range(40)})


def test_every_document_is_on_the_side_its_path_hashes_to(root: Path) -> None:
    corpus = read_corpus(0.3, root)
    assert {d.path for d in corpus.heldout} == {f"m{n}.py" for n in range(40) if _fraction(f"m{n}.py") < 0.3}
    assert {d.path for d in corpus.train} == {f"m{n}.py" for n in range(40) if _fraction(f"m{n}.py") >= 0.3}
    assert [d.path for d in corpus.train] == sorted(d.path for d in corpus.train)


def test_the_fingerprint_follows_the_text(root: Path) -> None:
    before = read_corpus(0.3, root).key
    assert read_corpus(0.3, root).key == before
    (root / "m3.py").write_text(_module(3) + "x = None\n")
    assert read_corpus(0.3, root).key != before


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
    corpus = read_corpus(0.3, root)
    documents = {d.path: d.kind for d in (*corpus.train, *corpus.heldout)}
    # Of two equal files the first by path stays.
    expected = {f"m{n}.py" for n in range(1, 40)} | {"copy_of_m0.py", "test/test_kept.py"}
    assert set(documents) == expected
    assert documents["test/test_kept.py"] == "tests"
    assert documents["m1.py"] == "library"


def test_a_near_copy_of_a_training_document_is_not_held_out(root: Path) -> None:
    trained = next(n for n in range(40) if _fraction(f"m{n}.py") >= 0.3)
    name = next(f"near{n}.py" for n in range(100) if _fraction(f"near{n}.py") < 0.3)
    indented = "class Wrapped:\n" + "".join(f"    {line}\n" for line in _module(trained).split("\n"))
    _write(root, {name: indented})
    assert name not in {d.path for d in read_corpus(0.3, root).heldout}
    _write(root, {name: _module(77)})
    assert name in {d.path for d in read_corpus(0.3, root).heldout}


def test_help_topics_are_plain_text(root: Path) -> None:
    topics = {"if": "\nThe if statement\n", "for": "Loops " * 20}
    _write(root, {"pydoc_data/topics.py": f"topics = {topics!r}\n"})
    corpus = read_corpus(0.3, root)
    found = {d.path: d.text for d in (*corpus.train, *corpus.heldout) if d.kind == "docs"}
    assert found == {
        "pydoc_data/topics/if": "The if statement\n",
        "pydoc_data/topics/for": ("Loops " * 20).strip() + "\n",
    }


def test_a_python_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0 usable documents.*\.py sources"):
        read_corpus(0.05, tmp_path)


def test_files_folders_and_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"body": f"line {i}", "other": 1}) for i in range(30)]
    root = _write(
        tmp_path,
        {
            "notes/b.txt": "two\r\nlines",
            "notes/deep/a.md": "é",
            "notes/image.png": b"\x89PNG\x00\xff",
            "notes/zero.txt": b"a\x00b",
            "notes/.hidden/c.txt": "no",
            "notes/empty.txt": " \n",
            "data.jsonl": "\n".join(lines) + "\n\n",
        },
    )
    files = {"notes": (str(root / "notes"),), "data": (str(root / "data.jsonl"),)}
    corpus = FileCorpus(files, "body", 0.3)
    found = list(corpus)
    assert found == list(corpus), "a second pass reads the same"
    texts = {d.path: (d.kind, d.text) for _, d in found}
    assert texts.pop("b.txt") == ("notes", "two\nlines") and texts.pop("deep/a.md") == ("notes", "é")
    assert texts == {f"data.jsonl:{i + 1}": ("data", f"line {i}") for i in range(30)}
    assert sorted(Path(name).name for name in corpus.skipped) == ["image.png", "zero.txt"]
    for split, document in found:
        assert split == ("heldout" if _fraction(document.path) < 0.3 else "train")
    before = FileCorpus(files, "body", 0.3).key
    (root / "notes/b.txt").write_text("changed")
    assert FileCorpus(files, "body", 0.3).key != before


def test_of_one_text_file_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {i:03}\n" for i in range(100))
    path = _write(tmp_path, {"book.txt": text}) / "book.txt"
    (_, train), (_, heldout) = FileCorpus({"book": (str(path),)}, "text", 0.1)
    assert train.text + heldout.text == text
    assert heldout.text == text[-90:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image.txt", b"\xff\xfe\x00", r"image\.txt is binary"),
        (
            "lines.jsonl",
            b'{"text": "a"}\n{"txt": "b"}\n',
            r"lines\.jsonl, line 2: it must be a JSON object with a text",
        ),
        ("lines.jsonl", b'{"text": "a"}\nnothing\n', r"line 2: it must be a JSON object"),
        ("lines.jsonl", b'{"text": 3}\n', r"line 1: 'text' is no text"),
        ("none", b"", r"corpus\.files\.a: .* does not exist"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(FileCorpus({"a": (str(path),)}, "text", 0.1))
