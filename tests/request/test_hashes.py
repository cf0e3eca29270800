"""Prefix hashes against BLAKE2b fed by hand, and what must not collide."""

from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebius.errors import ConfigError
from moebius.request.hashes import BlockHasher

KEY = bytes(range(32))


def naive(key: bytes, *parts: bytes) -> bytes:
    digest = blake2b(key=key, digest_size=16)
    for part in parts:
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.digest()


def test_a_chain_is_root_then_block_after_block() -> None:
    root = naive(KEY, b"", b"model", b"tenant")
    first = naive(KEY, root, struct.pack("<3I", 7, 8, 9))
    second = naive(KEY, first, struct.pack("<3I", 10, 2**32 - 1, 0))
    made = BlockHasher(KEY, b"model", 3).of_prompt([7, 8, 9, 10, 2**32 - 1, 0, 5], b"tenant")
    assert made.hashes == (first, second), "the last token fills no block"


@given(st.lists(st.integers(0, 2**32 - 1), max_size=30), st.data())
def test_a_chain_may_be_made_in_parts(tokens: list[int], data: st.DataObject) -> None:
    hasher = BlockHasher(KEY, b"model", 4)
    cut = 4 * data.draw(st.integers(0, len(tokens) // 4))
    hashes: list[bytes] = []
    hasher.extend(hashes, b"x", tokens[:cut])
    hasher.extend(hashes, b"x", tokens[cut:])
    assert tuple(hashes) == hasher.of_prompt(tokens, b"x").hashes


def test_equal_hashes_mean_equal_key_model_salt_and_tokens() -> None:
    tokens = [1, 2, 3, 4]
    found = [
        BlockHasher(KEY, b"model", 2).of_prompt(tokens, b"salt"),
        BlockHasher(KEY, b"model", 2).of_prompt([1, 2, 4, 3], b"salt"),
        BlockHasher(KEY, b"model", 2).of_prompt(tokens, b""),
        BlockHasher(KEY, b"models", 2).of_prompt(tokens, b"alt"),
        BlockHasher(bytes(32), b"model", 2).of_prompt(tokens, b"salt"),
    ]
    assert len({prompt.hashes[-1] for prompt in found}) == len(found)


def test_a_key_id_tells_hashers_apart_and_nothing_of_the_key() -> None:
    one = BlockHasher(KEY, b"model", 4).key_id
    assert BlockHasher(KEY, b"model", 4).key_id == one and len(one) == 16
    others = [(bytes(32), b"model", 4), (KEY, b"other", 4), (KEY, b"model", 8)]
    assert one not in [BlockHasher(*other).key_id for other in others]
    assert one not in KEY and KEY not in one


@pytest.mark.parametrize("size", [0, 15, 65])
def test_a_key_that_is_no_key_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"has {size} bytes; it needs 16 to 64"):
        BlockHasher(bytes(size), b"", 4)
