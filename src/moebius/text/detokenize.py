"""From token ids to bytes: a text is the concatenation of its tokens' bytes, read as UTF-8.

This is what makes a stream equal to the whole, always, at a constant cost a token. The byte values
come from the decoder that tokenizer.json names: byte-level BPE (GPT-2, Qwen, Llama 3),
sentencepiece's metaspace with byte fallback (Llama 2, Mistral, Gemma), or WordPiece's words and
their continuations (BERT). Bytes that are no UTF-8 become U+FFFD by the rule of the Unicode
standard, section 3.9 (one for each maximal ill-formed part), where Hugging Face's ByteFallback
gives up the whole run of byte tokens; on well-formed text both agree.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from moebius.errors import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes.

    A byte that is visible in Latin-1 is itself, the others follow from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    if all(c in _ALPHABET for c in token):
        return bytes(_ALPHABET[c] for c in token)
    return token.encode()


@dataclass(frozen=True, slots=True)
class _Steps:
    """A decoder as two functions: a token's bytes, and the bytes of a token that begins a text.

    strip    how many leading spaces a text loses
    joiner   what stands between two tokens
    """

    inner: Callable[[str], bytes]
    first: Callable[[str], bytes]
    strip: int = 0
    joiner: bytes = b""


def _pattern_string(spec: Mapping[str, Any]) -> str:
    pattern = spec["pattern"]
    if not isinstance(pattern, Mapping) or not isinstance(pattern.get("String"), str):
        raise TokenizerError(
            "tokenizer.json: the decoder replaces a regular expression; only strings are supported"
        )
    return str(pattern["String"])


def _fallback_chain(specs: list[Mapping[str, Any]]) -> _Steps:
    """Replace, ByteFallback, Fuse and Strip, in the order of sentencepiece's conversions."""
    replacements: list[tuple[str, str]] = []
    byte_fallback = False
    fused = False
    strip = 0
    for spec in specs:
        kind = spec["type"]
        if kind == "Replace" and not byte_fallback and not fused:
            replacements.append((_pattern_string(spec), str(spec["content"])))
        elif kind == "ByteFallback" and not fused:
            byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and spec["content"] == " " and spec["stop"] == 0:
            strip += int(spec["start"])
        else:
            raise TokenizerError(
                f"tokenizer.json: decoder {kind!r} is not supported here; supported are ByteLevel, "
                "Metaspace, WordPiece, and a Sequence of Replace, ByteFallback, Fuse, Strip"
            )

    def token_bytes(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.match(token) if byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.encode()

    return _Steps(token_bytes, token_bytes, strip)


def _metaspace(spec: Mapping[str, Any]) -> _Steps:
    mark = str(spec.get("replacement", "▁"))
    prepends = spec.get("prepend_scheme", "always") != "never"

    def inner(token: str) -> bytes:
        return token.replace(mark, " ").encode()

    def first(token: str) -> bytes:
        return token.replace(mark, "" if prepends else " ").encode()

    return _Steps(inner, first)


# What WordPiece's decoder makes of a space in front, in this order, token by token.
_CLEANED = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " do not": " don't",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}


def _word_piece(spec: Mapping[str, Any]) -> _Steps:
    prefix = str(spec.get("prefix", "##"))
    cleaned = _CLEANED if spec.get("cleanup", True) else {}

    def first(token: str) -> bytes:
        for spaced, close in cleaned.items():
            token = token.replace(spaced, close)
        return token.encode()

    def inner(token: str) -> bytes:
        if token.startswith(prefix):
            return first(token.removeprefix(prefix))
        return first(f" {token}")

    return _Steps(inner, first)


def _steps(spec: Mapping[str, Any] | None) -> _Steps:
    if spec is None:
        return _Steps(str.encode, str.encode, joiner=b" ")
    if spec["type"] == "Sequence":
        decoders = list(spec["decoders"])
        # Fuse joins, as we do anyway.
        alone = all(decoder["type"] == "Fuse" for decoder in decoders[1:])
        return _steps(decoders[0]) if decoders and alone else _fallback_chain(decoders)
    if spec["type"] == "ByteLevel":
        return _Steps(_byte_level, _byte_level)
    if spec["type"] == "Metaspace":
        return _metaspace(spec)
    if spec["type"] == "WordPiece":
        return _word_piece(spec)
    return _fallback_chain([spec])


class Detokenizer:
    """The bytes of each token id; ids that the tokenizer does not know have none.

    strip   how many leading spaces a text loses
    """

    def __init__(
        self, backend: Backend, decoder: Mapping[str, Any] | None, special_ids: frozenset[int]
    ) -> None:
        self._backend = backend
        self._steps = _steps(decoder)
        self.strip = self._steps.strip
        self._special_ids = special_ids
        self._cache: dict[int, bytes] = {}

    def own(self, token_id: int) -> bytes:
        """The token's bytes inside a text, special tokens included."""
        known = self._cache.get(token_id)
        if known is None:
            token = self._token(token_id)
            known = b"" if token is None else self._steps.inner(token)
            self._cache[token_id] = known
        return known

    def piece(self, token_id: int, *, first: bool, skip_special: bool) -> bytes | None:
        """What the token adds to a text, at its beginning (`first`) or inside.

        None where it takes no part in it.
        """
        token = None if skip_special and token_id in self._special_ids else self._token(token_id)
        if token is None:
            return None
        return self._steps.first(token) if first else self._steps.joiner + self.own(token_id)

    def _token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def join(self, token_ids: Iterable[int], *, skip_special: bool) -> bytes:
        """All bytes of a text; its leading spaces are stripped as the decoder says."""
        ids = list(token_ids)
        inner = {
            token_id: self.piece(token_id, first=False, skip_special=skip_special)
            for token_id in set(ids)
        }
        shown = [token_id for token_id in ids if inner[token_id] is not None]
        pieces = [inner[token_id] or b"" for token_id in shown]
        if shown:
            pieces[0] = self.piece(shown[0], first=True, skip_special=skip_special) or b""
        text = b"".join(pieces)
        spaces = len(text) - len(text.lstrip(b" "))
        return text[min(spaces, self.strip) :]
