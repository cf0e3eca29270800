"""Long texts: of one line, in pieces, and in bounded memory; and what is said of text that is not
trained on."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from moebius.errors import ConfigError
from moebius.train import corpus as corpus_module
from moebius.train import export as export_module
from moebius.train.corpus import Corpus
from moebius.train.data import CHAT, Batches, PreparedData, bytes_per_token, pack, prepare
from moebius.train.recipe import Recipe
from moebius.train.tables import CorpusRecipe, TokenizerRecipe
from moebius.train.trainer import Trainer
from text.tiny_tokenizers import FAMILIES, byte_level

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = [
    "The quick brown fox jumps over the lazy dog; it's the dog's 42nd day.",
    "Grüße aus Köln,  naïve café: русский текст, 日本語のテキスト。한국어",
    "def f(x):\n    return x + 1  # 😀 <tool_call> {}\n\n",
    "<|im_start|>user\nhello, world<|im_end|>",
]
TEXT = "\n".join(LINES * 12)


def corpus(root: Path, share: float = 0.1, **texts: str | bytes) -> CorpusRecipe:
    """Each text as a file and kind of its own; a name such as a__b puts file b into the folder of
    kind a."""
    files: dict[str, tuple[str, ...]] = {}
    for name, text in texts.items():
        kind, _, inside = name.partition("__")
        path = root / kind / inside if inside else root / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        files[kind] = (str(root / kind if inside else path),)
    return CorpusRecipe(files, heldout_share=share)


def qwen() -> Tokenizer:
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    byte_level_after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level_after])
    return tokenizer


@pytest.mark.case("C11")
@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("word " * 20_000, " word"),
        (
            json.dumps(
                [{"key": i, "name": f"item {i}"} for i in range(3000)], separators=(",", ":")
            ),
            None,
        ),
        ("字" * 5000, "字"),
        ("first line\n" + "word " * 40_000, " word"),
        ("no line end at the end of the file " * 10 + "\nlast", None),
        ("a", None),
    ],
    ids=[
        "words",
        "minified JSON",
        "no white space",
        "a line first",
        "no newline at the end",
        "one character",
    ],
)
def test_of_a_text_of_one_line_the_end_is_held_out(
    tmp_path: Path, text: str, end: str | None
) -> None:
    found = list(Corpus(corpus(tmp_path, book=text)))
    assert "".join(d.text for d in found) == text
    held = "".join(d.text for d in found if d.split == "heldout")
    assert held and (end is None or held.startswith(end))
    if len(text) > 1:
        assert 0.1 <= len(held) / len(text) < (0.11 if len(text) > 1000 else 0.5)


@pytest.mark.case("C11")
def test_a_long_line_is_trained_on_beside_another_kind(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    files = corpus(tmp_path, text8="some words of a long line " * 2000, lines="a line\n" * 3000)
    sizes = prepare(
        dataclasses.replace(recipe, corpus=files, mixture={}, tokenizer=TokenizerRecipe(270)),
        tmp_path,
    )
    for kind, total in (("text8", 52_000), ("lines", 21_000)):
        trained, held = (
            sizes.facts["sizes"][split][kind]["bytes"] for split in ("train", "heldout")
        )
        assert trained + held == total and held == pytest.approx(0.1 * total, rel=0.01)


@pytest.mark.case("C12")
@pytest.mark.parametrize("kind", ["text", CHAT])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen"])
def test_the_tokens_are_the_whole_texts(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    """Every family of tokenizers, of which some add a space to whatever text they are given."""
    tokenizer = qwen() if family == "qwen" else FAMILIES[family]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(corpus_module, "PIECE", 60)
    files = corpus(tmp_path, **{kind: TEXT})
    given = TokenizerRecipe(path=str(tmp_path), end_of_text="</s>")
    made = prepare(
        dataclasses.replace(recipe, corpus=files, mixture={}, tokenizer=given), tmp_path / "data"
    )
    cut = TEXT.rfind("\n", 0, int(len(TEXT) * 0.9)) + 1
    for tokens, part in ((made.train[kind], TEXT[:cut]), (made.heldout[kind], TEXT[cut:])):
        assert tokens.tolist() == pack([part], tokenizer, 1, chat=kind == CHAT).tolist()
    size = made.facts["sizes"]["train"][kind]
    assert (size["documents"], size["bytes"]) == (1, len(TEXT[:cut].encode()))


@pytest.mark.case("C12")
def test_json_lines_and_carriage_returns_in_pieces(
    recipe: Recipe, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a short one", TEXT, "and\r\nthe last"]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "split": "train"}) for text in texts)
    )
    (tmp_path / "b.txt").write_bytes(("\r\n" * 70 + TEXT.replace("\n", "\r\n")).encode())
    files = CorpusRecipe(
        {"a": (str(tmp_path / "a.jsonl"),), "b": (str(tmp_path / "b.txt"),)}, heldout_share=0.1
    )
    monkeypatch.setattr(corpus_module, "PIECE", 61)
    found = list(Corpus(files))
    assert max(len(d.text) for d in found) <= 61
    whole = "\n" * 70 + TEXT
    assert "".join(d.text for d in found if d.kind == "b") == whole
    data.tokenizer.save(str(tmp_path / "tokenizer.json"))
    given = TokenizerRecipe(path=str(tmp_path))
    made = prepare(
        dataclasses.replace(recipe, corpus=files, mixture={}, tokenizer=given), tmp_path / "data"
    )
    assert made.train["a"].tolist() == pack(texts, data.tokenizer, 0).tolist()
    assert made.facts["sizes"]["train"]["a"]["documents"] == 3


@pytest.mark.case("C12")
def test_compressors_see_the_held_out_text(
    recipe: Recipe, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokens at a time, which may cut characters; in the end the same bytes."""
    monkeypatch.setattr(export_module, "_TOKENS", 1001)
    figures = export_module.measure(Trainer(recipe, data).decoder, recipe, data)
    texts = {
        kind: data.tokenizer.decode(tokens.tolist()).encode()
        for kind, tokens in data.heldout.items()
    }
    texts["all"] = b"".join(texts.values())
    for kind, text in texts.items():
        assert figures[kind]["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
        assert figures[kind]["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(
            text
        )


@pytest.mark.case("C12")
def test_memory_does_not_grow_with_a_file(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    """5 MB as one text took 0.9 GB beyond what the imports take."""
    data.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "book.txt").write_text(
        "".join(f"line {i} of a long, long book\n" for i in range(150_000))
    )
    code = f"""
from pathlib import Path
from moebius.train.data import prepare
from moebius.train.recipe import Recipe
from moebius.train.tables import CorpusRecipe, TokenizerRecipe, TrainingRecipe
folder = Path({str(tmp_path)!r})
training = TrainingRecipe(steps=200, rows_per_step=1, row_length=8, learning_rate=0.1)
corpus, tokenizer = CorpusRecipe(dict(book=(str(folder / "book.txt"),))), TokenizerRecipe(path=str(folder))
recipe = Recipe("r", training, corpus, {recipe.model!r}, tokenizer=tokenizer)
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
prepare(recipe, folder / "data")
print(peak() - before)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True
    )
    assert float(told.stdout) < 400, "megabytes"


@pytest.mark.case("C11")
def test_what_is_not_trained_on_is_said(recipe: Recipe, data: PreparedData, tmp_path: Path) -> None:
    held = json.dumps({"text": "held out on purpose", "split": "heldout"})
    files = corpus(
        tmp_path,
        long="a long line " * 600,
        short="a b c d " * 8,
        blank=" \n\n",
        folder__a="one\n" * 200,
        folder__image=b"\x89PNG\x00\xff",
        zero="z" * 50,
    )
    (tmp_path / "held.jsonl").write_text(held)
    files = dataclasses.replace(
        files, files={**files.files, "held": (str(tmp_path / "held.jsonl"),)}
    )
    wanted = dataclasses.replace(
        recipe, corpus=files, mixture={"zero": 0}, tokenizer=TokenizerRecipe(263)
    )
    made = prepare(wanted, tmp_path / "data")
    told = made.untrained(wanted)
    assert told[0] == f"passed over, no UTF-8 text: {tmp_path / 'folder' / 'image'}"
    assert told[1] == f"passed over, nothing but white space: {tmp_path / 'blank.txt'}"
    kinds = {line.split(": ")[0].rpartition(".")[2]: line.split(": ", 1)[1] for line in told[2:]}
    assert kinds.keys() == {"short", "blank", "folder", "held"}, (
        "of `zero` the recipe itself says so"
    )
    assert kinds["short"].endswith("tokens are less than two rows of 48; none is trained on")
    assert kinds["blank"] == "there is no text"
    assert kinds["folder"] == "none of its documents is held out, so that it is not measured"
    assert kinds["held"] == "all of it is held out; none is trained on"
    batches = Batches(made, {"zero": 0}, 3, 48, 1)
    lengths = {kind: len(tokens) for kind, tokens in made.train.items()}
    assert (
        lengths["short"] < 96
        and batches.steps_per_epoch
        == ((lengths["long"] - 1) // 48 - 1 + (lengths["folder"] - 1) // 48 - 1) // 3
    )


@pytest.mark.case("C11")
def test_a_document_that_is_most_of_its_kind_is_said_to_be_held_out(
    recipe: Recipe, tmp_path: Path
) -> None:
    lines = [
        {"text": "short " * 300, "split": "train"},
        {"text": "long " * 3000, "split": "heldout"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = CorpusRecipe({"a": (str(tmp_path / "a.jsonl"),)}, heldout_share=0.1)
    wanted = dataclasses.replace(recipe, corpus=files, mixture={}, tokenizer=TokenizerRecipe(262))
    told = prepare(wanted, tmp_path / "data").untrained(wanted)
    assert told == ["corpus.files.a: 89% of it is held out, not 10.0%: whole documents are"]


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}')
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: 'text' holds half a surrogate pair"):
        list(Corpus(CorpusRecipe({"a": (str(tmp_path / "a.jsonl"),)})))


def test_a_given_tokenizers_truncation_cuts_no_document(
    recipe: Recipe, data: PreparedData, tmp_path: Path
) -> None:
    """Some checkpoints' tokenizer.json truncates and pads, which is meant for the requests of a
    former use."""
    tokenizer = Tokenizer.from_str(data.tokenizer.to_str())
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    files = corpus(tmp_path, book=TEXT)
    given = TokenizerRecipe(path=str(tmp_path))
    made = prepare(
        dataclasses.replace(recipe, corpus=files, mixture={}, tokenizer=given), tmp_path / "data"
    )
    sizes = bytes_per_token(data.tokenizer)
    assert sum(int(sizes[s["book"].tolist()].sum()) for s in (made.train, made.heldout)) == len(
        TEXT.encode()
    )
