"""How few tokens a text can become, known before it is tokenised from the longest token.

A tokenizer may lose text on the way: a normaliser that drops or folds characters, a pre-tokenizer
that drops spaces, a word that becomes one unknown token. A bound is given only where all parts are
known to lose nothing, or a known share; else it is 0, which says nothing and is never wrong.
"""

import json
import string
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

# Unicode's normal forms and lower case leave each byte that is ASCII, and a quarter of the others.
_FOLDING = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})
_FOLDED = 4
_LOSSLESS = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"})
_LOSSLESS_UNLESS_REMOVED = frozenset({"Split", "Punctuation"})
_SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f "
    "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
)
_WHITESPACE = _SPACES + "\u2028\u2029\u202f\u205f\u3000"

_LETTERS = string.ascii_letters.encode()

Spec = Mapping[str, Any]


class TokenBound:
    """The fewest tokens that a tokenizer can make of a text.

    Two counts are made, and the better one is taken: of all bytes, and of ASCII letters, for the
    longest tokens of most vocabularies are runs of spaces and dashes.
    """

    def __init__(self, backend: Backend, vocab: Mapping[str, int]) -> None:
        """vocab: the model's own, without the added tokens."""
        normalisers = _flat(backend.normalizer, "normalizers")
        pre_tokenizers = _flat(backend.pre_tokenizer, "pretokenizers")
        added = list(backend.get_added_tokens_decoder().values())
        self._folds = any(spec["type"] in _FOLDING for spec in normalisers)
        self._strips = any(token.lstrip or token.rstrip for token in added)
        self._most_bytes = 0
        self._most_letters = 0
        if not _keeps_text(normalisers, self._strips):
            return
        if not all(map(_keeps_pieces, pre_tokenizers)):
            return
        kinds = [spec["type"] for spec in (*normalisers, *pre_tokenizers)]
        longest = _longest_of_model(backend.model, vocab, byte_level="ByteLevel" in kinds)
        if longest is None:
            return
        texts = [token.content for token in added]
        if backend.normalizer is not None:
            texts += map(backend.normalizer.normalize_str, list(texts))
        self._most_bytes = max([longest, *(len(text.encode()) for text in texts)])
        replaced = [spec["pattern"]["String"] for spec in normalisers if spec["type"] == "Replace"]
        if not any(map(_letters, replaced)):
            self._most_letters = _most_letters([*vocab, *texts])

    def fewest(self, text: str) -> int:
        """At least so many tokens, those added around the text not counted; 0: nothing is known."""
        if not self._most_bytes:
            return 0
        size = len(text.encode())
        letters = _letters(text) if self._most_letters else 0
        if self._folds and not text.isascii():
            size_ascii = len(text.encode("ascii", "ignore"))
            size = size_ascii + (size - size_ascii) // _FOLDED
            letters -= len(text) - size_ascii  # each accent may be composed with a letter
        if self._strips:  # a token may swallow all whitespace beside it
            size -= sum(text.count(space) * len(space.encode()) for space in _WHITESPACE)
        counts = [(size, self._most_bytes), (letters, self._most_letters)]
        return max(-(-max(count, 0) // most) for count, most in counts if most)


def _letters(text: str) -> int:
    """How many ASCII letters there are: byte-level vocabularies spell these as themselves."""
    plain = text.encode("ascii", "ignore")
    return len(plain) - len(plain.translate(None, _LETTERS))


def _most_letters(tokens: list[str]) -> int:
    most = 1  # an unknown token's name may have none, though it stands for one
    for token in sorted(tokens, key=len, reverse=True):
        if len(token) <= most:
            break
        most = max(most, _letters(token))
    return most


def _flat(component: Any, parts: str) -> list[Spec]:
    """The specifications of a normaliser or pre-tokenizer, those of a sequence one by one."""

    def flat(spec: Spec) -> list[Spec]:
        if spec["type"] != "Sequence":
            return [spec]
        return [inner for part in spec[parts] for inner in flat(part)]

    return [] if component is None else flat(json.loads(component.__getstate__()))


def _keeps_text(normalisers: list[Spec], strips: bool) -> bool:
    """Whether nothing is lost but by folding.

    Folding must come first: what it leaves is known of the client's text alone.
    """
    last = len(normalisers) - 1
    return all(
        _keeps(spec, strips, first=i == 0, last=i == last) for i, spec in enumerate(normalisers)
    )


def _keeps(spec: Spec, strips: bool, *, first: bool, last: bool) -> bool:
    kind = spec["type"]
    if kind in _FOLDING:
        # Compatibility forms make spaces of other characters, which a token beside them could
        # swallow.
        return first and not (strips and kind in ("NFKC", "NFKD"))
    if kind == "Replace":
        pattern = spec["pattern"].get("String")
        content = spec["content"]
        if pattern is None or len(content.encode()) < len(pattern.encode()):
            return False
        return not (strips and any(space in content for space in _WHITESPACE))
    return kind == "Prepend" or (kind == "ByteLevel" and last)


def _keeps_pieces(spec: Spec) -> bool:
    kind = spec["type"]
    return kind in _LOSSLESS or (kind in _LOSSLESS_UNLESS_REMOVED and spec["behavior"] != "Removed")


def _longest_of_model(
    model: models.Model, vocab: Mapping[str, int], *, byte_level: bool
) -> int | None:
    """The most bytes of text that one token of the model's vocabulary stands for, if any number.

    None: there is none in models that make one unknown token of a whole word, or drop what they do
    not know.
    """
    if not isinstance(model, models.BPE):
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if byte_level:
        if not all(char in vocab for char in pre_tokenizers.ByteLevel.alphabet()):
            return None
        return max(map(len, vocab))  # a character is a byte
    longest = max(len(token.encode()) for token in vocab)
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return longest
    if model.unk_token is None or model.fuse_unk:
        return None
    # Each unknown character, of up to 4 bytes, becomes an unknown token: `longest` counts its name.
    return longest if len(model.unk_token.encode()) >= 4 else None
