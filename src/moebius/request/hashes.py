"""Prefix hashes: what a full block of the KV cache is found by.

A prefix hash is a keyed BLAKE2b of 128 bits, chained over (namespace, salt) and the tokens of each
block, every part length-prefixed. So equal hashes mean equal namespace, salt and tokens from
position 0, and nobody without the key can aim for a collision.

The key is drawn once, at launch, by the front, which gives it to each engine that it starts: so the
front can tell which engine has a prompt's blocks, and an engine that was started again knows them
by the same names. A prompt's hashes cross to the engine with the request. The engine believes them
only where they were made by its own hasher: within one process by the key's id; what comes from
another process is hashed again at its door (engine/wire.py), because a wrong hash would show one
tenant what another has said.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

from moebius.errors import ConfigError

HASH_BYTES = 16
MIN_KEY_BYTES = 16
MAX_KEY_BYTES = 64


@dataclass(frozen=True, slots=True)
class PromptHashes:
    """Prefix hashes of all full blocks of a prompt; key_id names the hasher that made them."""

    key_id: bytes
    hashes: tuple[bytes, ...]


class BlockHasher:
    """Hashes blocks of `block_size` tokens with the launch's `key`; `namespace` names the model."""

    def __init__(self, key: bytes, namespace: bytes, block_size: int) -> None:
        if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
            raise ConfigError(
                f"the prefix key has {len(key)} bytes; it needs {MIN_KEY_BYTES} to {MAX_KEY_BYTES}"
            )
        self.block_size = block_size
        self._key = key
        self._namespace = namespace
        self._pack = struct.Struct(f"<{block_size}I").pack
        # No chain begins with these parts: a prefix's first digest has an empty one in front.
        self.key_id = self.digest(b"key", namespace, block_size.to_bytes(8, "little"))
        """Equal for hashers that give equal tokens equal hashes; tells nothing of the key."""

    def digest(self, *parts: bytes) -> bytes:
        data = b"".join(
            chain.from_iterable((len(part).to_bytes(8, "little"), part) for part in parts)
        )
        return blake2b(data, digest_size=HASH_BYTES, key=self._key).digest()

    def extend(self, hashes: list[bytes], salt: bytes, tokens: Sequence[int]) -> None:
        """Append to a sequence's first hashes those of its next full blocks, which hold `tokens`.

        What does not fill a block is left out.
        """
        size = self.block_size
        parent = hashes[-1] if hashes else self.digest(b"", self._namespace, salt)
        for end in range(size, len(tokens) + 1, size):
            parent = self.digest(parent, self._pack(*tokens[end - size : end]))
            hashes.append(parent)

    def of_prompt(self, prompt_ids: Sequence[int], salt: bytes) -> PromptHashes:
        """The hashes of a prompt's full blocks."""
        hashes: list[bytes] = []
        self.extend(hashes, salt, prompt_ids)
        return PromptHashes(self.key_id, tuple(hashes))
