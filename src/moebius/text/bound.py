"""How many tokens a text has: how few it can have, told by its length alone, and which, without holding others up."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from moebius.errors import ContextExceededError
from moebius.text.detokenize import BYTE_ALPHABET

# From this length on a text is encoded by the call that lets other threads run; for short ones that takes longer.
_LONG_TEXT = 1024
# So many ids become a list within the time that one call may take from all others.
_LONG_LIST = 2**20

# By how much a normaliser can shorten a text, in UTF-8. NFC: an iota of three bytes and two accents of two become one
# letter of two, and nothing does worse.
_SHRINKS = {"NFC": 4, "ByteLevel": 1, "Prepend": 1}
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split")
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
_SPACES = "".join(char for char in map(chr, range(0x3001)) if char.isspace())


def encode_text(backend: Backend, text: str, most: int | None = None) -> list[int]:
    """The ids of a text, nothing added. ContextExceededError where they exceed `most`, and are too many to list."""
    if len(text) < _LONG_TEXT:
        short: list[int] = backend.encode(text, add_special_tokens=False).ids
        return short
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
    if most is not None and len(encoding) > max(most, _LONG_LIST):
        raise ContextExceededError(most, len(encoding))
    ids: list[int] = encoding.ids
    return ids


class TokenBound:
    """A lower bound on how many tokens a text has: its length over that of the longest token.

    That holds where every byte of a text ends in a token: byte-level BPE, and models that fall back to bytes. Others
    swallow spaces, or make one token of any number of characters that they do not know; of those nothing is said.

    longest   most bytes of a text that one token can stand for; None where there is no bound
    """

    def __init__(self, backend: Backend) -> None:
        normalizer, pre_tokenizer = _steps(backend.normalizer), _steps(backend.pre_tokenizer)
        byte_level = any(step["type"] == "ByteLevel" for step in (*normalizer, *pre_tokenizer))
        vocabulary = backend.get_vocab(with_added_tokens=False).keys()
        added = backend.get_added_tokens_decoder().values()
        # A byte-level token has a character for each byte.
        sizes = map(len, vocabulary) if byte_level else (len(token.encode()) for token in vocabulary)
        self._shrink = _shrink(normalizer)
        whole = _is_whole(backend, vocabulary, byte_level) and all(map(_keeps, pre_tokenizer))
        longest = max([*sizes, *(len(token.content.encode()) for token in added)], default=0)
        self.longest = longest * self._shrink if whole and longest and self._shrink else None
        self._swallows_spaces = any(token.lstrip or token.rstrip for token in added)

    def fewest_tokens(self, text: str) -> int:
        """The text has at least so many; 0 where nothing is known."""
        if self.longest is None:
            return 0
        size = len(text.encode("utf-8", "surrogatepass"))
        if self._swallows_spaces:
            size -= sum(text.count(space) * len(space.encode()) for space in _SPACES)
        # No normaliser in question shortens ASCII.
        longest = self.longest // self._shrink if text.isascii() else self.longest
        return -(-size // longest)


def _steps(part: Any) -> list[Mapping[str, Any]]:
    """What a normaliser or a pre-tokenizer does, one step after the other."""

    def flat(spec: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        if spec["type"] != "Sequence":
            yield spec
        for inner in (*spec.get("normalizers", ()), *spec.get("pretokenizers", ())):
            yield from flat(inner)

    return [] if part is None else list(flat(json.loads(part.__getstate__())))


def _shrink(normalizer: Iterable[Mapping[str, Any]]) -> int:
    """By what factor a text can lose bytes; 0 where there is no telling."""
    factor = 1
    for step in normalizer:
        pattern = step["pattern"].get("String") if step["type"] == "Replace" else None
        grows = pattern is not None and len(step["content"].encode()) >= len(pattern.encode())
        factor *= 1 if grows else _SHRINKS.get(step["type"], 0)
    return factor


def _keeps(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer's step drops nothing."""
    return step["type"] in _KEEPING and step.get("behavior") != "Removed"


def _is_whole(backend: Backend, vocabulary: Any, byte_level: bool) -> bool:
    """Whether no byte of a text is unknown."""
    model = backend.model
    if byte_level:
        return isinstance(model, models.BPE) and vocabulary >= BYTE_ALPHABET.keys()
    falls_back = isinstance(model, (models.BPE, models.Unigram)) and b'"byte_fallback":true' in model.__getstate__()
    return falls_back and vocabulary >= _BYTE_TOKENS
