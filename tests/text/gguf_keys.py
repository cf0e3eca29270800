"""The keys that llama.cpp's converter writes for a tokenizer of the tokenizers library, and texts
that tell tokenizers apart."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def keys_of(
    backend: Tokenizer, model: str = "gpt2", *, size: int = 0, **more: Any
) -> dict[str, Any]:
    """Keys by the converter's rules: it pads the list to the embeddings' size with [PAD7], gives
    added tokens their kinds, and writes a merge as two tokens with a space between.

    more: further keys behind tokenizer.ggml., None for those that are not to be there
    """
    by_id = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    tokens, kinds = [], []
    for i in range(max(size, max(by_id) + 1)):
        token = by_id.get(i)
        if token is None:
            kind = UNUSED
        elif i in added:
            kind = CONTROL if added[i].special else USER_DEFINED
        elif len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        else:
            kind = NORMAL
        tokens.append(f"[PAD{i}]" if token is None else token)
        kinds.append(kind)
    spec = json.loads(backend.to_str())["model"]
    found: dict[str, Any] = {"model": model, "tokens": tokens, "token_type": kinds}
    if spec["type"] == "BPE":
        found["merges"] = [" ".join(merge) for merge in spec["merges"]]
    else:
        scores = [score for _, score in spec["vocab"]]
        found["scores"] = scores + [-10000.0] * (len(tokens) - len(scores))
    found |= more
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


_PIECES = [
    *"abXZ'sSTLlmdvre0179",
    *" \t\n\r\v\u00a0\u2028\u3000",
    *".,;:!?…-_/\\|(){}[]<>@#$%^&*+=~`\"'",
    *"éÅßñµžΩωςйЖאבمَرहिन्दी각힣ㄱ日本漢字カなー々ａＺ",
    *"½²Ⅻ٣५①𝟘",
    *"e\u0301A\u030a\u0300\u200d\u200c\ufeff\u00ad",
    *"😀👍🏽🇺🇳☃\ufe0f\U0010ffff\ue000\ufffd\0\x7f",
    *["  ", "    ", "\n\n", "\r\n", " \n", "'S", "'ll", "I'm", "don't", "12345", "3.14", "1,000"],
    *[" the", " Hello", "WORLD", "camelCaseWord", "def f(x):\n    return", "https://a.b/c?d=1"],
    *[
        "ﬁ",
        "ſ",
        "K",
        "Å",
        "각",
        "กำ",
        "မြ",
        "㐀",
        "\uf900",
        "ǅ",
        "ʰ",
        "\u0085",
        "<|im_end|>",
        "<s>",
    ],
]


def nasty_texts(count: int, seed: int = 0) -> list[str]:
    """Random strings of what tokenizers treat in different ways."""
    rng = random.Random(seed)
    texts = ["", " ", "\n", "a", "  a  ", "".join(_PIECES), " ".join(_PIECES)]
    while len(texts) < count:
        texts.append("".join(rng.choices(_PIECES, k=rng.randint(1, 30))))
    return texts


def charsmap(replacements: Mapping[str, str]) -> list[int]:
    """A precompiled character map as sentencepiece writes it: u32 size of a double array, the
    array, and the replacements, each with a zero behind it."""
    strings = b""
    trie: dict[int, Any] = {}
    for old, new in replacements.items():
        node = trie
        for byte in old.encode():
            node = node.setdefault(byte, {})
        node[0] = len(strings)
        strings += new.encode() + b"\0"
    units = {0: 0}
    _place(trie, 0, units)
    size = (max(units) // 256 + 1) * 256
    array = b"".join(struct.pack("<I", units.get(i, 0)) for i in range(size))
    return list(struct.pack("<I", len(array)) + array + strings)


def _place(node: dict[int, Any], at: int, units: dict[int, int]) -> None:
    """Give a node's children their places: the node's own, exclusive-or its offset, exclusive-or
    their byte."""
    base = next(
        base for base in range(256, 2**20, 256) if all(base ^ byte not in units for byte in node)
    )
    # An offset of up to 21 bits stands at bit 10, bit 8 tells of an end, bits 0 to 7 are the byte.
    units[at] |= ((base ^ at) << 10) | (0x100 if 0 in node else 0)
    for byte, child in node.items():
        units[base ^ byte] = (1 << 31 | child) if byte == 0 else byte
    for byte, child in node.items():
        if byte:
            _place(child, base ^ byte, units)
