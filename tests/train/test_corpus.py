from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from moebius.errors import ConfigError
from moebius.train.corpus import Corpus
from moebius.train.tables import CorpusRecipe


def _write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def _fraction(path: str) -> float:
    return int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) / 16**16


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
    corpus = Corpus(CorpusRecipe(files, "body", 0.3))
    found = list(corpus)
    assert found == list(corpus), "a second pass reads the same"
    texts = {d.path: (d.kind, d.text) for d in found}
    assert texts.pop("b.txt") == ("notes", "two\nlines") and texts.pop("deep/a.md") == (
        "notes",
        "é",
    )
    assert texts == {f"data.jsonl:{i + 1}": ("data", f"line {i}") for i in range(30)}
    assert sorted(Path(name).name for name in corpus.skipped) == ["image.png", "zero.txt"]
    for document in found:
        assert document.split == ("heldout" if _fraction(document.path) < 0.3 else "train")
    before = Corpus(CorpusRecipe(files, "body", 0.3)).key()
    (root / "notes/b.txt").write_text("changed")
    assert Corpus(CorpusRecipe(files, "body", 0.3)).key() != before


def test_of_one_text_file_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {i:03}\n" for i in range(100))
    path = _write(tmp_path, {"book.txt": text}) / "book.txt"
    train, heldout = Corpus(CorpusRecipe({"book": (str(path),)}, "text", 0.1))
    assert (train.split, heldout.split) == ("train", "heldout")
    assert train.text + heldout.text == text
    assert heldout.text == text[-90:]


def test_an_object_may_name_its_split(tmp_path: Path) -> None:
    splits = ["heldout", "train"] * 10
    lines = [json.dumps({"text": f"{i}", "split": split}) for i, split in enumerate(splits)]
    path = _write(tmp_path, {"lines.jsonl": "\n".join(lines)}) / "lines.jsonl"
    assert [d.split for d in Corpus(CorpusRecipe({"a": (str(path),)}, "text", 0.1))] == splits


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
        ("lines.jsonl", b"[1]\n", r"line 1: it must be a JSON object"),
        (
            "lines.jsonl",
            b'{"text": "a", "split": "test"}',
            r"line 1: split is 'test'; it must be one of train, heldout",
        ),
        ("none", b"", r"corpus\.files\.a: .* does not exist"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(Corpus(CorpusRecipe({"a": (str(path),)}, "text", 0.1)))
