"""Special tokens are the template's to write, never a message's: their text inside contents stays plain text.

A second tokenizer serves for this, equal to the first but for the names of the special tokens: each has an alias that
nobody can guess, so no plain text can ever become a special id. Specials inside messages are put between markers
before the template runs; in what it renders, marked ones stay as they are and all others, the template's own, become
aliases. One pass of the second tokenizer then gives the ids, with every rule of the first (spaces that a special token
swallows, the space that sentencepiece puts in front) at work.
"""

import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from moebius.errors import RequestError

_PRIVATE_USE = range(0xE000, 0xF900)


def strings_in(value: object) -> Iterator[str]:
    """Every string in nested JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)


class SpecialGuard:
    """Knows the special tokens of one tokenizer and how to encode text around them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._specials = {i: token for i, token in sorted(added.items()) if token.special and token.content}
        longest_first = sorted(self._specials.values(), key=lambda token: -len(token.content))
        self._pattern = re.compile("|".join(map(_as_regex, longest_first)) or "(?!)")
        # A special token that is matched after normalising has spellings that a search of the raw text cannot see.
        self._always = backend.normalizer is not None and any(t.normalized for t in self._specials.values())
        self._lock = threading.Lock()
        self._aliased: _Aliased | None = None

    def concerns(self, value: object) -> bool:
        """Whether a string in nested JSON holds the text of a special token."""
        return self._always or any(self._pattern.search(text) for text in strings_in(value))

    def mark(self, value: Any, *known: str) -> tuple[Any, str]:
        """(the nested JSON with every special token between two markers, the marker).

        The marker is a private-use character that occurs neither in the strings nor in the `known` texts.
        """
        texts = [*strings_in(value), *known]
        for code in _PRIVATE_USE:
            marker = chr(code)
            if not any(marker in text or _escaped(marker) in text for text in texts):
                break
        else:
            raise RequestError("the messages use every private-use character of Unicode", param="messages")

        def marked(item: Any) -> Any:
            if isinstance(item, str):
                return self._pattern.sub(lambda match: f"{marker}{match[0]}{marker}", item)
            if isinstance(item, Mapping):
                return {marked(key): marked(value) for key, value in item.items()}
            return [marked(x) for x in item] if isinstance(item, (list, tuple)) else item

        return marked(value), marker

    def encode_marked(self, rendered: str, marker: str) -> list[int]:
        """Ids of a rendered text: specials between markers as plain text, the others as special tokens."""
        mark = f"(?:{marker}|{re.escape(_escaped(marker))})"
        specials = self._pattern.pattern
        aliased = self._tokenizer()

        def replace(match: re.Match[str]) -> str:
            plain, special = match["plain"], match["special"]
            return plain if plain is not None else aliased.alias[special] if special is not None else ""

        text = re.sub(f"{mark}(?P<plain>{specials}){mark}|(?P<special>{specials})|{mark}", replace, rendered)
        return aliased.encode(text)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        return self._tokenizer().encode(text)

    def _tokenizer(self) -> "_Aliased":
        # Built when first needed: it costs as much memory and time as the first tokenizer did.
        with self._lock:
            if self._aliased is None:
                self._aliased = _Aliased(self._backend, self._specials)
            return self._aliased


def _escaped(marker: str) -> str:
    """How a template's `tojson(ensure_ascii=true)` spells the marker."""
    return f"\\u{ord(marker):04x}"


def _as_regex(token: AddedToken) -> str:
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text


class _Aliased:
    """The tokenizer whose special tokens bear aliases; `alias` maps a special token's text to its alias."""

    def __init__(self, backend: Backend, specials: Mapping[int, AddedToken]) -> None:
        nonce = secrets.token_hex(16)
        self.alias = {token.content: f"\U000f0000{nonce}.{i}\U000f0001" for i, token in specials.items()}
        spec = json.loads(backend.to_str())
        spec |= {"truncation": None, "padding": None, "post_processor": None}
        self._rename_model(spec["model"])
        for token in spec["added_tokens"]:
            if token["content"] in self.alias:
                # The text around a special token was matched already, by SpecialGuard's patterns.
                token |= {"content": self.alias[token["content"]], "normalized": False, "single_word": False}
        self._backend = Backend.from_str(json.dumps(spec))
        added = backend.get_added_tokens_decoder()
        found = {i: self._backend.token_to_id(self.alias.get(t.content, t.content)) for i, t in added.items()}
        self._original = {mine: i for i, mine in found.items() if mine != i}

    def _rename_model(self, model: dict[str, Any]) -> None:
        alias = self.alias
        if isinstance(model["vocab"], dict):
            model["vocab"] = {alias.get(token, token): i for token, i in model["vocab"].items()}
        else:
            model["vocab"] = [[alias.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            # A merge that makes a special token would make it out of plain text.
            pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if alias.keys().isdisjoint((a, b, a + b))]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self._original.get(i, i) for i in ids] if self._original else ids
