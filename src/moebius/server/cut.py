"""truncate_prompt_tokens: a text that is too long is cut at one of its ends."""

from collections.abc import Sequence
from typing import Literal

from moebius.errors import ContextLengthError, RequestError
from moebius.text import Tokenizer

Side = Literal["left", "right"]
# A text may have so many times the tokens of the context: what is cut off is tokenised, too.
_MOST_CUT = 4


def cut_length(asked: int, max_tokens: int, context: int) -> int:
    """How many tokens `truncate_prompt_tokens` leaves; -1 leaves what max_tokens leave room for.

    RequestError for what is no such number.
    """
    if asked == -1:
        return max(1, context - max_tokens)
    if not 1 <= asked <= context:
        raise RequestError(
            f"truncate_prompt_tokens is {asked}; it must be -1, or from 1 to the model's maximum "
            f"context length, {context}",
            param="truncate_prompt_tokens",
        )
    return asked


def cut_ids(ids: Sequence[int], length: int, side: Side) -> list[int]:
    """At most `length` of the ids: the last ones, or the first ones where `side` is "right"."""
    return list(ids[:length] if side == "right" else ids[max(0, len(ids) - length) :])


def cut_text(
    tokenizer: Tokenizer,
    text: str,
    length: int,
    side: Side,
    *,
    add_special_tokens: bool,
    context: int,
) -> list[int]:
    """At most `length` ids of a text; those that begin any text (BOS) are among them."""
    try:
        ids = tokenizer.encode(text, False, at_most=_MOST_CUT * context)
    except ContextLengthError as error:
        raise ContextLengthError(
            f"This model's maximum context length is {context} tokens. However, your prompt has "
            f"over {_MOST_CUT * context}: that many are not cut",
            param=error.param,
        ) from error
    whole = tokenizer.framed(ids) if add_special_tokens else ids
    around = len(whole) - len(ids)
    kept = cut_ids(ids, max(0, length - around), side)
    return tokenizer.framed(kept)[:length] if add_special_tokens else kept
