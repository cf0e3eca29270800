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
change its logits while it draws. What touches the whole vocabulary is the backend's
(ops/sampling.py); here are the few candidates it leaves.

Legend: L rows, V vocabulary, K candidates of one row.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, TypeVar

from torch import Tensor

from moebius.engine.client import TokenLogprob
from moebius.engine.devices import is_lost
from moebius.engine.faults import failure, say
from moebius.engine.restriction import Restriction
from moebius.engine.step_memory import SAMPLED_IDS
from moebius.errors import ConstraintError, MoebiusError, NumericalError, frames
from moebius.ops import Shaping
from moebius.ops.draws import Draw
from moebius.ops.sampling import ALL_BANNED, UNDECIDED, SamplerOps
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request

log = logging.getLogger(__name__)

_T = TypeVar("_T")

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


def draw_of(request: Request, ops: SamplerOps, position: int | None = None) -> Draw:
    """How a request's token at `position` is drawn; None: its next one."""
    params = request.params
    if params.greedy:
        return _GREEDY
    nucleus = params.top_p < 1.0 or params.min_p > 0.0
    return Draw(
        temperature=max(params.temperature, _COLDEST),
        uniform=uniform(request.asked.seed, request.num_tokens if position is None else position),
        width=params.top_k if params.top_k > 0 else ops.first_look if nucleus else 0,
        whole=params.top_k > 0,
        top_p=params.top_p,
        min_p=params.min_p,
    )


def drawn_from_logits(request: Request) -> bool:
    """Whether a request's next tokens are a matter of their logits and of its `draw_of` alone. Else
    the host is needed between two steps."""
    params = request.params
    return (
        request.asked.constraint is None
        and not params.allowed_token_ids
        and not params.shapes_logits
        and params.logprobs is None
        and len(request.output_ids) >= params.min_tokens
    )


def outcome(request: Request, chosen: int) -> Sampled | MoebiusError | None:
    """What `SamplerOps.choose` brought a request; None where it is to be drawn by `sample`."""
    if chosen == UNDECIDED:
        return None
    row = _Row(0, request, None, _GREEDY)
    row.take(chosen)
    return row.outcome


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
        _Row(index, request, _shaping(request, restriction or _FREE), draw_of(request, ops))
        for index, (request, restriction) in enumerate(zip(requests, restrictions, strict=True))
    ]
    for part in _parts(rows, lambda row: row.shaping.num_ids if row.shaping else 0):
        shaped = [row for row in part if row.shaping]
        with ops.shaped(logits_LV, _indices(shaped), _shapings(shaped)):
            _draw_each_kind(logits_LV, part, ops)
    _add_logprobs(logits_LV, rows, ops)
    return [row.outcome for row in rows]


@dataclass(slots=True)
class _Row:
    """One row on its way to a token.

    index     its place in logits_LV
    shaping   what its request asks for before temperature, if anything
    draw      how its token is drawn
    token_id  what it drew; None where there is nothing: its logits are not finite, or
    banned    all of them are
    """

    index: int
    request: Request
    shaping: Shaping | None
    draw: Draw
    token_id: int | None = None
    banned: bool = False
    logprob: TokenLogprob | None = None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    def take(self, token_id: int) -> None:
        """What the backend drew: an id, or what stands for none."""
        self.banned = token_id == ALL_BANNED
        self.token_id = token_id if token_id >= 0 else None

    @property
    def outcome(self) -> Sampled | MoebiusError:
        if self.banned:
            return self._all_banned()
        if self.token_id is None:
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


