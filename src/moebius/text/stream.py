"""Streams of text: token ids to pieces that concatenate to the whole, and stop strings across pieces."""

import codecs
from collections.abc import Sequence

from moebius.text.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes, in UTF-8


class IncrementalDecoder:
    """Decodes one token at a time. The pieces concatenate to `tokenizer.decode` of all the ids, always.

    Bytes of an unfinished character are held back; U+FFFD stands for what is broken once that is certain. With
    `prompt_ids` the text continues the prompt's: the first token keeps its leading space, and a character that the
    prompt leaves unfinished is completed. A push costs O(length of the token).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
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


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> list[int]:
    """Where in `tokenizer.decode(ids)` each token's text begins, in characters."""
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    offsets, length = [], 0
    for token_id in ids:
        offsets.append(length)
        length += len(decoder.push(token_id))
    return offsets


class _Automaton:
    """Knuth, Morris and Pratt's matcher of one string: `state` characters of it end the text so far."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self._failure = [0] * (len(pattern) + 1)
        k = 0
        for i in range(1, len(pattern)):
            while k and pattern[i] != pattern[k]:
                k = self._failure[k]
            k += pattern[i] == pattern[k]
            self._failure[i + 1] = k

    def advance(self, char: str) -> bool:
        """Read one character; True when the pattern is complete."""
        while self.state and char != self.pattern[self.state]:
            self.state = self._failure[self.state]
        self.state += char == self.pattern[self.state]
        return self.state == len(self.pattern)


class StopMatcher:
    """Finds the stop string that completes first (of those that complete together, the longest), over any pieces.

    Text that could still become a stop string is held back, and no more than that; nothing of a stop string is ever
    released. After a match the matcher is at its end and takes no more text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True) if stop]
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain not to belong to a stop string, the stop string that this piece completed)."""
        assert not self._matched, "no text may follow a match"
        if not self._automata:
            return text, None
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = [a for a in self._automata if a.advance(char)]
            if complete:
                self._matched, self._held = True, ""
                stop = complete[0].pattern
                return seen[: end - len(stop)], stop
        keep = len(seen) - max(a.state for a in self._automata)
        self._held = seen[keep:]
        return seen[:keep], None

    def flush(self) -> str:
        """The end of the text: what was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held
