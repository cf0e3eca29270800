"""Constraint: what a request's tokens are held to, as plain data that crosses to an engine.

Each part is a function of the tokens drawn so far and of nothing else, so that an answer is the
same after a preemption, on another engine, and in any batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from moebius.errors import RequestError, check_integer
from moebius.request.params import LIMITS, check_tokens

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer is to be written in.

    text     in the form that llguidance reads
    after    it begins behind the first of these sequences of token ids to be drawn, which end the
             model's reasoning; empty: with the first token
    openers  ids that the first token may be in place of the grammar's own, and which begin the
             reasoning; empty: it has begun, if there is an `after`
    banned   ids that may not be drawn before the grammar has begun, beside those that end a text
    """

    text: str
    after: tuple[TokenIds, ...] = ()
    openers: TokenIds = ()
    banned: TokenIds = ()


@dataclass(frozen=True, slots=True)
class ReasoningBudget:
    """The most tokens of one block of reasoning; behind so many its end is drawn, id by id.

    start    what begins a block of reasoning
    end      what ends it
    forced   what is drawn at the budget: `end`, or more words that end in it; empty: `end`
    begun    the prompt has begun a block
    """

    tokens: int
    start: TokenIds
    end: TokenIds
    forced: TokenIds = ()
    begun: bool = False

    @property
    def closing(self) -> TokenIds:
        """What is drawn at the budget."""
        return self.forced or self.end


@dataclass(frozen=True, slots=True)
class Constraint:
    """What may be drawn, beside what SamplingParams says.

    bad_words   sequences of token ids of which none is completed
    """

    grammar: Grammar | None = None
    bad_words: tuple[TokenIds, ...] = ()
    budget: ReasoningBudget | None = None

    def check(self, vocab_size: int) -> None:
        """RequestError where it is more than an engine takes, or names what is no token id."""
        if self.grammar is not None:
            _check_grammar(self.grammar, vocab_size)
        if len(self.bad_words) > LIMITS.bad_sequences:
            raise RequestError(
                f"bad_words are {len(self.bad_words)} sequences of tokens; at most "
                f"{LIMITS.bad_sequences}",
                param="bad_words",
            )
        _check_sequences(self.bad_words, vocab_size, "bad_words")
        if self.budget is not None:
            _check_budget(self.budget, vocab_size)


def _check_grammar(grammar: Grammar, vocab_size: int) -> None:
    size = len(grammar.text.encode("utf-8", "surrogatepass"))
    if not 0 < size <= LIMITS.grammar_bytes:
        raise RequestError(
            f"the grammar has {size} bytes; it must have 1 to {LIMITS.grammar_bytes}",
            param="structured_outputs",
        )
    _check_sequences(grammar.after, vocab_size, "structured_outputs")
    check_tokens((*grammar.openers, *grammar.banned), vocab_size, "structured_outputs")


def _check_budget(budget: ReasoningBudget, vocab_size: int) -> None:
    name = "thinking_token_budget"
    check_integer(name, budget.tokens, 0, 2**31 - 1)
    check_tokens(budget.start, vocab_size, name)
    _check_sequences((budget.end, budget.closing), vocab_size, name)
    if budget.closing[-len(budget.end) :] != budget.end:
        raise RequestError(f"{name}: what is forced does not end the reasoning", param=name)


def _check_sequences(sequences: Sequence[TokenIds], vocab_size: int, param: str) -> None:
    for ids in sequences:
        if not 0 < len(ids) <= LIMITS.sequence_tokens:
            raise RequestError(
                f"{param}: a sequence has {len(ids)} tokens; it must have 1 to "
                f"{LIMITS.sequence_tokens}",
                param=param,
            )
    check_tokens(tuple(chain.from_iterable(sequences)), vocab_size, param)


class Finder:
    """Looks for the first of some sequences in tokens that are appended to."""

    def __init__(self, sequences: Sequence[TokenIds], start: int = 0) -> None:
        self._sequences = sequences
        self._start = start
        self._seen = start

    def end_in(self, output_ids: Sequence[int]) -> int | None:
        """Where the first one ends, which lies behind `start` as a whole; None: nowhere so far.

        Each call looks at the tokens that came since the one before.
        """
        while self._seen < len(output_ids):
            self._seen += 1
            for ids in self._sequences:
                begin = self._seen - len(ids)
                if begin >= self._start and tuple(output_ids[begin : self._seen]) == ids:
                    return self._seen
        return None


class BudgetWatch:
    """Which id a budget forces next, of tokens that are appended to."""

    def __init__(self, budget: ReasoningBudget) -> None:
        self._budget = budget
        self._opened_at: int | None = 0 if budget.begun else None
        self._finder = Finder((budget.end,) if budget.begun else (budget.start,))

    def forced(self, output_ids: Sequence[int]) -> int | None:
        """The one id that may be drawn behind these tokens; None where any may."""
        budget = self._budget
        while budget.start or self._opened_at is not None:
            at = self._finder.end_in(output_ids)
            if at is None:
                break
            self._opened_at = at if self._opened_at is None else None
            wanted = budget.start if self._opened_at is None else budget.end
            self._finder = Finder((wanted,), at)
        if self._opened_at is None:
            return None
        beyond = len(output_ids) - self._opened_at - budget.tokens
        return budget.closing[beyond] if 0 <= beyond < len(budget.closing) else None


def completing(bad_words: Sequence[TokenIds], output_ids: Sequence[int]) -> Iterator[int]:
    """The ids that would complete one of the sequences behind these tokens."""
    for ids in bad_words:
        before = len(ids) - 1
        if before <= len(output_ids) and (not before or tuple(output_ids[-before:]) == ids[:-1]):
            yield ids[-1]
