"""From logits to tokens in plain PyTorch.

Legend: L rows of logits, V vocabulary, R rows that are asked about, K candidates of one of them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebius.ops.interface import Ops
from moebius.ops.reference.routing import top_k
from moebius.ops.sampling import (
    ALL_BANNED,
    LOWEST,
    NOT_FINITE,
    ROWS_AT_ONCE,
    Shaping,
    TopK,
    with_newest,
)

# For each byte of a set of ids, what eight logits are bounded by.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BOUNDS = np.where(_BITS == 1, np.float32(np.inf), np.float32(LOWEST))


class SamplingOps(Ops):
    def argmax(self, logits_LV: Tensor, rows: Sequence[int] | None = None) -> list[int]:
        found: list[int] = []
        for part in _parts(range(len(logits_LV)) if rows is None else rows):
            logits_RV = logits_LV[_index(part, logits_LV)]
            found += _drawn(logits_RV, top_k(logits_RV, 1)[:, 0])
        return found

    def draw(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[float],
    ) -> list[int]:
        found: list[int] = []
        for part in _parts(range(len(rows))):
            at = slice(part[0], part[-1] + 1)
            logits_RV = logits_LV[_index(rows[at], logits_LV)]
            heat_R1 = torch.tensor(
                temperatures[at], dtype=torch.float32, device=logits_LV.device
            ).unsqueeze(1)
            uniform_R1 = torch.tensor(
                uniforms[at], dtype=torch.float64, device=logits_LV.device
            ).unsqueeze(1)
            cumulative_RV = torch.softmax(logits_RV.double() / heat_R1, dim=-1).cumsum(-1)
            ids_R1 = torch.searchsorted(
                cumulative_RV, uniform_R1 * cumulative_RV[:, -1:], right=True
            )
            ids_R = ids_R1.squeeze(1).clamp(max=logits_LV.shape[-1] - 1)
            found += _drawn(logits_RV, ids_R)
        return found

    def log_softmax_top_k(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
        temperatures: Sequence[float] | None = None,
    ) -> TopK:
        vocab = logits_LV.shape[-1]
        places = defaultdict(list)
        for place, count in enumerate(counts):
            places[min(count, vocab)].append(place)
        heats = [1.0] * len(rows) if temperatures is None else temperatures
        log_sums_R = torch.empty(len(rows), dtype=torch.float64, device=logits_LV.device)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for count, same in places.items():
            for part in _parts(same):
                logits_RV = logits_LV[_index([rows[place] for place in part], logits_LV)]
                heat_R = torch.tensor(
                    [heats[place] for place in part], dtype=torch.float32, device=logits_LV.device
                )
                log_sums_R[_index(part, logits_LV)] = _log_sums(logits_RV, heat_R)
                ids_RK = top_k(logits_RV.nan_to_num(), count)
                found.update(
                    zip(part, zip(logits_RV.gather(1, ids_RK), ids_RK, strict=True), strict=True)
                )
        values = [logits_LV.new_empty(0)]
        ids = [_index([], logits_LV)]
        for place in range(len(rows)):
            values.append(found[place][0])
            ids.append(found[place][1])
        return TopK(log_sums_R, torch.cat(values), torch.cat(ids))

    def ranks(self, logits_LV: Tensor, rows: Sequence[int], ids_R: Tensor) -> Tensor:
        found = []
        for row, id in zip(rows, ids_R.tolist(), strict=True):
            logits_V = logits_LV[row]
            before = (logits_V[:id] >= logits_V[id]).sum()
            found.append(1 + int(before + (logits_V[id:] > logits_V[id]).sum()))
        return _index(found, logits_LV)

    @contextmanager
    def shaped(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        shapings: Sequence[Shaping],
        newest_R: Tensor | None = None,
    ) -> Iterator[None]:
        shapings = with_newest(shapings, newest_R)
        kept: list[tuple[int, Tensor, Tensor]] = []
        try:
            for row, shaping in zip(rows, shapings, strict=True):
                ids_E, shaped_E = _shaped(logits_LV[row], shaping)
                kept.append((row, ids_E, logits_LV[row, ids_E]))
                _put(logits_LV, row, ids_E, shaped_E)
            with _only_allowed(logits_LV, rows, shapings):
                yield
        finally:
            for row, ids_E, values_E in kept:
                _put(logits_LV, row, ids_E, values_E)


def _parts(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[first : first + ROWS_AT_ONCE]


def _drawn(logits_RV: Tensor, ids_R: Tensor) -> list[int]:
    """The ids, or why there are none."""
    banned_R = (logits_RV == LOWEST).all(-1)
    finite_R = logits_RV.isfinite().all(-1)
    return ids_R.masked_fill(banned_R, ALL_BANNED).masked_fill(~finite_R, NOT_FINITE).tolist()


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=like.device)


def _log_sums(logits_RV: Tensor, heat_R: Tensor) -> Tensor:
    finite_R = torch.isfinite(logits_RV).all(dim=-1)
    return torch.logsumexp(logits_RV.double() / heat_R.unsqueeze(1), dim=-1).where(
        finite_R, torch.nan
    )


def _shaped(logits_V: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
    """The ids that a shaping names, each once, and what becomes of their logits."""
    named = [*shaping.bias], shaping.seen, shaping.drawn, shaping.banned
    every = [token for ids in named for token in ids]
    if every and not 0 <= min(every) <= max(every) < len(logits_V):
        raise IndexError(f"a shaping names an id outside the vocabulary of {len(logits_V)}")
    ids_E, places = torch.unique(_index(every, logits_V), return_inverse=True)
    biased, seen, drawn, banned = places.split([len(ids) for ids in named])
    x_E = logits_V[ids_E].double()
    x_E[biased] += torch.tensor(
        [*shaping.bias.values()], dtype=torch.float64, device=logits_V.device
    )
    repeated = torch.cat((seen, drawn))
    x = x_E[repeated]
    x_E[repeated] = torch.where(x > 0, x / shaping.repetition, x * shaping.repetition)
    counts_E = drawn.bincount(minlength=len(ids_E))
    x_E = x_E.where(counts_E == 0, x_E - (shaping.presence + shaping.frequency * counts_E.double()))
    shaped_E = x_E.float()
    shaped_E[banned] = LOWEST
    return ids_E, shaped_E


@torch.inference_mode()  # a step's logits may be written nowhere else
def _put(logits_LV: Tensor, row: int, ids_E: Tensor, values_E: Tensor) -> None:
    logits_LV[row, ids_E] = values_E


@contextmanager
def _only_allowed(
    logits_LV: Tensor, rows: Sequence[int], shapings: Sequence[Shaping]
) -> Iterator[None]:
    """What `shaped` does with the ids that are allowed, after all else."""
    kept: list[tuple[int, Tensor]] = []
    try:
        for row, shaping in zip(rows, shapings, strict=True):
            if shaping.allowed is not None:
                kept.append((row, logits_LV[row].clone()))
                _ban_others(logits_LV, row, shaping.allowed)
        yield
    finally:
        for row, before_V in kept:
            _write(logits_LV, row, before_V)


@torch.inference_mode()  # a step's logits may be written nowhere else
def _ban_others(logits_LV: Tensor, row: int, allowed: NDArray[np.uint32]) -> None:
    """The lesser of each logit and a bound: a choice by a condition takes ten times as long."""
    bounds = np.take(_BOUNDS, allowed.view(np.uint8), axis=0).reshape(-1)
    bounds_V = torch.from_numpy(bounds[: logits_LV.shape[-1]]).to(logits_LV.device)
    torch.minimum(logits_LV[row], bounds_V, out=logits_LV[row])


@torch.inference_mode()
def _write(logits_LV: Tensor, row: int, values_V: Tensor) -> None:
    logits_LV[row] = values_V
