"""From sampling parameters to what an engine is told of them: texts become ids and grammars."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from moebius.request.constraint import Constraint, Grammar
from moebius.request.params import SamplingParams
from moebius.text import EncodedPrompt, Tokenizer
from moebius.text.grammar import checked_grammar

TokenIds = tuple[int, ...]

_MARKS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
# What a reply to a prompt begins with is looked for in so many of its last tokens.
_TAIL = 32
_CALL_MARKS = ("<tool_call>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "[TOOL_CALLS]")
_FINAL_HEADS = (
    "<|channel|>final<|message|>",
    "<|channel|>final <|constrain|>json<|message|>",
    "<|channel|>final<|constrain|>json<|message|>",
)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What a model says to itself before its answer, as token ids.

    ends     the sequences that end it, any of them
    openers  those that begin it where the prompt has not
    banned   what would end it without an answer
    """

    ends: tuple[TokenIds, ...]
    openers: TokenIds = ()
    banned: TokenIds = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompt: EncodedPrompt) -> Self | None:
        """Of the reply to this prompt; None where it is an answer from its first token on."""
        calls = [tokenizer.added_id(mark) for mark in _CALL_MARKS]
        banned = tuple(token for token in calls if token is not None)
        if tokenizer.replies.tools == "harmony":
            heads = (tokenizer.encode(head, add_special_tokens=False) for head in _FINAL_HEADS)
            return cls(tuple(map(tuple, heads)), banned=banned)
        tail = prompt.ids[-_TAIL:]
        if prompt.generation_start is not None:
            tail = prompt.ids[max(prompt.generation_start, len(prompt.ids) - _TAIL) :]
        for start, end in _MARKS:
            opener = tokenizer.added_id(start)
            closer = tokenizer.added_id(end)
            if opener is None or closer is None or not tokenizer.template_mentions(end):
                continue
            last = next((token for token in reversed(tail) if token in (opener, closer)), None)
            if last == closer:
                return None
            return cls(((closer,),), () if last == opener else (opener,), banned)
        return None


def constraint_of(
    params: SamplingParams, tokenizer: Tokenizer, reasoning: Reasoning | None = None
) -> Constraint | None:
    """What these parameters hold a request's tokens to; None: to nothing.

    reasoning: what comes before the answer. RequestError for a grammar that cannot be compiled.
    """
    grammar = None
    if params.structured is not None:
        checked = checked_grammar(params.structured)
        grammar = Grammar(checked.text(behind_reasoning=reasoning is not None))
        if reasoning is not None:
            grammar = Grammar(grammar.text, reasoning.ends, reasoning.openers, reasoning.banned)
    words = dict.fromkeys(
        ids for word in params.bad_words for ids in _spellings(word, tokenizer) if ids
    )
    if grammar is None and not words:
        return None
    return Constraint(grammar, tuple(words))


def _spellings(word: str, tokenizer: Tokenizer) -> Iterator[TokenIds]:
    """A word's tokens where it begins a text, and behind a blank."""
    bare = word.lstrip(" ")
    yield tuple(tokenizer.encode(word, add_special_tokens=False))
    if bare:
        yield tuple(tokenizer.encode(bare, add_special_tokens=False))
        yield tuple(tokenizer.encode(f" {bare}", add_special_tokens=False))
