"""Drafts: tokens that a decoding request may go on with, guessed from its own tokens alone.

A step computes a request's last token and its drafts behind it, and draws from each of these rows
as it would have drawn a step later. A draft is right where the row before it draws the very same
token. So what is drawn does not depend on drafts, which change speed alone and may be guessed in
any way: here by prompt lookup (Saxena, 2023; an n-gram that was there before goes on as it did).

Drafts get what is left of a step once all else is served: of its token budget, of its rows with
logits, and of blocks that can be had. Nobody is preempted for them. What was wrong leaves no trace:
its blocks are given back when the step is over, and were never offered to the prefix cache.

A recurrent state cannot be taken back to the last right draft, so models with states have none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Protocol

from moebius.request.finish import FinishReason
from moebius.request.params import MOST_DRAFTS
from moebius.schedule.blocks import BlockPool
from moebius.schedule.config import SchedulerConfig
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Chunk, Scheduler, StepPlan, UnfinishedPlan

_NGRAM = 3
_REACH = 32_768
"""So many last tokens are looked through, in some 30 microseconds; twice as many are kept."""
_FIRST_SHARE = 0.3
"""Too few right guesses for drafts to pay: a request shows first that it repeats itself."""
_MEMORY = 0.85
_MOST_RESTS = 4
"""A look that found nothing is followed by so many steps without one at most: what was new is
still there."""


class StepCosts:
    """What a step of so many rows takes, in any unit.

    measured   (rows, cost), fewest rows first, of 1 row among them. What lies between two is
               interpolated. Beyond the last, rows cost what those before did on average: there
               drafts never pay.
    """

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        self.measured = tuple(measured)
        costs = [0.0, self.measured[0][1]]
        for (low, low_cost), (high, high_cost) in pairwise(self.measured):
            slope = (high_cost - low_cost) / (high - low)
            costs += [low_cost + slope * more for more in range(1, high - low + 1)]
        self._costs = costs

    def of(self, rows: int) -> float:
        last = len(self._costs) - 1
        return self._costs[rows] if rows <= last else self._costs[last] * rows / last


def worthwhile(share: float, useful: float, rows: int, most: int, costs: StepCosts) -> int:
    """How many drafts of a request, up to `most`, bring a step most useful rows for its time; 0
    where none pays.

    share: how likely a draft is right behind right ones; k drafts bring share + ... + share ** k.
    useful: of the `rows` that the step has without them, as many as are expected to be right.
    """
    best = 0
    best_speed = useful / costs.of(rows)
    for drafts in range(1, most + 1):
        useful += share**drafts
        speed = useful / costs.of(rows + drafts)
        if speed > best_speed:
            best = drafts
            best_speed = speed
    return best


def least_share(rows: int, costs: StepCosts) -> float:
    """A share below which no draft pays beside `rows` rows, near the largest; 2 where none does."""

    def pays(share: float) -> bool:
        return worthwhile(share, float(rows), rows, MOST_DRAFTS, costs) > 0

    if not pays(1.0):
        return 2.0
    low = 0.0
    high = 1.0
    for _ in range(6):
        middle = (low + high) / 2
        if pays(middle):
            high = middle
        else:
            low = middle
    return low


class Guesser(Protocol):
    """One request's guesses, and how good they are."""

    @property
    def share(self) -> float:
        """How likely a guess is right that follows right ones."""

    @property
    def rest(self) -> int:
        """For how many steps it is not to be asked, after it had no guess."""

    def guess(self, request: Request, most: int) -> Sequence[int]:
        """Up to `most` tokens that may follow all that the request has."""


class Lookup:
    """What followed the last tokens where they stood last.

    Guesses cost next to nothing, and what is drawn shows whether they were right, be they verified
    or not. So `share` is of all guesses, and nothing has to be tried out. `rest` grows with each
    look in a row that found nothing.

    Tokens are looked for as the characters of a text, because that is what Python searches fastest.
    """

    def __init__(self) -> None:
        self.share = _FIRST_SHARE
        self.rest = 0
        self._text = ""
        self._end = 0
        self._guess: Sequence[int] = ()

    def guess(self, request: Request, most: int) -> Sequence[int]:
        end = request.num_tokens
        new = request.tokens(max(self._end, end - _REACH), end)
        if self._guess:
            self._judge(new)
        text = self._text + "".join(map(chr, new))
        if len(text) > 2 * _REACH:
            text = text[-_REACH:]
        self._text = text
        self._end = end
        at = text.rfind(text[-_NGRAM:], 0, -1) if len(text) > _NGRAM else -1
        if at < 0:
            self.rest = min(self.rest + 1, _MOST_RESTS)
            self._guess = ()
        else:
            self.rest = 0
            # What would follow the last token follows what was guessed: a loop goes on.
            following = cycle(text[at + _NGRAM : at + _NGRAM + most])
            self._guess = [ord(token) for token in islice(following, most)]
        return self._guess

    def _judge(self, drawn: Sequence[int]) -> None:
        """Learn from the tokens that came since whether the guess was right."""
        for guess, token in zip(self._guess, drawn, strict=False):
            self.share = _MEMORY * self.share + (1 - _MEMORY) * (guess == token)
            if guess != token:
                break


