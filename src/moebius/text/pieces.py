"""Long texts in pieces, cut where a tokenizer cuts too: memory does not grow with a text."""

import re
from collections.abc import Callable, Iterable, Iterator

PIECE = 2**18
"""Characters of a text that are in memory at a time."""
CONTEXT = 64
"""Characters of one piece that the next is tokenised behind."""

# Behind a letter and before white space, or failing that before a mark, no pre-tokenizer of the
# published models sees one word: GPT-2's expression, Llama 3's, Qwen's, and those that turn spaces
# into ▁.
_WORD_ENDS = (
    re.compile(r".*[^\W\d_](?=\s)", re.DOTALL),
    re.compile(r".*[^\W\d_](?=[.,;:!?…。，、；：！？])", re.DOTALL),
)


def word_end(text: str, start: int, stop: int) -> int:
    """Where the last word of text[start:stop] ends.

    `stop` where there is no such place in the range's later half.
    """
    middle = (start + stop) // 2
    for pattern in _WORD_ENDS:
        # One character more than the range: it has to be seen what follows a word.
        match = pattern.match(text, middle, stop + 1)
        if match:
            return match.end()
    return stop


def pieces(blocks: Iterable[str], length: int) -> Iterator[str]:
    """The text that the blocks are, in pieces of at most `length` characters.

    They end with a word where they can.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > length:
            end = word_end(rest, start, start + length)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def tokens_behind(context: list[int], both: list[int]) -> list[int] | None:
    """Of the tokens of a context and a piece together those of the piece.

    None where a token spans the two. So a piece's tokens are those that it has within its text,
    whatever a tokenizer does where a text begins.
    """
    return both[len(context) :] if both[: len(context)] == context else None


def encode_in_pieces(text: str, encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """The tokens of a text, piece by piece: what `encode` takes does not grow with the text."""
    before = ""
    for piece in pieces([text], PIECE):
        own = tokens_behind(encode(before), encode(before + piece)) if before else None
        yield encode(piece) if own is None else own
        before = piece[-CONTEXT:]
