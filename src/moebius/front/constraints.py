"""From sampling parameters to what an engine is told of them: texts become ids and grammars."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from moebius.errors import ConstraintError, MoebiusError, RequestError
from moebius.request.constraint import Constraint, Grammar, ReasoningBudget
from moebius.request.params import SamplingParams
from moebius.request.structured import StructuredOutput
from moebius.text import EncodedPrompt, Expected, ReplyFormat, Tokenizer
from moebius.text.grammar import checked_grammar
from moebius.text.replies import ReasoningEnds

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReplyRules:
    """What a reply to a chat is held to beside its parameters.

    ends     where its reasoning ends; None: it has none, or none that tokens tell
    calls    tokens that begin a tool call: no reply may, while its reasoning lasts, where its
             answer is to be in a grammar
    banned   tokens that it may never have
    budget   most tokens of its reasoning
    """

    ends: ReasoningEnds | None = None
    calls: TokenIds = ()
    banned: TokenIds = ()
    budget: int | None = None

    @classmethod
    def of(cls, replies: ReplyFormat, prompt: EncodedPrompt, expected: Expected) -> Self:
        """Of the reply to this prompt."""
        starters = replies.starter_ids
        return cls(
            replies.reasoning_ends(prompt),
            calls=starters,
            banned=starters if expected.silent else (),
            budget=expected.budget,
        )

    def grammar(self, wanted: StructuredOutput) -> Grammar:
        """That of the answer, which begins where the reasoning ends, or of all the reply."""
        ends = self.ends
        checked = checked_grammar(wanted)
        if not wanted.whole:
            behind = ends is not None and ends.state != "over"
            return self._behind_reasoning(Grammar(checked.text(behind_reasoning=behind)))
        if ends is not None and ends.state != "ahead":
            raise RequestError(
                "tools whose calls are held to a grammar are not supported where the prompt has "
                "begun the reply's message; leave out continue_final_message",
                param="continue_final_message",
            )
        return Grammar(checked.text())

    def _behind_reasoning(self, grammar: Grammar) -> Grammar:
        ends = self.ends
        if ends is None or ends.state == "over":
            return grammar
        opener = () if ends.headed or ends.begun else ends.start[:1]
        return Grammar(grammar.text, ends.answers, opener, self.calls)

    def reasoning_budget(self) -> ReasoningBudget | None:
        """RequestError where nothing could end the reasoning at it."""
        if self.budget is None:
            return None
        ends = self.ends
        if ends is None:
            raise RequestError(
                "thinking_token_budget needs a model whose reasoning is between tokens of its "
                "vocabulary, and this one has no such; leave it out",
                param="thinking_token_budget",
            )
        return ReasoningBudget(self.budget, ends.start, ends.end, ends.forced, ends.begun)


def constraint_of(
    params: SamplingParams, tokenizer: Tokenizer, rules: ReplyRules | None = None
) -> Constraint | None:
    """What these parameters hold a request's tokens to; None: to nothing.

    rules: what a reply is held to beside; None: this is none. RequestError for a grammar that
    cannot be compiled.
    """
    rules = rules or ReplyRules()
    grammar = None
    if params.structured is not None:
        grammar = rules.grammar(params.structured)
    words = dict.fromkeys(
        ids for word in params.bad_words for ids in _spellings(word, tokenizer) if ids
    )
    words |= dict.fromkeys((token,) for token in rules.banned)
    budget = rules.reasoning_budget()
    if grammar is None and not words and budget is None:
        return None
    return Constraint(grammar, tuple(words), budget)


def named(error: MoebiusError, params: SamplingParams) -> MoebiusError:
    """An engine's error, about what these parameters hold a request's tokens to: it names the field
    in which that came, which the engine does not know."""
    if not isinstance(error, ConstraintError) or error.param is not None:
        return error
    if params.structured is not None:
        param = params.structured.param
    elif params.bad_words:
        param = "bad_words"
    else:
        return error
    return ConstraintError(f"{param}: {error}", param=param, code=error.code)


def _spellings(word: str, tokenizer: Tokenizer) -> Iterator[TokenIds]:
    """A word's tokens where it begins a text, and behind a blank."""
    bare = word.lstrip(" ")
    yield tuple(tokenizer.encode(word, add_special_tokens=False))
    if bare:
        yield tuple(tokenizer.encode(bare, add_special_tokens=False))
        yield tuple(tokenizer.encode(f" {bare}", add_special_tokens=False))
