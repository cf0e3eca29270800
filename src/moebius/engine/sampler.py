"""Logits to tokens. A draw depends on (logits, sampling parameters, seed, absolute position) and on nothing else.

Order: logit_bias, penalties, min_tokens, temperature, top_k, top_p, min_p. Ties go to the lowest id everywhere.
Log-probabilities are the model's own log-softmax, before any of these. Legend: L rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebius.engine.client import TokenLogprob
from moebius.errors import EngineError, MoebiusError, NumericalError
from moebius.schedule.request import Request, SamplingParams

log = logging.getLogger(__name__)

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

# Enough candidates for most top-p draws; when their mass does not reach top_p, eight times as many are taken.
_NUCLEUS_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row's token, and its log-probabilities if they were asked for."""

    token_id: int
    logprob: TokenLogprob | None = None


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) keyed by (seed, position): the generator has no state that a batch could disturb."""
    data = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    bits = int.from_bytes(blake2b(data, digest_size=8, person=b"moebius-draw").digest(), "little")
    return ((bits >> 11) + 0.5) * 2.0**-53


def sample(logits_LV: Tensor, requests: Sequence[Request]) -> list[Sampled | MoebiusError]:
    """One token a row; row i belongs to requests[i].

    logits_LV: (L, V) float32, not changed. A row that cannot be drawn from gets its error in place of a token:
    NumericalError for a NaN or an infinity.
    """
    finite_L = torch.isfinite(logits_LV).all(dim=-1).tolist()
    greedy_L = logits_LV.argmax(dim=-1).tolist()
    return [
        _outcome(logits_LV[row], request, greedy_L[row]) if finite_L[row] else not_finite()
        for row, request in enumerate(requests)
    ]


def not_finite() -> NumericalError:
    return NumericalError("the model produced NaN or infinite logits for this request")


def _outcome(logits_V: Tensor, request: Request, greedy: int) -> Sampled | MoebiusError:
    params = request.params
    try:
        if params.greedy and not _shapes_logits(request):
            token = greedy
        else:
            token = _draw(_shaped(_host(logits_V), request), request)
        return Sampled(token, None if params.logprobs is None else _logprob(logits_V, token, params.logprobs))
    except MoebiusError as error:
        return error
    except Exception as error:
        log.exception("sampling failed for request %s", request.id)
        failure = EngineError("the engine failed to draw a token for this request")
        failure.__cause__ = error
        return failure


def token_logprobs(logits_LV: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprob] | None:
    """Log-probabilities of given tokens, one a row: what prompt log-probabilities are. None if not finite."""
    if not bool(torch.isfinite(logits_LV).all()):
        return None
    return [_logprob(logits_LV[row], token, top) for row, token in enumerate(token_ids)]


def _host(logits_V: Tensor) -> NDArray[np.float32]:
    return logits_V.detach().to("cpu", torch.float32).numpy()


def _logprob(logits_V: Tensor, token: int, top: int) -> TokenLogprob:
    row = _host(logits_V).astype(np.float64)
    shifted = row - row.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    own = logprobs[token]
    rank = 1 + int((logprobs > own).sum()) + int((logprobs[:token] == own).sum())
    best = _best(row, top)
    return TokenLogprob(token, float(own), rank, tuple((int(i), float(logprobs[i])) for i in best))


def _best(row: Float64, count: int) -> Int64:
    """Indices of the `count` largest values, largest first, ties to the lowest index."""
    if count <= 0:
        return np.empty(0, np.int64)
    if count < row.size:
        threshold = np.partition(row, row.size - count)[row.size - count]
        above = np.flatnonzero(row > threshold)
        candidates = np.concatenate((above, np.flatnonzero(row == threshold)[: count - above.size]))
    else:
        candidates = np.arange(row.size)
    order: Int64 = np.lexsort((candidates, -row[candidates]))
    return np.asarray(candidates[order], np.int64)


def _shapes_logits(request: Request) -> bool:
    params = request.params
    return bool(
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or len(request.output_ids) < params.min_tokens
    )


def _shaped(logits_V: NDArray[np.float32], request: Request) -> Float64:
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
        row[list(request.stop_ids)] = -np.inf
    return row


def _draw(row: Float64, request: Request) -> int:
    params = request.params
    if not np.isfinite(row.max()):
        raise NumericalError("min_tokens and logit_bias leave no token that could be drawn")
    if params.greedy:
        return int(row.argmax())
    with np.errstate(over="ignore"):
        scaled = (row - row.max()) / params.temperature
    kept, weights = _truncated(np.exp(scaled), params)
    cumulative = np.cumsum(weights)
    u = uniform(request.seed, request.num_tokens)
    index = min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), weights.size - 1)
    return index if kept is None else int(kept[index])


def _truncated(weights: Float64, params: SamplingParams) -> tuple[Int64 | None, Float64]:
    """What top_k, top_p and min_p leave of unnormalised weights: (ids, most likely first, and their weights).

    ids is None where nothing was cut, and then the weights are in order of their ids.
    """
    if params.top_k <= 0 and params.top_p >= 1.0 and params.min_p <= 0.0:
        return None, weights
    ids: Int64 | None = None
    if 0 < params.top_k < weights.size:
        ids = _best(weights, params.top_k)
    if params.top_p < 1.0:
        ids = _nucleus(weights, ids, params.top_p)
    if ids is None:
        ids = np.flatnonzero(weights > 0)
    left = weights[ids]
    if params.min_p > 0.0:
        enough = left >= params.min_p * left.max()
        ids, left = ids[enough], left[enough]
    return ids, left


def _nucleus(weights: Float64, ids: Int64 | None, top_p: float) -> Int64:
    """The smallest set of most likely ids whose mass reaches top_p (Holtzman et al., arXiv 1904.09751)."""
    total = weights.sum() if ids is None else weights[ids].sum()
    count = _NUCLEUS_CANDIDATES
    while True:
        candidates = _best(weights, count) if ids is None else ids
        before = np.cumsum(weights[candidates]) - weights[candidates]
        inside = before < top_p * total
        if ids is not None or not inside.all() or candidates.size == weights.size:
            return np.asarray(candidates[inside], np.int64)
        count *= 8
