"""Streams of text: pieces that concatenate to the whole, and stop strings across pieces."""

import codecs
from collections.abc import Callable, Sequence
from itertools import accumulate

from moebius.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes, in UTF-8


class IncrementalDecoder:
    """Decodes one token at a time; the pieces concatenate to `tokenizer.decode` of all the ids.

    Bytes of an unfinished character are held back; U+FFFD stands for what is broken once that is
    certain. With `prompt_ids` the text continues the prompt's: the first token keeps its leading
    space, and a character that the prompt leaves unfinished is completed. A push costs O(length of
    the token).
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._strip = self._detokenizer.strip
        self._continue(prompt_ids)

    def _continue(self, prompt_ids: Sequence[int]) -> None:
        """Take the state that decoding the prompt leaves; its last bytes are enough to know it."""
        tail: list[bytes] = []
        for token_id in reversed(prompt_ids):
            piece = self._detokenizer.piece(token_id, first=False, skip_special=self._skip)
            if piece is not None:
                self._first = False
                tail.append(piece)
            if sum(map(len, tail)) >= _LONGEST_CHARACTER:
                break
        if any(tail):
            self._strip = 0
        self._utf8.decode(b"".join(reversed(tail)))

    @property
    def num_pending(self) -> int:
        """Bytes held back for an unfinished character."""
        return len(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        """The text that this token settles; may be empty."""
        piece = self._detokenizer.piece(token_id, first=self._first, skip_special=self._skip)
        if piece is None:
            return ""
        self._first = False
        if self._strip and piece:
            spaces = min(len(piece) - len(piece.lstrip(b" ")), self._strip)
            self._strip = self._strip - spaces if spaces == len(piece) else 0
            piece = piece[spaces:]
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The end of the text: U+FFFD if a character was left unfinished, else nothing."""
        return self._utf8.decode(b"", final=True)


def text_offsets(
    tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True
) -> list[int]:
    """Where in `tokenizer.decode(ids)` each token's text begins, in characters."""
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    offsets = []
    length = 0
    for token_id in ids:
        offsets.append(length)
        length += len(decoder.push(token_id))
    return offsets


class _Automaton:
    """Knuth, Morris and Pratt's matcher of one pattern.

    What was read so far ends with the first `state` symbols of it. A symbol is a character, or a
    special token that the text leaves out, by its name. `visible[k]` of the pattern's first k
    symbols are characters.
    """

    def __init__(self, stop: str, pattern: Sequence[str]) -> None:
        self.stop = stop
        self.pattern = pattern
        self.state = 0
        self.visible = [0, *accumulate(len(symbol) == 1 for symbol in pattern)]
        self._failure = [0] * (len(pattern) + 1)
        k = 0
        for i in range(1, len(pattern)):
            while k and pattern[i] != pattern[k]:
                k = self._failure[k]
            k += pattern[i] == pattern[k]
            self._failure[i + 1] = k

    def advance(self, symbol: str) -> bool:
        """Read one symbol; True when the pattern is complete."""
        while self.state and symbol != self.pattern[self.state]:
            self.state = self._failure[self.state]
        self.state += symbol == self.pattern[self.state]
        return self.state == len(self.pattern)

    @property
    def held(self) -> int:
        """How many of the last characters are part of what was matched so far."""
        return self.visible[self.state]


class StopMatcher:
    """Finds the stop string that completes first, over any pieces of a text.

    Of several it is the one that begins first. Text that could still become a stop string is held
    back, and no more than that; nothing of a stop string is released, unless it is to be kept.
    After a match the matcher is at its end and takes no more text.

    The text may leave special tokens out (`push_special` tells of them). A stop string is found in
    the text as it is sent, and, where it names special tokens, in the text with these; they match
    whole and as what they are.
    """

    def __init__(
        self,
        stops: Sequence[str],
        split: Callable[[str], list[str]] = lambda stop: [stop],
        *,
        keep: bool = False,
    ) -> None:
        """split: a stop string as ordinary and special pieces in turn (Tokenizer.split_special).
        keep: the text ends with the stop string, not before it."""
        self._keep = keep
        self._plain = [_Automaton(stop, stop) for stop in dict.fromkeys(stops) if stop]
        self._with_specials: list[_Automaton] = []
        for plain in self._plain:
            ordinary, *more = split(plain.stop)
            if more:
                pattern = list(ordinary)
                for special, text in zip(more[::2], more[1::2], strict=True):
                    pattern += [_hidden(special), *text]
                self._with_specials.append(_Automaton(plain.stop, pattern))
        self._automata = [*self._plain, *self._with_specials]
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certain not to belong to a stop string, and the one that this completes."""
        assert not self._matched, "no text may follow a match"
        if not self._automata:
            return text, None
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = [a for a in self._automata if a.advance(char)]
            if complete:
                return self._end(seen[:end], complete)
        keep = len(seen) - max(a.held for a in self._automata)
        self._held = seen[keep:]
        return seen[:keep], None

    def push_special(self, special: str) -> tuple[str, str | None]:
        """The same for a special token that is no part of the text."""
        assert not self._matched, "no token may follow a match"
        complete = [a for a in self._with_specials if a.advance(_hidden(special))]
        if complete:
            return self._end(self._held, complete)
        keep = len(self._held) - max((a.held for a in self._automata), default=0)
        released = self._held[:keep]
        self._held = self._held[keep:]
        return released, None

    def _end(self, seen: str, complete: list[_Automaton]) -> tuple[str, str]:
        longest = max(complete, key=lambda a: (a.held, len(a.stop)))
        self._matched = True
        self._held = ""
        return seen if self._keep else seen[: len(seen) - longest.held], longest.stop

    def flush(self) -> str:
        """The end of the text: what was held back and did not become a stop string."""
        held = self._held
        self._held = ""
        return held


def _hidden(special: str) -> str:
    """A special token as a symbol: never one character, so that no character equals it."""
    return f"\0{special}"
