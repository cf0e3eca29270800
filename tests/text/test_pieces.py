"""Long texts in pieces: nothing lost, words whole, and what our own pre-tokenizer makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from moebius.text import pieces as pieces_module
from moebius.text.pieces import CONTEXT, encode_in_pieces, pieces
from text.tiny_tokenizers import CORPUS, FAMILIES

ALPHABET = st.sampled_from("ab1é字 \n\t.,'。\u0301")


@pytest.mark.case("C12")
@settings(max_examples=200, deadline=None)
@given(blocks=st.lists(st.text(ALPHABET, max_size=40), max_size=6), length=st.integers(2, 30))
def test_nothing_is_lost_and_no_piece_is_long(blocks: list[str], length: int) -> None:
    found = list(pieces(blocks, length))
    assert "".join(found) == "".join(blocks)
    assert all(0 < len(piece) <= length for piece in found)


@pytest.mark.case("C12")
def test_pieces_end_with_a_word() -> None:
    assert list(pieces(["one two three"], 9)) == ["one two", " three"]
    assert list(pieces(["一二三，四五六"], 5)) == ["一二三", "，四五六"]
    assert list(pieces(["0123456789"], 4)) == ["0123", "4567", "89"]


@pytest.mark.case("C12")
@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(
        st.text(ALPHABET, max_size=4).map(lambda word: f"{word}xyz "), min_size=20, max_size=40
    )
)
def test_words_are_those_of_the_whole_text(words: list[str]) -> None:
    """Where some word ends in each piece, GPT-2's expression finds the same words: a vocabulary is
    made of them."""
    text, split = "".join(words), pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    cut = [word for piece in pieces([text], 60) for word, _ in split(piece)]
    assert cut == [word for word, _ in split(text)]


@pytest.mark.case("C12")
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_in_pieces_are_the_whole_texts(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """No call gets more than a piece and what it is tokenised behind."""
    backend, text = FAMILIES[family](), "\n".join(CORPUS * 8)
    lengths = []

    def encode(part: str) -> list[int]:
        lengths.append(len(part))
        return backend.encode(part, add_special_tokens=False).ids

    whole = encode(text)
    lengths.clear()
    monkeypatch.setattr(pieces_module, "PIECE", 100)
    assert [token for part in encode_in_pieces(text, encode) for token in part] == whole
    assert max(lengths) <= 100 + CONTEXT
