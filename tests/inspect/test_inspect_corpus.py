"""Text in: what is read, how it is sampled, and one clear line for what is no text."""

import os
from pathlib import Path

import pytest

from moebius.errors import ConfigError
from moebius.inspect.corpus import Document, make_rows, read_documents
from moebius.text import Tokenizer


def test_kinds_are_suffixes_or_folders(corpus: Path, tmp_path: Path) -> None:
    kinds = {Path(d.name).name: d.kind for d in read_documents([corpus], 2000)}
    assert kinds == {"fib.py": ".py", "notes.txt": ".txt", "read.md": ".md"}
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("x = 1\n")
    assert [d.kind for d in read_documents([tmp_path], 2000)] == ["a", "b"]


def test_directories_pass_over_what_is_no_text(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "good.txt").write_text("yes")
    assert [d.text for d in read_documents([tmp_path], 10)] == ["yes"]


def test_a_large_corpus_is_read_in_pieces(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i:02}é" * 5000)
    documents = read_documents([tmp_path], 10_000)
    assert sum(len(d.text.encode()) for d in documents) <= 160_000
    assert len(documents) >= 15 and all("�" not in d.text for d in documents)
    assert documents == read_documents([tmp_path], 10_000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "no such file"),
        ("x.bin", b"a\0b", "binary or not UTF-8"),
        ("latin.txt", b"caf\xe9", "binary or not UTF-8"),
        ("cut.txt", "é".encode()[:1], "binary or not UTF-8"),
        ("empty.txt", b"", "there is no text in"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_documents([tmp_path / name], 1000)


def test_nothing_named_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--text FILES"):
        read_documents([], 1000)
    with pytest.raises(ConfigError, match="there is no text in"):
        read_documents([tmp_path], 1000)


def test_rows_are_a_bounded_choice_of_whole_rows(tiny_model: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    texts = [
        Document("one", "a", "abc def\n" * 50),
        Document("two", "b", "<|endoftext|>" * 3 + "ghi jkl\n" * 80),
    ]
    everything = [tokenizer.encode_ordinary(d.text) for d in texts]
    stream, owner = (
        everything[0] + everything[1],
        [0] * len(everything[0]) + [1] * len(everything[1]),
    )
    rows = make_rows(texts, tokenizer, 16, max_tokens=160)
    assert rows.read == len(stream) and len(rows.tokens_N) == 160 and rows.length == 16
    pieces = {tuple(stream[i : i + 16]): owner[i : i + 16] for i in range(0, len(stream) - 15, 16)}
    for at in range(0, 160, 16):
        assert (
            rows.document_N[at : at + 16].tolist()
            == pieces[tuple(rows.tokens_N[at : at + 16].tolist())]
        )
    assert 0 not in rows.tokens_N, "special-token text inside a document is plain text"


def test_context_stays_in_its_document(tiny_model: Path) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    rows = make_rows([Document("one", "a", "ab"), Document("two", "a", "cdé")], tokenizer, 100, 100)
    ids = rows.tokens_N.tolist()
    position = ids.index(tokenizer.encode("c")[0])
    left, token, right = rows.context(position, tokenizer)
    assert (left, token) == ("", "c") and right.startswith("d")
    left, token, right = rows.context(position - 1, tokenizer)
    assert (token, right) == ("b", "") and left == "a"


def test_an_empty_text_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="the text is empty"):
        make_rows([], Tokenizer.load(tiny_model), 16, 100)
    with pytest.raises(ConfigError, match="the text is empty"):
        make_rows([Document("one", "a", "")], Tokenizer.load(tiny_model), 16, 100)


def test_many_kinds_become_twelve(tiny_model: Path) -> None:
    texts = [Document(f"{i}", f"kind {i}", "ab\n" * (20 + 9 * i)) for i in range(15)]
    rows = make_rows(texts, Tokenizer.load(tiny_model), 8, 10_000)
    assert len(rows.kinds) == 12 and rows.kinds[-1] == "other" and rows.kinds[0] == "kind 14"
    assert rows.kind_N[rows.document_N == 0].unique().tolist() in ([11], [])


def test_a_pipe_is_no_text_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        ConfigError, match="pipe is neither a file nor a directory; name text files"
    ):
        read_documents([tmp_path / "pipe"], 2000)
