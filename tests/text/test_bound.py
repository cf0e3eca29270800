"""A text's length tells how few tokens it can have: never more than it has."""

from __future__ import annotations

import random
import unicodedata

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moebius.errors import ContextExceededError
from moebius.text import Tokenizer
from moebius.text.bound import TokenBound, encode_text
from text.tiny_tokenizers import SPECIALS, byte_level, llama

BACKENDS = {"byte_level": byte_level, "llama": llama}
PIECES = ["hello world ", " " * 40, "Grüße ", "日本語", "😀", "\u212a\u212a", "e\u0301", "각", *SPECIALS, "\n\n", "\t"]


@pytest.mark.case("B1")
@pytest.mark.parametrize("family", BACKENDS)
def test_no_text_has_fewer_tokens_than_its_bound(family: str) -> None:
    tokenizer = Tokenizer(BACKENDS[family]())
    rng = random.Random(5)
    found = 0
    for _ in range(400):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 60)))
        fewest = tokenizer.fewest_tokens(text)
        assert 0 < fewest <= len(tokenizer.encode(text, False)), text
        found = max(found, fewest)
    assert found > 4


def test_texts_of_the_longest_tokens_reach_the_bound() -> None:
    backend = byte_level()
    backend.normalizer = None
    backend.add_tokens([AddedToken("x" * 100, normalized=False)])
    tokenizer = Tokenizer(backend)
    text = "x" * 5000
    assert tokenizer.fewest_tokens(text) == len(tokenizer.encode(text)) == 50
    assert tokenizer.fewest_tokens(text + "x") == 51


def test_nfc_shrinks_no_text_to_less_than_a_quarter() -> None:
    """The longest spelling of a character: for each part of its decomposition the longest that stands for it."""
    longest: dict[str, int] = {}
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]  # none beyond decomposes
    for char in characters:
        parts = unicodedata.normalize("NFD", char)
        if len(parts) == 1:
            longest[parts] = max(longest.get(parts, 0), len(char.encode()), len(parts.encode()))
    for char in characters:
        composed = unicodedata.normalize("NFC", char)
        spelled = sum(longest.get(part, len(part.encode())) for part in unicodedata.normalize("NFD", char))
        assert len(char.encode()) <= spelled <= 4 * len(composed.encode()), char


@pytest.mark.parametrize("swallows", ["lstrip", "rstrip"])
def test_spaces_that_a_token_swallows_do_not_count(swallows: str) -> None:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|user|>", **{swallows: True})])
    tokenizer = Tokenizer(backend)
    for space in (" ", "\n", "\u3000", "\u2003", "\x85"):
        text = space * 5000 + "<|user|>" + space * 5000
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, False))


def _whitespace_split() -> Backend:
    backend = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def _without_fallback() -> Backend:
    backend = Backend(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoders.Metaspace()
    return backend


def _with(normalizer: object) -> Backend:
    backend = byte_level()
    backend.normalizer = normalizer
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        _whitespace_split(),
        _without_fallback(),
        _with(normalizers.NFKC()),
        _with(normalizers.Replace("aa", "a")),
        _with(normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])),
    ],
    ids=["whitespace", "no fallback", "NFKC", "replaces", "strips"],
)
def test_nothing_is_said_of_a_tokenizer_that_may_drop_or_fuse_text(backend: Backend) -> None:
    assert TokenBound(backend).fewest_tokens("zz " * 10_000) == 0


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(byte_level())
    monkeypatch.setattr("moebius.text.tokenizer.encode_text", lambda *_: pytest.fail("it was tokenised"))
    with pytest.raises(ContextExceededError, match=r"your prompt resulted in at least \d+ tokens"):
        tokenizer.encode("hello " * 100_000, most=512)


def test_long_texts_become_the_same_ids() -> None:
    backend = byte_level()
    for text in ("hello world " * 500, "日本語😀e\u0301" * 400, "".join(SPECIALS) * 100):
        assert encode_text(backend, text) == backend.encode(text, add_special_tokens=False).ids
