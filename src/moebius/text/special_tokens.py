"""Special tokens are the template's to write; in a message their text stays plain text.

A second tokenizer serves for this, equal to the first but for the names of the special tokens: each
has an alias that nobody can guess, so no plain text can ever become a special id. Specials inside
messages are put between markers before the template runs; in what it renders, marked ones stay as
they are and all others, the template's own, become aliases. One pass of the second tokenizer then
gives the ids, with every rule of the first (spaces that a special token swallows, the space that
sentencepiece puts in front) at work.

Time is linear in the text, whatever it holds, and long texts are searched and encoded without the
interpreter's lock.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Backend

# Characters that are searched in one go: the lock is taken between them.
_WINDOW = 2**20
_SEPARATOR = "\0"
_SENTINEL = re.compile(r"<extra_id_\d+>")

Json = TypeVar("Json")
Rename = Callable[[Mapping[str, str]], models.Model]
"""Makes a tokenizer's model with other names for some of its tokens."""


def sentinels(backend: Backend, specials: Mapping[int, str]) -> frozenset[int]:
    """Of special tokens, by id, those that stand for a gap in T5's texts (arXiv 1910.10683 section
    3.1.4): <extra_id_0>, <extra_id_1>, ... Other tokenizers use such names for other things."""
    if not isinstance(backend.model, models.Unigram):
        return frozenset()
    return frozenset(i for i, text in specials.items() if _SENTINEL.fullmatch(text))


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


def _with_strings(value: Any, strings: Iterator[str]) -> Any:
    """The nested JSON with other strings, which come in the order of `strings_in`."""
    if isinstance(value, str):
        return next(strings)
    if isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            new_key = _with_strings(key, strings)
            copy[new_key] = _with_strings(item, strings)
        return copy
    if isinstance(value, (list, tuple)):
        return [_with_strings(item, strings) for item in value]
    return value


class _Finder:
    """Finds given strings in a text: leftmost first, of several at one place the longest.

    None is found inside another. The tokenizers library searches, with one automaton for all
    strings and without the interpreter's lock.
    """

    def __init__(self, wanted: list[str]) -> None:
        # What lies between two of them is one unknown word.
        self._backend = Backend(models.WordLevel({"": 0}, unk_token=""))
        self._backend.add_tokens([AddedToken(text, normalized=False) for text in wanted])
        self._wanted = {self._backend.token_to_id(text): text for text in wanted}
        self._longest = max(map(len, wanted), default=0)

    def spans(self, text: str) -> Iterator[tuple[int, str]]:
        """(where it begins, which of the strings it is) of each one in the text, in order."""
        start = 0
        while start < len(text):
            end = start + _WINDOW
            window = text[start : end + self._longest]
            [encoding] = self._backend.encode_batch_fast([window], add_special_tokens=False)
            for token_id in encoding.ids:
                found = self._wanted.get(token_id)
                if found is None:
                    continue
                at = text.index(found, start)
                if at >= end:
                    break
                yield at, found
                start = at + len(found)
            start = max(start, end)


