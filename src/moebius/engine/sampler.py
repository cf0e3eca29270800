"""Logits to tokens. A draw depends on (logits, sampling parameters, seed, absolute position) and on
nothing else.

Order: logit_bias, penalties, bans, temperature, top_k, top_p, min_p. Ties go to the lowest id
everywhere. Log-probabilities are the model's own log-softmax, before any of these.

Rows come in kinds, and each kind is one call to the backend, which reads and computes what that
kind needs:
    greedy            the most likely id
    whole vocabulary  a draw from all ids
    candidates        a draw from what top_k, top_p and min_p leave of the most likely ids
A row of any kind may be shaped before: logit_bias, penalties and bans (min_tokens', a grammar's)
change its logits while it draws. What touches logits is the backend's (ops/sampling.py). A device
that works by itself is waited for where its tokens are read (`Drawing`), and not before.

Legend: L rows of logits, V vocabulary, R rows that are asked about.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moebius.engine.client import TokenLogprob
from moebius.engine.devices import is_lost
from moebius.engine.faults import failure, say
from moebius.engine.logprobs import begin_logprobs
from moebius.engine.restriction import Restriction
from moebius.engine.step_memory import SAMPLED_IDS
from moebius.errors import ConstraintError, MoebiusError, NumericalError, frames
from moebius.ops import Shaping
from moebius.ops.draws import Draw
from moebius.ops.sampling import ALL_BANNED, NOT_FINITE, UNDECIDED, SamplerOps
from moebius.ops.transfer import fetch, send_numbers
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request

log = logging.getLogger(__name__)

# Below, every difference of float32 logits is beyond exp's range: greedy, but for exact ties.
_COLDEST = 1e-20
# Below, ids that were there before are beyond exp's range from all others. A float32 still holds
# their logits.
_LEAST_REPETITION = 1e-20
_FREE = Restriction()
_GREEDY = Draw(temperature=0.0, uniform=0.0)


class Sampled(NamedTuple):
    """A row's token, and its log-probabilities if they were asked for; complete: the request's
    grammar takes nothing behind it."""

    token_id: int
    logprob: TokenLogprob | None = None
    complete: bool = False


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) keyed by (seed, position): the generator has no state that a batch could
    disturb."""
    data = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    bits = int.from_bytes(blake2b(data, digest_size=8, person=b"moebius-draw").digest(), "little")
    return ((bits >> 11) + 0.5) * 2.0**-53


def sample(
    logits_LV: Tensor,
    requests: Sequence[Request],
    ops: SamplerOps,
    restrictions: Sequence[Restriction | None] | None = None,
) -> list[Sampled | MoebiusError]:
    """One token a row; row i belongs to requests[i], and is held to restrictions[i].

    logits_LV: (L, V) float32, contiguous; changed while it draws, and afterwards as it was. A row
    that cannot be drawn from gets its error in place of a token: NumericalError for a NaN or an
    infinity, EngineError for what nobody foresaw.
    """
    held = restrictions or [None] * len(requests)
    try:
        return _sample(logits_LV, requests, held, ops)
    except Exception as error:
        if is_lost(error):
            raise
        say(
            log.warning,
            "sampling failed for %d requests; each is tried alone: %s",
            len(requests),
            frames(error),
        )
        return [
            _sample_alone(logits_LV[row : row + 1], request, restriction, ops)
            for row, (request, restriction) in enumerate(zip(requests, held, strict=True))
        ]


def draw_of(request: Request, ops: SamplerOps, position: int) -> Draw:
    """How a request's token at `position` is drawn."""
    params = request.params
    if params.greedy:
        return _GREEDY
    nucleus = params.top_p < 1.0 or params.min_p > 0.0
    return Draw(
        temperature=max(params.temperature, _COLDEST),
        uniform=uniform(request.asked.seed, position),
        width=params.top_k if params.top_k > 0 else ops.first_look if nucleus else 0,
        whole=params.top_k > 0,
        top_p=params.top_p,
        min_p=params.min_p,
    )


