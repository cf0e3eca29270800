"""The bound of a text's tokens, against what the tokenizers library makes of it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moebius.errors import ContextLengthError
from moebius.text import ChatTemplate, Tokenizer
from text.tiny_tokenizers import FAMILIES, SPECIALS, byte_level, llama, mistral

SETTINGS = settings(derandomize=True, deadline=None, max_examples=120, database=None)


def changed(backend: Backend, **parts) -> Backend:
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def stripping(backend: Backend) -> Backend:
    backend.add_tokens([AddedToken("<w>", lstrip=True, rstrip=True, normalized=True)])
    backend.add_special_tokens([AddedToken("<|pad|>", lstrip=True, rstrip=True)])
    return backend


def characters(fuse: bool, unknown: str | None = "<unk>") -> Backend:
    """A BPE without bytes to fall back to."""
    vocab = {token: i for i, token in enumerate(["<unk>", "a", "b", " ", "é", "ab", "aba"])}
    return Backend(models.BPE(vocab, [("a", "b"), ("ab", "a")], unk_token=unknown, fuse_unk=fuse))


def words(model: type) -> Backend:
    vocab = {"<unk>": 0, "a": 1, "##b": 2, "ab": 3}
    return changed(
        Backend(model(vocab, unk_token="<unk>")), pre_tokenizer=pre_tokenizers.Whitespace()
    )


def sequence(*parts):
    return normalizers.Sequence(list(parts))


NFKC, LOWER = normalizers.NFKC(), normalizers.Lowercase()
DROPS = pre_tokenizers.Sequence(
    [pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel(False)]
)
INFORMED = {
    **{name: FAMILIES[name] for name in ("byte_level", "llama", "mistral")},
    "stripping": lambda: stripping(byte_level()),
    "stripping_llama": lambda: stripping(llama()),
    "nfd": lambda: changed(byte_level(), normalizer=normalizers.NFD()),
    "nfkc": lambda: changed(byte_level(), normalizer=NFKC),
    "letters_replaced": lambda: changed(
        byte_level(), normalizer=normalizers.Replace("hello", "     ")
    ),
    "lower": lambda: changed(byte_level(), normalizer=LOWER),
    "nfkc_first": lambda: changed(
        mistral(), normalizer=sequence(NFKC, normalizers.Replace(" ", "▁"))
    ),
    "unknown_each": lambda: characters(fuse=False),
}
SILENT = {
    "metaspace": FAMILIES["metaspace"],  # unknown pieces of a unigram model become one
    "unknown_fused": lambda: characters(fuse=True),
    "unknown_dropped": lambda: characters(fuse=False, unknown=None),
    "word_piece": lambda: words(models.WordPiece),
    "word_level": lambda: words(models.WordLevel),
    "strip": lambda: changed(mistral(), normalizer=normalizers.Strip()),
    "accents": lambda: changed(
        byte_level(), normalizer=sequence(normalizers.NFD(), normalizers.StripAccents())
    ),
    "bert": lambda: changed(byte_level(), normalizer=normalizers.BertNormalizer()),
    "shrinks": lambda: changed(byte_level(), normalizer=normalizers.Replace("aaaa", "a")),
    "regex": lambda: changed(byte_level(), normalizer=normalizers.Replace(Regex("a+"), "aa")),
    "late": lambda: changed(mistral(), normalizer=sequence(normalizers.Replace(" ", "▁"), NFKC)),
    "nfkc_stripping": lambda: stripping(changed(byte_level(), normalizer=NFKC)),
    "drops": lambda: changed(byte_level(), pre_tokenizer=DROPS),
}

# What shrinks: characters that fold, that compose, that a token swallows, and tokens longer than
# the vocabulary's.
PIECES = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            *SPECIALS,
            "<w>",
            "<|pad|>",
            "<tool_call>",
            "quick brown",
            "hello",
            "\u212a",
            "\U0001d400",
            "ﷺ",
        ]
    ),
    st.sampled_from(
        ["A\u030a\u0301", "\u1112\u1161\u11ab", "\u2126", "\u1fef", "\uff21", "☃", "a\u0323\u0302"]
    ),
    st.sampled_from([" ", "\n", "\u2000", "\xa0", "a", "ab", "▁"]).flatmap(
        lambda char: st.integers(1, 200).map(lambda n: char * n)
    ),
)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: Tokenizer(make()) for name, make in {**INFORMED, **SILENT}.items()}


@pytest.mark.case("B1")
@given(st.lists(PIECES, max_size=8).map("".join))
@SETTINGS
def test_no_text_becomes_fewer_tokens(tokenizers, text):
    for name, tokenizer in tokenizers.items():
        assert tokenizer.fewest_tokens(text) <= len(
            tokenizer.encode(text, add_special_tokens=False)
        ), name


@pytest.mark.case("B1")
def test_runs_of_spaces_in_the_vocabulary_do_not_spoil_the_bound(tokenizers):
    """Large vocabularies have tokens of 128 spaces or dashes: prose does not consist of these."""
    backend = byte_level()
    backend.add_tokens([AddedToken("-" * 200, normalized=False)])
    text = "quick brown fox; " * 1000
    assert Tokenizer(backend).fewest_tokens(text) > len(text) / 40
    assert (
        Tokenizer(backend).fewest_tokens("-" * 4000)
        == len(Tokenizer(backend).encode("-" * 4000))
        == 20
    )


@pytest.mark.case("B1")
def test_the_bound_says_something_where_it_can(tokenizers):
    text = "quick brown fox; " * 1000
    for name in INFORMED:
        made = len(tokenizers[name].encode(text, add_special_tokens=False))
        assert made / 40 < tokenizers[name].fewest_tokens(text) <= made, name
    assert [name for name in SILENT if tokenizers[name].fewest_tokens(text)] == []


CHANGING = [
    c
    for c in map(chr, range(0x110000))
    if unicodedata.decomposition(c) or 0xAC00 <= ord(c) < 0xD7A4
]


def left(char: str) -> float:
    """What the bound counts on of a character."""
    return 1.0 if char.isascii() else len(char.encode()) / 4


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_normal_forms_leave_what_the_bound_counts_on(form):
    """Whatever stands beside it: each part of a character gets a share, and no composed one has
    more than fits."""
    apart = form.replace("C", "D")
    share: dict[str, float] = {}
    for char in CHANGING:
        first, *others = unicodedata.normalize(apart, char)
        share[first] = max(share.get(first, 0), left(first), left(char) - sum(map(left, others)))
    for char in {*CHANGING, *share}:
        if unicodedata.normalize(form, char) == char:
            parts = unicodedata.normalize(apart, char)
            assert sum(max(share.get(part, 0), left(part)) for part in parts) <= len(
                char.encode()
            ), ascii(char)


def test_lower_case_leaves_what_the_bound_counts_on():
    for char in map(chr, [*range(0xD800), *range(0xE000, 0x20000)]):
        assert left(char) <= len(char.lower().encode()), ascii(char)


@pytest.mark.case("B1")
@pytest.mark.parametrize("chat", [True, False])
def test_a_text_that_is_too_long_is_refused_before_it_is_tokenised(monkeypatch, chat):
    ours = Tokenizer(byte_level(), templates={"default": ChatTemplate("{{ messages[0].content }}")})
    text = "hello " * 20_000

    def encode(length: int, at_most: int) -> list[int]:
        if chat:
            return ours.encode_chat([{"role": "user", "content": text[:length]}], at_most=at_most)
        return ours.encode(text[:length], at_most=at_most)

    count = len(encode(600, 1000))
    assert len(encode(600, count)) == count
    with pytest.raises(
        ContextLengthError, match=rf"is {count - 1} tokens\. .* {count} tokens"
    ) as caught:
        encode(600, count - 1)
    assert caught.value.param == ("messages" if chat else "prompt")
    monkeypatch.setattr(
        "moebius.text.tokenizer._encoded", lambda *_: pytest.fail("it was tokenised")
    )
    with pytest.raises(ContextLengthError, match=r"is 100 tokens\. .* at least \d+ tokens"):
        encode(120_000, 100)
