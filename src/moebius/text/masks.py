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
                f"the grammar cannot be compiled: {first_line(matcher.get_error())}"
            )
        return matcher


def _ll_tokenizer(tokenizer: Tokenizer, width: int, ends: list[int]) -> LLTokenizer:
    """llguidance reads byte-level and byte-fallback tokenizers itself, and gets others' bytes."""
    if tokenizer.vocab_size <= width:
        try:
            found = LLTokenizer(tokenizer.text, n_vocab=width, eos_token=ends)
        except ValueError:
            found = None
        if found is not None and _goes_on(found):
            return found
    wrapper = TokenizerWrapper(cast(Any, _TokenBytes(tokenizer, width, ends)))
    return LLTokenizer(wrapper, n_vocab=width, eos_token=ends)


def _goes_on(tokenizer: LLTokenizer) -> bool:
    """Whether it makes of the middle of a text that very text: what a grammar forces is encoded so.

    Some put a blank before whatever they encode.
    """
    return all(
        tokenizer.decode_bytes(tokenizer.tokenize_str(text)) == text.encode()
        for text in ("nder", ' "', "}")
    )


class _TokenBytes:
    """A tokenizer as llguidance asks one for: the attributes' names are its own.

    It encodes by the longest token that fits, which is not always as the model's tokenizer would:
    that one may add to a text's beginning.
    """

    def __init__(self, tokenizer: Tokenizer, width: int, ends: Sequence[int]) -> None:
        known = range(min(tokenizer.vocab_size, width))
        self.eos_token_id = ends[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in known]
        self.special_token_ids = [token for token in tokenizer.special_ids if token in known]
        plain = set(known).difference(self.special_token_ids)
        self._ids = {self.tokens[token]: token for token in sorted(plain, reverse=True)}
        self._longest = max(map(len, self.tokens), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        rest = text.encode() if isinstance(text, str) else text
        found: list[int] = []
        while rest:
            sizes = range(min(self._longest, len(rest)), 0, -1)
            size = next((size for size in sizes if rest[:size] in self._ids), 0)
            if size:
                found.append(self._ids[rest[:size]])
            rest = rest[size or 1 :]
        return found