class SpecialGuard:
    """Knows the special tokens of one tokenizer and how to encode text around them."""

    def __init__(
        self, backend: Backend, vocab: Mapping[str, int], rename: Rename | None = None
    ) -> None:
        """vocab: the model's own, without the added tokens. rename: of the model, if known."""
        added = backend.get_added_tokens_decoder()
        specials = {
            i: token for i, token in sorted(added.items()) if token.special and token.content
        }
        self._single_words = {token.content for token in specials.values() if token.single_word}
        self._finder = _Finder([token.content for token in specials.values()])
        self._aliased = _Aliased(backend, vocab, specials, rename)
        # A special token that is matched after normalising has spellings that a search of the raw
        # text cannot see.
        self._always = backend.normalizer is not None and any(
            t.normalized for t in specials.values()
        )

    def split(self, text: str) -> list[str]:
        """The text as ordinary and special pieces in turn.

        An ordinary one comes first and last, and may be empty. UnicodeEncodeError on text that is
        not Unicode (a lone surrogate).
        """
        text.encode()
        pieces = []
        at = 0
        for start, special in self._finder.spans(text):
            pieces += [text[at:start], special]
            at = start + len(special)
        return [*pieces, text[at:]]

    def concerns(self, text: str) -> bool:
        """Whether the text holds the text of a special token."""
        return self._always or next(self._finder.spans(text), None) is not None

    def mark(self, value: Json) -> tuple[Json, str | None]:
        """The nested JSON with every special token between two markers, and the marker.

        None in the marker's place where there are no special tokens. The marker is ASCII without
        letters: nothing that templates do to text changes it.
        """
        texts = list(strings_in(value))
        joined = _SEPARATOR.join(texts)
        spans = self._finder.spans(joined)
        upcoming = next(spans, None)
        if upcoming is None and not self._always:
            return value, None
        marker = f".{secrets.randbelow(10**15):015}."

        def marked() -> Iterator[str]:
            nonlocal upcoming
            at = 0
            for text in texts:
                pieces = []
                end = at + len(text)
                while upcoming is not None and upcoming[0] < end:
                    start, special = upcoming
                    upcoming = next(spans, None)
                    pieces += [joined[at:start], marker, special, marker]
                    at = start + len(special)
                yield "".join([*pieces, joined[at:end]])
                at = end + len(_SEPARATOR)

        return _with_strings(value, marked()), marker

    def named(self, rendered: str, marker: str) -> str:
        """A rendered text for `backend`.

        Specials between markers are plain text, the others have their aliases.
        """
        pieces: list[str] = []
        at = 0
        for start, special in self._finder.spans(rendered):
            end = start + len(special)
            opened = rendered.startswith(marker, max(start - len(marker), at), start)
            if opened and rendered.startswith(marker, end):
                pieces += [rendered[at : start - len(marker)], special]
                at = end + len(marker)
            elif special not in self._single_words or not _inside_word(rendered, start, end):
                pieces += [rendered[at:start], self._aliased.alias[special]]
                at = end
        pieces.append(rendered[at:])
        return "".join(piece.replace(marker, "") for piece in pieces)

    @property
    def backend(self) -> Backend:
        """The second tokenizer: only aliases are special to it. Its ids go through `original`."""
        return self._aliased.backend

    def original(self, ids: list[int]) -> list[int]:
        """The first tokenizer's ids of the second's."""
        mine = self._aliased.original
        return [mine.get(i, i) for i in ids] if mine else ids


def _inside_word(text: str, start: int, end: int) -> bool:
    before = text[start - 1 : start]
    after = text[end : end + 1]
    return any(re.match(r"\w", char) for char in (before, after))


class _Aliased:
    """The tokenizer whose special tokens bear aliases.

    alias      a special token's text to its alias
    original   its ids to the first tokenizer's, where they differ
    """

    def __init__(
        self,
        backend: Backend,
        vocab: Mapping[str, int],
        specials: Mapping[int, AddedToken],
        rename: Rename | None,
    ) -> None:
        nonce = secrets.token_hex(16)
        self.alias = {
            token.content: f"\U000f0000{nonce}.{i}\U000f0001" for i, token in specials.items()
        }
        # The library numbers new tokens from the vocabulary's size on.
        gaps = max(vocab.values(), default=-1) >= len(vocab)
        model = backend.model  # shared: it costs nothing
        if gaps or any(_may_form(backend, token.content) for token in specials.values()):
            model = rename(self.alias) if rename else self._renamed(backend)
        self.backend = Backend(model)
        if backend.normalizer is not None:
            self.backend.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self.backend.pre_tokenizer = backend.pre_tokenizer
        self._add_tokens(backend, specials)
        self.original: dict[int, int] = {}
        for i, token in backend.get_added_tokens_decoder().items():
            mine = self.backend.token_to_id(self.alias.get(token.content, token.content))
            if mine is not None and mine != i:
                self.original[mine] = i

    def _add_tokens(self, backend: Backend, specials: Mapping[int, AddedToken]) -> None:
        added = sorted(backend.get_added_tokens_decoder().items())
        self.backend.add_tokens([token for i, token in added if i not in specials])
        # Which of them are to be special was decided already, by SpecialGuard.
        aliases = []
        for token in specials.values():
            alias = self.alias[token.content]
            aliases.append(
                AddedToken(alias, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
            )
        self.backend.add_special_tokens(aliases)

    def _renamed(self, backend: Backend) -> models.Model:
        """The model with the aliases in its vocabulary: no plain text becomes a special token."""
        alias = self.alias
        spec = json.loads(backend.to_str())
        spec |= {"truncation": None, "padding": None, "post_processor": None, "added_tokens": []}
        model = spec["model"]
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
        renamed: models.Model = Backend.from_str(json.dumps(spec)).model
        return renamed


def _may_form(backend: Backend, special: str) -> bool:
    """Whether the model may make the special token's id out of plain text.

    A BPE that forms a token inside a longer word forms it of its text alone, too: merges inside its
    borders come in the same order. Other models are not asked.
    """
    model = backend.model
    token_id = model.token_to_id(special)
    if token_id is None:
        return False
    if not isinstance(model, models.BPE) or model.dropout:
        return True
    return any(token.id == token_id for token in model.tokenize(special))