@dataclass(slots=True)
class _Load:
    """What a step has so far.

    rows     all of them, drafts too
    useful   as many of these as are expected to be right
    logits   how many more may have logits
    """

    rows: int
    useful: float
    logits: int


class DraftingScheduler(Scheduler):
    """A scheduler that adds drafts to the chunks of requests that decode.

    costs       of this model's steps
    most_rows   rows whose logits a step may have
    guesser     makes what guesses for one request
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        costs: StepCosts,
        most_rows: int,
        guesser: Callable[[], Guesser] = Lookup,
    ) -> None:
        super().__init__(config, pool)
        assert pool.states is None, "a state cannot be taken back to the last right draft"
        self.costs = costs
        self.most_rows = most_rows
        self.drafted: dict[str, tuple[int, ...]] = {}
        """What the step that is under way verifies, by request."""
        self._guesser = guesser
        self._guessers: dict[str, Guesser] = {}
        self._resting: dict[str, int] = {}
        """Requests whose guesser is not asked before a step of this number."""
        self._least: dict[int, float] = {}

    def following(self, plan: StepPlan) -> tuple[Chunk, ...]:
        """Nothing where the next plan may have drafts, which begin with the token that is drawn."""
        asked_at = self._step + 1
        rests = all(self._resting.get(c.request_id, 0) > asked_at for c in plan.chunks)
        if not rests and self._least_share(len(plan.chunks)) <= 1.0:
            return ()
        return super().following(plan)

    def rollback(self, plan: StepPlan) -> None:
        self.drafted.clear()
        super().rollback(plan)

    def _serve_waiting(self, step: UnfinishedPlan) -> None:
        super()._serve_waiting(step)
        self._add_drafts(step)

    def _add_drafts(self, step: UnfinishedPlan) -> None:
        """Have requests that decode verify drafts, in the order of service, while it pays."""
        self.drafted.clear()
        rows = self.config.max_num_batched_tokens - step.budget
        least = self._least_share(rows) if rows else 2.0
        if least > 1.0:
            return
        # As a rule nothing repeats, and nearly all rest: then this is what drafting costs.
        now = self._step
        until = self._resting.get
        asked = [
            chunk
            for chunk in step.chunks.values()
            if chunk.num_tokens == 1 and chunk.samples and until(chunk.request_id, now) <= now
        ]
        if not asked:
            return
        logits = self.most_rows - sum(chunk.samples for chunk in step.chunks.values())
        load = _Load(rows, float(rows), logits)
        for chunk in asked:
            guesser = self._guesser_of(chunk.request_id)
            guessed = guesser.guess(self._requests[chunk.request_id], MOST_DRAFTS)
            if not guessed:
                self._resting[chunk.request_id] = now + guesser.rest + 1
            elif guesser.share >= least:
                self._verify(chunk, guessed, guesser.share, step, load)

    def _guesser_of(self, request_id: str) -> Guesser:
        guesser = self._guessers.get(request_id)
        if guesser is None:
            guesser = self._guessers[request_id] = self._guesser()
        return guesser

    def _least_share(self, rows: int) -> float:
        """Below which no draft pays in a step of so many rows; beyond 1 where even right ones do
        not. As a rule it is known."""
        known = self._least.get(rows)
        if known is None:
            known = self._least[rows] = least_share(rows, self.costs)
        return known

    def _verify(
        self, chunk: Chunk, guessed: Sequence[int], share: float, step: UnfinishedPlan, load: _Load
    ) -> None:
        """Add as many of the guesses to a chunk as pay and as there is room for."""
        request = self._requests[chunk.request_id]
        # Behind the last right draft one more token is drawn.
        left = request.max_tokens - len(request.output_ids) - 1
        left = min(left, self.max_model_len - request.num_tokens - 1, len(guessed))
        most = max(min(left, step.budget, load.logits, self._room(request)), 0)
        count = worthwhile(share, load.useful, load.rows, most, self.costs)
        if count and self.pool.extend(request, chunk.end + count):
            drafts = self.drafted[request.id] = tuple(guessed[:count])
            step.chunks[request.id] = chunk._replace(tables=request.tables, drafts=drafts)
            step.budget -= count
            load.logits -= count
            load.rows += count
            load.useful += sum(share**place for place in range(1, count + 1))

    def _room(self, request: Request) -> int:
        """How many more tokens its blocks would hold, with all that can be had."""
        blocks = len(request.tables[0]) + self.pool.num_free // len(request.tables)
        return blocks * self.pool.block_size - request.num_tokens

    def _append(self, request: Request, drawn: Iterable[int]) -> FinishReason | None:
        drafts = self.drafted.pop(request.id, ())
        if not drafts:
            return super()._append(request, drawn)
        length = len(request.output_ids)
        reason = super()._append(request, drawn)
        # The last token drawn is still to be computed, even where it is the next draft.
        request.num_computed_tokens += _num_alike(drafts, request.output_ids[length:-1])
        self.pool.trim(request, request.num_computed_tokens)
        self.pool.publish(request, request.num_computed_tokens)
        return reason

    def _finish(self, request: Request, reason: FinishReason) -> Request:
        self._guessers.pop(request.id, None)
        self._resting.pop(request.id, None)
        return super()._finish(request, reason)


def _num_alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of their first entries are the same."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
