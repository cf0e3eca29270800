"""Text is cut into words as the models' own tokenizers cut it."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models

from moebius.text.gguf_pre import SPLITTINGS
from text.gguf_keys import nasty_texts
from text.published_pre_tokenizers import IGNORE_MERGES, NFC, PUBLISHED


def words(name: str, text: str) -> list[str]:
    """The words by their places in the text, whatever they are spelled in."""
    cut = SPLITTINGS[name].pre_tokenizer().pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in cut]


def published(name: str) -> Tokenizer:
    spec = json.loads(Tokenizer(models.BPE()).to_str())
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PUBLISHED[name]}
    return Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize("name", PUBLISHED)
def test_words_are_those_of_the_published_file(name):
    ours = SPLITTINGS[name].pre_tokenizer()
    theirs = published(name).pre_tokenizer
    for text in nasty_texts(400):
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text), text


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_else_the_published_file_says(name):
    assert SPLITTINGS[name].nfc == (name in NFC)
    assert SPLITTINGS[name].ignore_merges == (name in IGNORE_MERGES)


TEXT = "I'll SAY'S  2468 words\n\nfoo.Bar"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # GPT-2: contractions in small letters only; spaces but the last; digits as words.
        (
            "gpt-2 phi-2 mellum exaone4 a.x-4.0 trillion jais granite-docling olmo mpt",
            "I|'ll| SAY|'|S| | 2468| words|\n|\n|foo|.|Bar",
        ),
        (
            "smollm starcoder refact codeshell minerva-7b mellum2 exaone command-r",
            "I|'ll| SAY|'|S|  |2|4|6|8| words|\n|\n|foo|.|Bar",
        ),
        # Falcon: signs apart from all else, numbers in threes from their beginning.
        (
            "falcon default",
            "I|'|ll| SAY|'|S| | |246|8| words|\n|\n|foo|.|Bar",
        ),
        # GPT-4: contractions in any case, a sign before a word is its own, digits in threes.
        (
            "llama-bpe llama3 llama-v3 lfm2 falcon3 falcon-h1 pixtral midm-2.0 chatglm-bpe "
            "glm4 glm5 dbrx smaug-bpe",
            "I|'ll| SAY|'S| | |246|8| words|\n\n|foo|.Bar",
        ),
        (
            "qwen2 deepseek-r1-qwen megrez f2llmv2 kormo solar-open grok-2 stablelm2 "
            "hunyuan qwen35 laguna bailingmoe bailingmoe2 llada-moe seed-coder",
            "I|'ll| SAY|'S| | |2|4|6|8| words|\n\n|foo|.Bar",
        ),
        # GPT-4o: contractions belong to their words.
        (
            "gpt-4o llama4 kanana2 talkie minimax-m2 kimi-k2",
            "I'll| SAY'S| | |246|8| words|\n\n|foo|.Bar",
        ),
        # Numbers in threes from their end.
        (
            "tiny_aya cohere2moe",
            "I'll| SAY'S|  |2|468| words|\n\n|foo|.Bar",
        ),
        (
            "afmoe",
            "I|'ll| SAY|'S|  |2|468| words|\n\n|foo|.Bar",
        ),
        (
            "tekken",
            "I|'ll| SAY|'S| | |2|4|6|8| words|\n\n|foo|.Bar",
        ),
        (
            "deepseek-llm deepseek-coder",
            "I|'|ll| SAY|'|S|  |2|4|6|8| words|\n|\n|foo|.|Bar",
        ),
        (
            "deepseek-v3 hunyuan-dense hy_v4 joyai-llm",
            "I|'ll| SAY|'S|  |246|8| words|\n\n|foo|.Bar",
        ),
        (
            "minicpm5",
            "I|'ll| SAY|'S|  |246|8| words|\n\n|foo|.Bar",
        ),
        (
            "exaone-moe",
            "I|'ll| SAY|'S| | |2|4|6|8| words|\n\n|foo|.Bar",
        ),
        # BLOOM: runs of what is neither white space nor punctuation.
        (
            "bloom poro-chat gpt3-finnish",
            "I'll| SAY'S| | 2468| words|\n\n|foo|.|Bar",
        ),
        (
            "viking",
            "I'll| SAY'S| | |2|4|6|8| words|\n\n|foo|.|Bar",
        ),
    ],
)
def test_words_worked_out_by_hand(names, expected):
    for name in names.split():
        assert "|".join(words(name, TEXT)) == expected, name


def test_every_name_is_worked_out():
    marks = test_words_worked_out_by_hand.pytestmark
    named = {name for names, _ in marks[0].args[1] for name in names.split()}
    assert named == set(SPLITTINGS)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # Letters with marks: apart from their letters, with them, or with all that follow.
        ("qwen2", "नमस्ते", ["नमस", "्त", "े"]),
        ("qwen35", "नमस्ते", ["नमस्ते"]),
        ("gpt-4o", "camelCASEWord", ["camel", "CASEWord"]),
        ("tekken", "XMLHttp a/\n", ["XMLHttp", " a", "/\n"]),
        ("kimi-k2", "漢字かなabc", ["漢字", "かなabc"]),
        ("deepseek-v3", "漢字かなabc", ["漢字かな", "abc"]),
        ("gpt-4o", "漢字かなabc", ["漢字かなabc"]),
        ("deepseek-llm", "漢字かなabc", ["漢字かな", "abc"]),
        # A run of line breaks goes to what follows it, but not to its word.
        ("laguna", "x.\n\ny", ["x", ".", "\n\n", "y"]),
        ("qwen2", "x.\n\ny", ["x", ".\n\n", "y"]),
        ("bailingmoe", "x \n\n y", ["x", " \n\n", " y"]),
        ("seed-coder", "x.\n\ny", ["x", ".", "\n\n", "y"]),
        ("exaone-moe", "two words, 1", ["two words", ",", " ", "1"]),
        ("afmoe", "1234567 漢字abc", ["1", "234", "567", " ", "漢字", "abc"]),
        ("tiny_aya", "1234567a", ["123", "456", "7", "a"]),
        ("tiny_aya", "1234567 a", ["1", "234", "567", " a"]),
        # Falcon looks for digits in the stand-ins of bytes: ½ is C2 BD, and BD's is a ½.
        ("falcon", "a½12345", ["a", "½", "½", "123", "45"]),
        ("default", "a½12345", ["a", "½", "123", "45"]),
        ("default", "x (y)`", ["x", " ", "(", "y", ")", "`"]),
    ],
)
def test_what_sets_a_name_apart(name, text, expected):
    assert words(name, text) == expected
