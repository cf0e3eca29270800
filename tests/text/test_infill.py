"""Filling in the middle: the ids of a prompt with a gap, worked out by hand for each family."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from moebius.errors import ContextLengthError, RequestError
from moebius.text import EncodedPrompt, Tokenizer, infill_prompt
from text.tiny_tokenizers import byte_level, llama

BEFORE = "def f(x):\n    "
BEHIND = "\n    return x\n"
ENDS = ["<|endoftext|>", "<|file_sep|>"]


def with_tokens(tokens: list[str], *, plain: bool = False) -> Tokenizer:
    backend = byte_level()
    added = [AddedToken(token, special=not plain, normalized=False) for token in tokens]
    (backend.add_tokens if plain else backend.add_special_tokens)(added)
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, add_bos=True)


def infill(tokenizer: Tokenizer, before: str = BEFORE, behind: str = BEHIND) -> EncodedPrompt:
    return infill_prompt(tokenizer, before, behind, at_most=1000)


# By each family's own documentation, P for what stands before the gap and S for what is behind it.
FORMS = {
    "qwen": ["<|fim_prefix|>", "P", "<|fim_suffix|>", "S", "<|fim_middle|>"],
    "starcoder": ["<fim_prefix>", "P", "<fim_suffix>", "S", "<fim_middle>"],
    "santacoder": ["<fim-prefix>", "P", "<fim-suffix>", "S", "<fim-middle>"],
    "deepseek": ["<｜fim▁begin｜>", "P", "<｜fim▁hole｜>", "S", "<｜fim▁end｜>"],
    "codellama": ["▁<PRE>", "P", "▁<SUF>", "S", "▁<MID>"],
    "codestral": ["[SUFFIX]", "S", "[PREFIX]", "P"],
    "glm": ["<|code_prefix|>", "P", "<|code_suffix|>", "S", "<|code_middle|>"],
}


@pytest.mark.parametrize("family", sorted(FORMS))
def test_each_family_has_its_own_order(family: str) -> None:
    form = FORMS[family]
    tokens = [part for part in form if len(part) > 1]
    tokenizer = with_tokens([*tokens, *ENDS])
    texts = {"P": tokenizer.encode(BEFORE, False), "S": tokenizer.encode(BEHIND, False)}
    wanted = [tokenizer.bos_id]
    for part in form:
        wanted += texts.get(part) or [tokenizer.token_id(part)]
    prompt = infill(tokenizer)
    assert list(prompt.ids) == wanted
    assert prompt.end_ids == {tokenizer.token_id(token) for token in [*tokens, *ENDS]}
    without = infill_prompt(tokenizer, BEFORE, BEHIND, add_special_tokens=False, at_most=1000)
    assert list(without.ids) == wanted[1:]


def test_markers_in_a_text_are_no_tokens() -> None:
    tokenizer = with_tokens(FORMS["qwen"][::2])
    marker = tokenizer.token_id("<|fim_suffix|>")
    prompt = infill(tokenizer, "a<|fim_suffix|>b", "<|fim_suffix|></s>")
    assert list(prompt.ids).count(marker) == 1
    text = tokenizer.decode(prompt.ids, skip_special_tokens=False)
    assert text.count("<|fim_suffix|>") == 3
    assert tokenizer.eos_id not in prompt.ids


def test_a_sentencepiece_suffix_begins_without_a_space() -> None:
    """As Meta's and Mistral's own code encodes it; the prefix begins a text."""
    backend = llama()
    marks = ["▁<PRE>", "▁<SUF>", "▁<MID>"]
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    ids = list(infill(tokenizer, "hello", "world").ids)
    at = ids.index(tokenizer.token_id("▁<SUF>"))
    assert [tokenizer.spelling(i) for i in ids[:2]] == ["<s>", "▁<PRE>"]
    assert "".join(tokenizer.spelling(i) or "" for i in ids[2:at]) == "▁hello"
    assert "".join(tokenizer.spelling(i) or "" for i in ids[at + 1 : -1]) == "world"


def test_what_a_vocabulary_lacks_is_named() -> None:
    with pytest.raises(RequestError, match=r"no <\|fim_suffix\|>, <\|fim_middle\|>$") as caught:
        infill(with_tokens(["<|fim_prefix|>"]))
    assert caught.value.param == "suffix"
    with pytest.raises(RequestError, match=r"<\|fim_prefix\|>, .*\(nor another family's"):
        infill(with_tokens([]))


@pytest.mark.parametrize("times", [60, 100_000])
def test_a_prompt_that_does_not_fit_is_refused(times: int) -> None:
    tokenizer = with_tokens(FORMS["qwen"][::2])
    for texts in (("x y" * times, "a"), ("a", "x y" * times)):
        with pytest.raises(ContextLengthError):
            infill_prompt(tokenizer, *texts, at_most=50)
