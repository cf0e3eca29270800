"""Logits to tokens. A draw depends on (logits, sampling parameters, seed, absolute position) and on nothing else.

Order: logit_bias, penalties, min_tokens, temperature, top_k, top_p, min_p. Ties go to the lowest id everywhere.
Log-probabilities are the model's own log-softmax, before any of these. What touches the whole vocabulary is an
operation of the backend; here are the few candidates it leaves. Legend: L rows, V vocabulary.
"""

import logging
import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebius.engine.client import TokenLogprob
from moebius.errors import EngineError, MoebiusError, NumericalError
from moebius.ops import Ops
from moebius.schedule.request import Request, SamplingParams

log = logging.getLogger(__name__)

Float64 = NDArray[np.float64]

# Enough candidates for most top-p draws; when their mass does not reach top_p, eight times as many are taken.
_NUCLEUS_CANDIDATES = 256
# Below, every difference of float32 logits is beyond exp's range: greedy, but for exact ties.
_COLDEST = 1e-20
# In place of minus infinity, which means a broken model.
_IMPOSSIBLE = float(np.finfo(np.float32).min)


class Sampled(NamedTuple):
    """A row's token, and its log-probabilities if they were asked for."""

    token_id: int
    logprob: TokenLogprob | None = None


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) keyed by (seed, position): the generator has no state that a batch could disturb."""
    data = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    bits = int.from_bytes(blake2b(data, digest_size=8, person=b"moebius-draw").digest(), "little")
    return ((bits >> 11) + 0.5) * 2.0**-53


def sample(logits_LV: Tensor, requests: Sequence[Request], ops: Ops) -> list[Sampled | MoebiusError]:
    """One token a row; row i belongs to requests[i].

    logits_LV: (L, V) float32, not changed. A row that cannot be drawn from gets its error in place of a token:
    NumericalError for a NaN or an infinity, EngineError for what nobody foresaw.
    """
    try:
        return _sample(logits_LV, requests, ops)
    except Exception:
        log.exception("sampling failed for %d requests; each is tried alone", len(requests))
        return [_sample_alone(logits_LV[row : row + 1], request, ops) for row, request in enumerate(requests)]


def _sample_alone(logits_1V: Tensor, request: Request, ops: Ops) -> Sampled | MoebiusError:
    try:
        return _sample(logits_1V, [request], ops)[0]
    except Exception as error:
        failure = EngineError("the engine failed to draw a token for this request")
        failure.__cause__ = error
        return failure


def _sample(logits_LV: Tensor, requests: Sequence[Request], ops: Ops) -> list[Sampled | MoebiusError]:
    if all(request.params.plain for request in requests):
        return [Sampled(token) if token >= 0 else not_finite() for token in ops.argmax(logits_LV)]
    shaped_LV = _shaped(logits_LV, requests)
    device = logits_LV.device
    temperature_L = torch.tensor([_temperature(each.params) for each in requests], dtype=torch.float32)
    candidates = max((_candidates(each.params) for each in requests), default=0)
    log_sums_L, ids_LK = ops.log_softmax_top_k(shaped_LV, max(candidates, 1), temperature_L.to(device))
    log_sums = log_sums_L.tolist()
    tokens = {row: best for row, best in enumerate(ids_LK[:, 0].tolist()) if not math.isnan(log_sums[row])}
    drawn = [row for row in tokens if not requests[row].params.greedy]
    free = [row for row in drawn if not _candidates(requests[row].params)]
    if free:
        uniform_L = torch.tensor([_uniform(requests[row]) for row in free], dtype=torch.float64).to(device)
        ids = ops.draw(shaped_LV[free], temperature_L[free].to(device), uniform_L)
        tokens.update(zip(free, ids.tolist(), strict=True))
    for row in set(drawn).difference(free):
        tokens[row] = _draw(shaped_LV[row], ids_LK[row], log_sums[row], requests[row], ops)
    if shaped_LV is not logits_LV:
        tokens = {row: token for row, token in tokens.items() if float(shaped_LV[row, token]) != _IMPOSSIBLE}
    tops = {row: top for row in tokens if (top := requests[row].params.logprobs) is not None}
    found = _logprobs(logits_LV[[*tops]], [tokens[row] for row in tops], [*tops.values()], ops) if tops else []
    logprobs = dict(zip(tops, found, strict=True))
    return [
        not_finite()
        if math.isnan(log_sums[row])
        else Sampled(tokens[row], logprobs.get(row))
        if row in tokens
        else NumericalError("min_tokens and logit_bias leave no token that could be drawn")
        for row in range(len(requests))
    ]


def not_finite() -> NumericalError:
    return NumericalError("the model produced NaN or infinite logits for this request")


def token_logprobs(logits_LV: Tensor, token_ids: Sequence[int], top: int, ops: Ops) -> list[TokenLogprob] | None:
    """Log-probabilities of given tokens, one a row: what prompt log-probabilities are. None if not finite."""
    found = _logprobs(logits_LV, token_ids, [top] * len(token_ids), ops)
    return None if any(math.isnan(each.logprob) for each in found) else found


def _logprobs(logits_LV: Tensor, token_ids: Sequence[int], tops: Sequence[int], ops: Ops) -> list[TokenLogprob]:
    """Row by row: the token's log-probability, its rank, and the `top` most likely tokens'."""
    log_sums_L, ids_LK = ops.log_softmax_top_k(logits_LV, max(1, *tops))
    values_LK = logits_LV.gather(1, ids_LK).double() - log_sums_L.unsqueeze(1)
    own = torch.tensor(token_ids, device=logits_LV.device).unsqueeze(1)
    own_L1 = logits_LV.gather(1, own)
    above_L = (logits_LV > own_L1).sum(-1)
    before = torch.arange(logits_LV.shape[-1], device=logits_LV.device) < own
    ranks = (1 + above_L + ((logits_LV == own_L1) & before).sum(-1)).tolist()
    mine = (own_L1.double().squeeze(1) - log_sums_L).tolist()
    best = [list(zip(*pair, strict=True)) for pair in zip(ids_LK.tolist(), values_LK.tolist(), strict=True)]
    return [
        TokenLogprob(token, mine[row], ranks[row], tuple(best[row][: tops[row]])) for row, token in enumerate(token_ids)
    ]


def _uniform(request: Request) -> float:
    return uniform(request.seed, request.num_tokens)


def _temperature(params: SamplingParams) -> float:
    return 1.0 if params.greedy else max(params.temperature, _COLDEST)


def _candidates(params: SamplingParams) -> int:
    """How many of the most likely ids a draw needs to see; 0 where it takes the whole vocabulary."""
    if params.greedy:
        return 1
    if params.top_k > 0:
        return params.top_k
    return _NUCLEUS_CANDIDATES if params.top_p < 1.0 or params.min_p > 0.0 else 0


def _shapes_logits(request: Request) -> bool:
    return request.params.shapes_logits or len(request.output_ids) < request.params.min_tokens


def _shaped(logits_LV: Tensor, requests: Sequence[Request]) -> Tensor:
    """The logits with what requests ask for before temperature; themselves where none asks."""
    rows = [row for row, request in enumerate(requests) if _shapes_logits(request)]
    if not rows:
        return logits_LV
    shaped_LV = logits_LV.clone()
    for row in rows:
        shaped_LV[row] = torch.from_numpy(_shaped_row(logits_LV[row].cpu().numpy(), requests[row])).to(logits_LV.device)
    return shaped_LV


def _shaped_row(logits_V: NDArray[np.float32], request: Request) -> NDArray[np.float32]:
    """Bias, penalties (repetition: CTRL, arXiv 1909.05858; presence and frequency: OpenAI's), min_tokens."""
    params = request.params
    row = logits_V.astype(np.float64)
    for token, bias in params.logit_bias.items():
        row[token] += bias
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array((*request.prompt_ids, *request.output_ids), np.int64))
        values = row[seen]
        row[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and request.output_ids:
        drawn, counts = np.unique(np.array(request.output_ids, np.int64), return_counts=True)
        row[drawn] -= params.presence_penalty + params.frequency_penalty * counts
    if len(request.output_ids) < params.min_tokens:
        row[list(request.stop_ids)] = _IMPOSSIBLE
    return row.astype(np.float32)


def _draw(logits_V: Tensor, ids_K: Tensor, log_sum: float, request: Request, ops: Ops) -> int:
    """A draw from what top_k, top_p (nucleus: Holtzman et al., arXiv 1904.09751) and min_p leave.

    ids_K: the most likely ids, as many as `_candidates` says or more. log_sum: logsumexp(logits / temperature).
    """
    params, temperature = request.params, _temperature(request.params)
    if params.top_k > 0:
        ids_K = ids_K[: params.top_k]
    values: Float64 = logits_V[ids_K].double().cpu().numpy()
    weights = np.exp((values - values[0]) / temperature)
    total = weights.sum() if params.top_k > 0 else math.exp(log_sum - values[0] / temperature)
    kept = (np.cumsum(weights) - weights < params.top_p * total) & (weights >= params.min_p * weights[0])
    if kept[-1] and params.top_k <= 0 and len(ids_K) < len(logits_V):
        _, more = ops.log_softmax_top_k(logits_V.unsqueeze(0), 8 * len(ids_K))
        return _draw(logits_V, more[0], log_sum, request, ops)
    cumulative = np.cumsum(weights[kept])
    index = int(np.searchsorted(cumulative, _uniform(request) * cumulative[-1], side="right"))
    return int(ids_K[min(index, len(cumulative) - 1)])
