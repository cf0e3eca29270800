"""Keys that lie are refused in one line that names them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken

from moebius.errors import TokenizerError
from moebius.text import tokenizer_from_gguf
from moebius.text.gguf_charsmap import charsmap_normalizer
from text.gguf_keys import CONTROL, NORMAL, UNKNOWN, charsmap, keys_of
from text.tiny_tokenizers import CHATML, byte_level


def keys(**changes: Any) -> dict[str, Any]:
    """Sound keys of a byte-level BPE, but for the changes; None takes a key away."""
    backend = byte_level()
    backend.add_tokens([AddedToken("<end>", special=True)])
    found = keys_of(backend, **{"pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 1, **changes})
    return {**found, "tokenizer.chat_template": CHATML}


def spm(**changes: Any) -> dict[str, Any]:
    found = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"],
        "token_type": [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL],
        "scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0],
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def test_the_keys_are_sound_without_a_change():
    assert tokenizer_from_gguf(keys()).eos_id == 1
    assert tokenizer_from_gguf(spm()).encode("a") == [1, 5]


TOKENS = keys()["tokenizer.ggml.tokens"]
KINDS = keys()["tokenizer.ggml.token_type"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "the file has no tokenizer.ggml.model"),
        ({"model": 7}, "tokenizer.ggml.model is 7; it must be a string"),
        ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'; what can be made .* --tokenizer DIR"),
        ({"pre": "brand-new"}, "tokenizer.ggml.pre is 'brand-new', .* --tokenizer DIR.*json"),
        ({"pre": ["gpt-2"]}, r"tokenizer.ggml.pre is \['gpt-2'\]; it must be a string"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokens": []}, "tokenizer.ggml.tokens is missing or empty"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens must be an array of strings"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be an array of strings"),
        ({"tokens": [*TOKENS[:-1], TOKENS[9]]}, f"holds .* twice, as 9 and {len(TOKENS) - 1}"),
        ({"tokens": [*TOKENS, "x" * 2000]}, "tokens holds one of 2000 characters; at most 1024"),
        ({"token_type": KINDS[:-1]}, rf"token_type has {len(KINDS) - 1} entries for the"),
        ({"token_type": [*KINDS, 1]}, rf"token_type has {len(KINDS) + 1} entries for the"),
        ({"token_type": [1.0] * len(KINDS)}, "token_type must be an array of numbers"),
        ({"token_type": [True] * len(KINDS)}, "token_type must be an array of numbers"),
        ({"token_type": "x" * len(KINDS)}, "token_type must be an array of numbers"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b", "ab"]}, r"tokenizer.ggml.merges\[\d\] "),
        ({"merges": ["h e", "he"]}, r"tokenizer.ggml.merges\[1\] is 'he'; it must be two tokens"),
        ({"merges": ["h zzz"]}, r"merges\[0\] joins 'h' and 'zzz', but 'zzz' is no token"),
        ({"merges": ["Z Q"]}, r"merges\[0\] joins 'Z' and 'Q', but 'ZQ' is no token"),
        ({"merges": [["h", "e"]]}, "tokenizer.ggml.merges must be an array of strings"),
        (
            {"eos_token_id": len(TOKENS)},
            f"eos_token_id is {len(TOKENS)}; .* 0 to {len(TOKENS) - 1}",
        ),
        ({"eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1"),
        ({"eot_token_id": 2**31}, "tokenizer.ggml.eot_token_id is 2147483648"),
        ({"bos_token_id": "0"}, "tokenizer.ggml.bos_token_id is '0'"),
        ({"bos_token_id": True}, "tokenizer.ggml.bos_token_id is True"),
        ({"padding_token_id": [1]}, r"tokenizer.ggml.padding_token_id is \[1\]"),
        ({"add_bos_token": 1}, "add_bos_token is 1; it must be true or false"),
        (
            {"bos_token_id": None, "add_bos_token": True},
            "add_bos_token is true, but .*bos_token_id",
        ),
    ],
)
def test_byte_level(changes, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(keys(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores and tokenizer.ggml.merges are both missing"),
        ({"scores": [0.0] * 5}, "scores has 5 entries for the 6 of tokenizer.ggml.tokens"),
        ({"scores": [0.0, 0, 0, 0, 0, float("nan")]}, r"scores\[5\] is no number"),
        ({"scores": ["0"] * 6}, "tokenizer.ggml.scores must be an array of numbers"),
        ({"add_space_prefix": "no"}, "add_space_prefix is 'no'; it must be true or false"),
        ({"unknown_token_id": 6}, "unknown_token_id is 6; it must be a token's id, 0 to 5"),
        ({"model": "t5", "scores": None}, "tokenizer.ggml.scores is missing"),
        ({"model": "t5", "precompiled_charsmap": [300]}, "charsmap must be an array of bytes"),
        ({"model": "t5", "precompiled_charsmap": "x"}, "charsmap must be an array of bytes"),
        ({"model": "t5", "precompiled_charsmap": [1, 2, 3]}, "charsmap has 3 bytes"),
        ({"model": "t5", "precompiled_charsmap": [4, 0, 0, 1] * 9}, "charsmap has 36 bytes"),
        ({"model": "gemma4"}, "tokenizer.ggml.merges is missing"),
    ],
)
def test_sentencepiece(changes, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_gguf(spm(**changes))


def test_templates():
    for key in ("tokenizer.chat_template", "tokenizer.chat_template.rag"):
        with pytest.raises(TokenizerError, match=f"{key} is 3; it must be a string"):
            tokenizer_from_gguf({**keys(), key: 3})


def test_messages_stay_short():
    long = "x" * 10_000
    for changes in ({"pre": long}, {"model": long}, {"merges": [long]}, {"bos_token_id": long}):
        with pytest.raises(TokenizerError) as caught:
            tokenizer_from_gguf(keys(**changes))
        assert len(str(caught.value)) < 300


def test_a_file_without_kinds():
    """Kinds came later than the format: the tokens that keys name are control tokens then."""
    ours = tokenizer_from_gguf(spm(token_type=None))
    assert ours.special_ids == {0, 1, 2}
    assert ours.encode("a") == [1, 5]
    assert not {1, 2} & set(ours.encode_ordinary("a</s>"))


def test_an_empty_token_stands_for_nothing():
    """llama.cpp gives it a name of its own, too."""
    changed = spm(tokens=["<unk>", "<s>", "</s>", "▁", "", "▁a"], unknown_token_id=None)
    ours = tokenizer_from_gguf(changed)
    assert ours.encode("", False) == []
    assert "" not in [ours.token_text(i) for i in range(6)]


def test_a_damaged_character_map_does_not_panic():
    """The library follows its numbers without looking: each map is refused, or is safe."""
    whole = bytes(charsmap({"ﬁ": "fi", "\t": " ", "Ａ": "A", "é": "é", "x": ""}))
    text = "ﬁn\tＡx abc\U0010ffff\0é"
    assert charsmap_normalizer(whole, "key").normalize_str("ﬁn\tＡ") == "fin A"
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            ends = (rng.randrange(64), len(whole) - 1 - rng.randrange(20))
            damaged[rng.choice([*ends, rng.randrange(len(whole))])] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        try:
            normaliser = charsmap_normalizer(bytes(damaged), "key")
        except TokenizerError as error:
            assert str(error).startswith("key ")
            refused += 1
        else:
            normaliser.normalize_str(text)
    assert 300 < refused < 3000


def test_any_value_in_any_key_is_refused_or_taken():
    """No key's value makes anything but a tokenizer or a line about the key."""
    rng = random.Random(0)
    values = [None, 0, -1, 2**40, 1.5, float("inf"), True, "", "x", [], [1], ["a"], [1.5], [True],
              ["a"] * 50, [7] * len(TOKENS), {"a": 1}]  # fmt: skip
    for base in (keys(), spm(), spm(model="t5")):
        for key in [*base, "tokenizer.ggml.add_bos_token", "tokenizer.ggml.pre"]:
            for value in rng.sample(values, 8):
                try:
                    tokenizer_from_gguf({**base, key: value}).encode("a b")
                except TokenizerError as error:
                    assert "\n" not in str(error)
