"""Grammars over a vocabulary: llguidance's tokenizer and matcher of a model's own tokenizer."""

from collections.abc import Collection, Sequence
from typing import Any, cast

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from moebius.errors import ConstraintError
from moebius.text.grammar import first_line, parser_limits
from moebius.text.tokenizer import Tokenizer


class Vocabulary:
    """What a grammar's matcher knows of a model's tokens. Making it takes seconds for a large one.

    width     of the logits: ids beyond the tokenizer's are never allowed
    end_ids   the model's; those that its tokenizer has end a text in every grammar
    """

    def __init__(self, tokenizer: Tokenizer, width: int, end_ids: Collection[int]) -> None:
        own = min(tokenizer.vocab_size, width)
        self.end_ids = tuple(sorted(token for token in end_ids if 0 <= token < own))
        # llguidance wants one. Whoever asks for a mask leaves it out: see `ends`.
        self.ends = self.end_ids or (own - 1,)
        self._tokenizer = _ll_tokenizer(tokenizer, width, list(self.ends))

    def matcher(self, text: str) -> LLMatcher:
        """Of a grammar's text, at its beginning. ConstraintError where it cannot be compiled."""
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise ConstraintError(
                f"the grammar cannot be compiled: {first_line(matcher.get_error())}",
                param="structured_outputs",
            )
        return matcher


def _ll_tokenizer(tokenizer: Tokenizer, width: int, ends: list[int]) -> LLTokenizer:
    """llguidance reads byte-level and byte-fallback tokenizers itself, and gets others' bytes."""
    if tokenizer.vocab_size <= width:
        try:
            return LLTokenizer(tokenizer.text, n_vocab=width, eos_token=ends)
        except ValueError:
            pass
    wrapper = TokenizerWrapper(cast(Any, _TokenBytes(tokenizer, width, ends)))
    return LLTokenizer(wrapper, n_vocab=width, eos_token=ends)


class _TokenBytes:
    """A tokenizer as llguidance asks one for: the attributes' names are its own."""

    def __init__(self, tokenizer: Tokenizer, width: int, ends: Sequence[int]) -> None:
        self._encode = tokenizer
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_id
        known = range(min(tokenizer.vocab_size, width))
        self.tokens = [tokenizer.token_bytes(token) for token in known]
        self.special_token_ids = [token for token in tokenizer.special_ids if token in known]

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._encode.encode_ordinary(text)
