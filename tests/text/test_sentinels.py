"""Sentinels are what a model of gaps in a text answers with: decoding shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from moebius.text import IncrementalDecoder
from moebius.text import Tokenizer as Ours
from tiny_t5 import write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Ours:
    write_tokenizer(tmp_path)
    return Ours.load(tmp_path)


def test_a_prompt_ends_and_its_sentinels_are_tokens(tokenizer: Ours) -> None:
    ids = tokenizer.encode("The <extra_id_0> walks in <extra_id_1> park")
    assert [tokenizer.spelling(i) for i in ids] == [
        *("▁The", "▁", "<extra_id_0>", "▁walks", "▁in", "▁", "<extra_id_1>", "▁park", "</s>"),
    ]


def test_answers_show_sentinels_and_no_other_special_tokens(tokenizer: Ours) -> None:
    sentinels = [tokenizer.encode(f"<extra_id_{i}>", False)[-1] for i in (0, 1)]
    a, man = tokenizer.encode("a man", False)
    ids = [0, sentinels[0], a, man, sentinels[1], man, 1]
    assert tokenizer.decode(ids) == "<extra_id_0> a man<extra_id_1> man"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<pad><extra_id_0>")
    decoder = IncrementalDecoder(tokenizer, (), True)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_other_tokenizers_mean_other_things_by_such_names() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.add_special_tokens([AddedToken("<extra_id_1>", special=True)])
    assert Ours(backend).decode([0, 2, 1]).replace(" ", "") == "ab"