def needs_host(request: Request) -> bool:
    """Whether the host has to read a request's last token before its next one can be drawn, as that
    is held to what the host finds out. Else a device can draw by itself."""
    constraint = request.asked.constraint
    if constraint is not None:
        held = constraint.grammar is not None or constraint.budget is not None
        if held or any(len(ids) > 1 for ids in constraint.bad_words):
            return True
    return bool(request.params.allowed_token_ids)


def begin(
    logits_LV: Tensor,
    requests: Sequence[Request],
    positions: Sequence[int],
    ops: SamplerOps,
    newest_L: Tensor | None = None,
) -> "Drawing":
    """Begin to draw a token a row; row i's stands at positions[i] of requests[i], which does not
    need the host.

    newest_L: (L,) int64, beside the logits: the tokens before these, where the device alone knows
    them; None: the requests have them.
    """
    rows = [
        _Row.of(index, request, _bans(request), ops, position)
        for index, (request, position) in enumerate(zip(requests, positions, strict=True))
    ]
    return Drawing(logits_LV, rows, ops, newest_L)


def _sample_alone(
    logits_1V: Tensor, request: Request, restriction: Restriction | None, ops: SamplerOps
) -> Sampled | MoebiusError:
    try:
        return _sample(logits_1V, [request], [restriction], ops)[0]
    except Exception as error:
        if is_lost(error):
            raise
        return failure("drawing a token", error)


def _sample(
    logits_LV: Tensor,
    requests: Sequence[Request],
    restrictions: Sequence[Restriction | None],
    ops: SamplerOps,
) -> list[Sampled | MoebiusError]:
    if all(request.params.plain for request in requests) and not any(restrictions):
        return [Sampled(token) if token >= 0 else not_finite() for token in ops.argmax(logits_LV)]
    rows = [
        _Row.of(index, request, restriction or _FREE, ops, request.num_tokens)
        for index, (request, restriction) in enumerate(zip(requests, restrictions, strict=True))
    ]
    undecided = rows
    while undecided:
        Drawing(logits_LV, undecided, ops).wait()
        undecided = [row for row in undecided if row.token_id == UNDECIDED]
        for row in undecided:
            row.draw = row.draw._replace(width=8 * row.draw.width)
    return [row.outcome for row in rows]


class Drawing:
    """Tokens of some rows, and log-probabilities, which the device has or will have.

    ids_R: (R,) int64 beside the logits, what `SamplerOps.choose` gives.
    """

    def __init__(
        self,
        logits_LV: Tensor,
        rows: Sequence["_Row"],
        ops: SamplerOps,
        newest_L: Tensor | None = None,
    ) -> None:
        self._rows = rows
        self.ids_R = _chosen(logits_LV, rows, ops, newest_L)
        self._ids = fetch(self.ids_R)
        self._scored = [place for place, row in enumerate(rows) if row.params.logprobs is not None]
        if self._scored:
            asked = [rows[place] for place in self._scored]
            drawn_R = self.ids_R.clamp(min=0)
            if len(asked) < len(rows):
                drawn_R = drawn_R[send_numbers(self._scored, torch.int64, drawn_R.device)]
            tops = [row.params.logprobs or 0 for row in asked]
            self._logprobs = begin_logprobs(logits_LV, _indices(asked), drawn_R, tops, ops)

    def wait(self) -> None:
        """Give each row what it drew."""
        (ids_R,) = self._ids()
        for row, token_id in zip(self._rows, ids_R.tolist(), strict=True):
            row.token_id = token_id
        if self._scored:
            for place, logprob in zip(self._scored, self._logprobs(), strict=True):
                self._rows[place].take(logprob)

    @cached_property
    def outcomes(self) -> list[Sampled | MoebiusError | None]:
        """What each row brought; None where its draw needs more candidates: `sample` makes it."""
        self.wait()
        return [None if row.token_id == UNDECIDED else row.outcome for row in self._rows]