def _parts(rows: Iterable[_T], num_ids: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Rows in order, as many at a time as the plan has memory for: all at once unless they ask for
    a great many ids."""
    part: list[_T] = []
    total = 0
    for row in rows:
        size = num_ids(row)
        if part and total + size > SAMPLED_IDS:
            yield part
            part = []
            total = 0
        part.append(row)
        total += size
    yield part


def _shaping(request: Request, restriction: Restriction) -> Shaping | None:
    params = request.params
    too_short = len(request.output_ids) < params.min_tokens and not restriction.shortens
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


def _draw_each_kind(logits_LV: Tensor, rows: Sequence[_Row], ops: SamplerOps) -> None:
    drawing = [row for row in rows if row.draw.temperature]
    _take_best(logits_LV, [row for row in rows if not row.draw.temperature], ops)
    _draw_from_all(logits_LV, [row for row in drawing if not row.draw.width], ops)
    _draw_from_candidates(logits_LV, [row for row in drawing if row.draw.width], ops)


def _indices(rows: Iterable[_Row]) -> list[int]:
    return [row.index for row in rows]


def _shapings(rows: Iterable[_Row]) -> list[Shaping]:
    return [row.shaping for row in rows if row.shaping]


def _take_best(logits_LV: Tensor, rows: Sequence[_Row], ops: SamplerOps) -> None:
    for row, token in zip(rows, ops.argmax(logits_LV, _indices(rows)), strict=True):
        row.take(token)


def _draw_from_all(logits_LV: Tensor, rows: Sequence[_Row], ops: SamplerOps) -> None:
    temperatures = [row.draw.temperature for row in rows]
    uniforms = [row.draw.uniform for row in rows]
    tokens = ops.draw(logits_LV, _indices(rows), temperatures, uniforms)
    for row, token in zip(rows, tokens, strict=True):
        row.take(token)


def _draw_from_candidates(logits_LV: Tensor, rows: Sequence[_Row], ops: SamplerOps) -> None:
    """Rows that saw too few candidates for their top_p or min_p take part in another round."""
    vocab = logits_LV.shape[-1]
    while rows:
        undecided: list[_Row] = []
        for part in _parts(rows, lambda row: min(row.draw.width, vocab)):
            draws = [row.draw for row in part]
            drawn = ops.draw_candidates(logits_LV, _indices(part), draws)
            for row, token in zip(part, drawn, strict=True):
                row.take(token)
                if token == UNDECIDED:
                    undecided.append(row)
        for row in undecided:
            row.draw = row.draw._replace(width=8 * row.draw.width)
        rows = undecided


def _add_logprobs(logits_LV: Tensor, rows: Iterable[_Row], ops: SamplerOps) -> None:
    asked: list[_Row] = []
    token_ids: list[int] = []
    tops: list[int] = []
    for row in rows:
        top = row.params.logprobs
        if top is not None and row.token_id is not None:
            asked.append(row)
            token_ids.append(row.token_id)
            tops.append(top)
    if not asked:
        return
    logprobs = _logprobs(logits_LV, _indices(asked), token_ids, tops, ops)
    for row, logprob in zip(asked, logprobs, strict=True):
        row.logprob = logprob
        # A logit that is not finite, hidden from the draw by min_tokens.
        if math.isnan(logprob.logprob):
            row.token_id = None


def not_finite() -> NumericalError:
    return NumericalError("the model produced NaN or infinite logits for this request")


def token_logprobs(
    logits_LV: Tensor, token_ids: Sequence[int], top: int, ops: SamplerOps
) -> list[TokenLogprob] | None:
    """Log-probabilities of given tokens, one a row: what prompt log-probabilities are. None if not
    finite."""
    found = _logprobs(logits_LV, range(len(token_ids)), token_ids, [top] * len(token_ids), ops)
    return None if any(math.isnan(each.logprob) for each in found) else found


def _logprobs(
    logits_LV: Tensor,
    rows: Sequence[int],
    token_ids: Sequence[int],
    tops: Sequence[int],
    ops: SamplerOps,
) -> list[TokenLogprob]:
    """Row by row: the token's log-probability, its rank, and the `top` most likely tokens'."""
    log_sums_R, values, ids = ops.log_softmax_top_k(logits_LV, rows, tops)
    best = list(zip(ids.tolist(), values.tolist(), strict=True))
    own = logits_LV[list(rows), list(token_ids)].tolist()
    ranks = ops.ranks(logits_LV, rows, token_ids)
    found: list[TokenLogprob] = []
    stop = 0
    for row, log_sum in enumerate(log_sums_R.tolist()):
        start = stop
        stop += min(tops[row], logits_LV.shape[-1])
        found.append(
            TokenLogprob(
                token_id=token_ids[row],
                logprob=own[row] - log_sum,
                rank=ranks[row],
                top=tuple((token, value - log_sum) for token, value in best[start:stop]),
            )
        )
    return found