def _chosen(
    logits_LV: Tensor, rows: Sequence["_Row"], ops: SamplerOps, newest_L: Tensor | None
) -> Tensor:
    """What each row draws, shaped as it is to be; newest_L as in `begin`."""
    found: list[Tensor] = []
    for part in _parts(rows, logits_LV.shape[-1]):
        with _shaped(logits_LV, part, ops, newest_L):
            found.append(ops.choose(logits_LV, _indices(part), [row.draw for row in part]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _shaped(
    logits_LV: Tensor, rows: Sequence["_Row"], ops: SamplerOps, newest_L: Tensor | None
) -> AbstractContextManager[None]:
    indices = [row.index for row in rows if row.shaping is not None]
    shapings = [row.shaping for row in rows if row.shaping is not None]
    if not shapings:
        return nullcontext()
    newest_R = None
    if newest_L is not None:
        newest_R = newest_L[send_numbers(indices, torch.int64, newest_L.device)]
    return ops.shaped(logits_LV, indices, shapings, newest_R)


@dataclass(slots=True)
class _Row:
    """One row on its way to a token.

    index     its place in logits_LV
    shaping   what its request asks for before temperature, if anything
    draw      how its token is drawn
    token_id  what it drew, or what stands for none (ops/sampling.py)
    """

    index: int
    request: Request
    shaping: Shaping | None
    draw: Draw
    token_id: int = NOT_FINITE
    logprob: TokenLogprob | None = None

    @classmethod
    def of(
        cls,
        index: int,
        request: Request,
        restriction: Restriction,
        ops: SamplerOps,
        position: int,
    ) -> Self:
        """Of a request's token at `position`."""
        shaping = _shaping(request, restriction, position)
        return cls(index, request, shaping, draw_of(request, ops, position))

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    def take(self, logprob: TokenLogprob) -> None:
        """The log-probability of what was drawn."""
        self.logprob = logprob
        # A logit that is not finite, hidden from the draw by min_tokens.
        if self.token_id >= 0 and math.isnan(logprob.logprob):
            self.token_id = NOT_FINITE

    @property
    def outcome(self) -> Sampled | MoebiusError:
        if self.token_id == ALL_BANNED:
            return self._all_banned()
        if self.token_id < 0:
            return not_finite()
        return Sampled(self.token_id, self.logprob)

    def _all_banned(self) -> MoebiusError:
        asked = self.request.asked
        if asked.constraint is None and not self.params.allowed_token_ids:
            return NumericalError("min_tokens and logit_bias leave no token that could be drawn")
        return ConstraintError(
            "no token can be drawn that is allowed by all of grammar, allowed_token_ids, bad_words "
            "and min_tokens",
            param="allowed_token_ids" if self.params.allowed_token_ids else None,
        )


def _parts(rows: Iterable[_Row], vocab: int) -> Iterator[list[_Row]]:
    """Rows in order, as many at a time as the plan has memory for: all at once unless they ask for
    a great many ids, which are named or candidates."""
    part: list[_Row] = []
    total = 0
    for row in rows:
        size = min(row.draw.width, vocab) + (row.shaping.num_ids if row.shaping else 0)
        if part and total + size > SAMPLED_IDS:
            yield part
            part = []
            total = 0
        part.append(row)
        total += size
    yield part


def _bans(request: Request) -> Restriction:
    """What a request that does not need the host is held to."""
    constraint = request.asked.constraint
    if constraint is None or not constraint.bad_words:
        return _FREE
    return Restriction(banned=tuple({ids[-1] for ids in constraint.bad_words}))


def _shaping(request: Request, restriction: Restriction, position: int) -> Shaping | None:
    """Of a request's token at `position`."""
    params = request.params
    too_short = position - len(request.prompt_ids) < params.min_tokens
    too_short = too_short and not restriction.shortens
    if not (too_short or params.shapes_logits or not restriction.free):
        return None
    repetition = params.repetition_penalty != 1.0
    counts = repetition or params.presence_penalty or params.frequency_penalty
    return Shaping(
        bias=params.logit_bias,
        seen=request.prompt_ids if repetition else (),
        drawn=request.output_ids if counts else (),
        repetition=max(params.repetition_penalty, _LEAST_REPETITION),
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        banned=[*restriction.banned, *(sorted(request.stop_ids) if too_short else ())],
        allowed=restriction.allowed,
    )


def _indices(rows: Iterable[_Row]) -> list[int]:
    return [row.index for row in rows]


def not_finite() -> NumericalError:
    return NumericalError("the model produced NaN or infinite logits for this request")
