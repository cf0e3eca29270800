"""From logits to tokens by Triton kernels: what comes back from the device is tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.draws import Draw
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.routing import top_k
from moebius.ops.sampling import Shaping, TopK
from moebius.ops.transfer import send, send_numbers
from moebius.ops.triton.kernels import sampling as kernels

OPERATIONS = frozenset({Operation.SAMPLING})
# Ids of one program: part of every sum's order, so never a question of how many rows there are.
_PART = 4096
_PART_WARPS = 8
# The most candidates that are looked for one after the other; for more, torch sorts whole rows.
_MOST_LOOKED_FOR = 64
_CHANGES = 256


class SamplingOps(ReferenceOps):
    first_look = _MOST_LOOKED_FOR

    def argmax(self, logits_LV: Tensor, rows: Sequence[int] | None = None) -> list[int]:
        asked = _Rows(logits_LV, range(len(logits_LV)) if rows is None else rows)
        return _best(asked).tolist()

    def draw(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[float],
    ) -> list[int]:
        return _drawn(_Rows(logits_LV, rows), temperatures, uniforms).tolist()

    def draw_candidates(
        self, logits_LV: Tensor, rows: Sequence[int], draws: Sequence[Draw]
    ) -> list[int]:
        """A row with many candidates is drawn on the host, whoever else is there."""
        found = [0] * len(rows)
        few = [at for at, draw in enumerate(draws) if draw.width <= _MOST_LOOKED_FOR]
        many = [at for at, draw in enumerate(draws) if draw.width > _MOST_LOOKED_FOR]
        for some, draw in ((few, _few_drawn), (many, super().draw_candidates)):
            if some:
                drawn = draw(logits_LV, [rows[at] for at in some], [draws[at] for at in some])
                for at, token in zip(some, drawn, strict=True):
                    found[at] = token
        return found

    def choose(self, logits_LV: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Raises ValueError for a row with more candidates than `first_look`."""
        if max((draw.width for draw in draws if draw.temperature), default=0) > self.first_look:
            raise ValueError(f"more than {self.first_look} candidates are for draw_candidates")
        found_L = torch.empty(len(logits_LV), dtype=torch.int64, device=logits_LV.device)
        greedy = [row for row, draw in enumerate(draws) if not draw.temperature]
        free = [row for row, draw in enumerate(draws) if draw.temperature and not draw.width]
        narrow = [row for row, draw in enumerate(draws) if draw.temperature and draw.width]
        if greedy:
            asked = _Rows(logits_LV, greedy)
            found_L[asked.rows_R] = _best(asked)
        if free:
            asked = _Rows(logits_LV, free)
            heats = [draws[row].temperature for row in free]
            found_L[asked.rows_R] = _drawn(asked, heats, [draws[row].uniform for row in free])
        if narrow:
            asked = _Rows(logits_LV, narrow)
            found_L[asked.rows_R] = _drawn_from_few(asked, [draws[row] for row in narrow])
        return found_L

    def log_softmax_top_k(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
        temperatures: Sequence[float] | None = None,
    ) -> TopK:
        asked = _Rows(logits_LV, rows)
        heats = [1.0] * len(rows) if temperatures is None else temperatures
        counts = [min(count, asked.vocab) for count in counts]
        log_sums_R = _log_sums(asked, heats)
        # Which ids are the largest is no matter of rounding: either way finds the same.
        if max(counts, default=0) > _MOST_LOOKED_FOR:
            return TopK(log_sums_R, *_top_k_by_torch(asked, counts))
        return TopK(log_sums_R, *_top_k(asked, counts, asked.numbers(counts, torch.int64)))

    def ranks(self, logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        asked = _Rows(logits_LV, rows)
        _require_inside("token ids", token_ids, asked.vocab)
        tokens_R = asked.numbers(token_ids, torch.int64)
        before = tokens_R.new_empty((len(tokens_R), asked.count))
        if before.numel():
            kernels.count_before[before.shape](
                logits_LV,
                asked.rows_R,
                tokens_R,
                before,
                asked.vocab,
                asked.count,
                PART=_PART,
                num_warps=_PART_WARPS,
            )
        return (before.sum(1) + 1).tolist()

    @contextmanager
    def shaped(
        self, logits_LV: Tensor, rows: Sequence[int], shapings: Sequence[Shaping]
    ) -> Iterator[None]:
        asked = _Rows(logits_LV, rows)
        banning = [
            (row, _words(shaping.allowed, asked.vocab))
            for row, shaping in zip(rows, shapings, strict=True)
            if shaping.allowed is not None
        ]
        places, kept = _change(asked, rows, shapings)
        whole = _Rows(logits_LV, [row for row, _ in banning])
        kept_RV = _ban_others(whole, [words for _, words in banning])
        try:
            yield
        finally:
            _put_back(logits_LV, whole.rows_R, kept_RV)
            _put_back(logits_LV.view(-1), places, kept)


class _Known(NamedTuple):
    """Of each part of each row (R, P): its largest logit, that one's id, and the sum of its
    weights."""

    largest: Tensor
    ids: Tensor
    sums: Tensor


class _Rows:
    """Rows of logits that are asked about, in parts.

    rows_R   their places, int64
    count    of parts that a row has; `padded` is the power of two from there on
    """

    def __init__(self, logits_LV: Tensor, rows: Sequence[int]) -> None:
        if logits_LV.dtype != torch.float32 or not logits_LV.is_contiguous():
            raise ValueError(
                f"logits are contiguous float32, not {logits_LV.dtype} with strides "
                f"{logits_LV.stride()}"
            )
        _require_inside("rows", rows, len(logits_LV))
        self.logits_LV = logits_LV
        self.vocab = logits_LV.shape[1]
        self.count = triton.cdiv(self.vocab, _PART)
        self.padded = triton.next_power_of_2(self.count)
        self.rows_R = send_numbers(rows, torch.int64, logits_LV.device)

    def numbers(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """One of each row, on the device."""
        if len(values) != len(self.rows_R):
            raise ValueError(f"{len(values)} parameters for {len(self.rows_R)} rows")
        return send_numbers(values, dtype, self.rows_R.device)

    def ids(self) -> Tensor:
        """Room for what is found, one of each row."""
        return torch.empty_like(self.rows_R)

    def parts(self, heats_R: Tensor | None) -> _Known:
        """Without heats there are no sums."""
        shape = (len(self.rows_R), self.count)
        known = _Known(
            self.logits_LV.new_empty(shape),
            self.rows_R.new_empty(shape),
            self.logits_LV.new_empty(shape if heats_R is not None else (1,), dtype=torch.float64),
        )
        kernels.softmax_parts[shape](
            self.logits_LV,
            self.rows_R,
            self.logits_LV if heats_R is None else heats_R,
            *known,
            self.vocab,
            self.count,
            SUMS=heats_R is not None,
            PART=_PART,
            num_warps=_PART_WARPS,
        )
        return known


def _best(asked: _Rows) -> Tensor:
    found_R = asked.ids()
    if len(found_R):
        known = asked.parts(None)
        kernels.best[(len(found_R),)](
            known.largest, known.ids, found_R, asked.count, PARTS=asked.padded
        )
    return found_R


def _drawn(asked: _Rows, temperatures: Sequence[float], uniforms: Sequence[float]) -> Tensor:
    heats_R = asked.numbers(temperatures, torch.float32)
    uniforms_R = asked.numbers(uniforms, torch.float64)
    found_R = asked.ids()
    if len(found_R):
        known = asked.parts(heats_R)
        kernels.draw[(len(found_R),)](
            asked.logits_LV,
            asked.rows_R,
            heats_R,
            uniforms_R,
            known.largest,
            known.sums,
            found_R,
            asked.vocab,
            asked.count,
            PART=_PART,
            PARTS=asked.padded,
            num_warps=_PART_WARPS,
        )
    return found_R


def _log_sums(asked: _Rows, temperatures: Sequence[float]) -> Tensor:
    heats_R = asked.numbers(temperatures, torch.float32)
    log_sums_R = torch.empty(len(heats_R), dtype=torch.float64, device=heats_R.device)
    if len(heats_R):
        known = asked.parts(heats_R)
        kernels.log_sum[(len(heats_R),)](
            known.largest, known.sums, heats_R, log_sums_R, asked.count, PARTS=asked.padded
        )
    return log_sums_R


def _few_drawn(logits_LV: Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
    return _drawn_from_few(_Rows(logits_LV, rows), draws).tolist()


def _drawn_from_few(asked: _Rows, draws: Sequence[Draw]) -> Tensor:
    """As draw_candidates, of up to _MOST_LOOKED_FOR candidates a row."""
    counts = [min(draw.width, asked.vocab) for draw in draws]
    counts_R = asked.numbers(counts, torch.int64)
    log_sums_R = _log_sums(asked, [draw.temperature for draw in draws])
    values, ids = _top_k(asked, counts, counts_R)
    numbers = [
        (draw.temperature, draw.uniform, draw.top_p, draw.min_p, draw.whole) for draw in draws
    ]
    numbers_R5 = send_numbers(numbers, torch.float64, log_sums_R.device)
    found_R = asked.ids()
    kernels.draw_of_top[(len(found_R),)](
        values,
        ids,
        counts_R.cumsum(0) - counts_R,
        counts_R,
        log_sums_R,
        numbers_R5,
        found_R,
        asked.vocab,
        BLOCK=_MOST_LOOKED_FOR,
    )
    return found_R


def _require_inside(what: str, values: Sequence[int], count: int) -> None:
    if len(values) and not 0 <= min(values) <= max(values) < count:
        raise IndexError(f"{what} from {min(values)} to {max(values)} are not all below {count}")


def _top_k(asked: _Rows, counts: Sequence[int], counts_R: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids of the `counts` largest logits of each row, row after row."""
    total = sum(counts)
    values = asked.logits_LV.new_empty(total)
    ids = asked.rows_R.new_empty(total)
    if total:
        most = max(counts)
        keys = asked.rows_R.new_empty((len(counts), asked.count, most))
        kernels.top_parts[keys.shape[:2]](
            asked.logits_LV,
            asked.rows_R,
            counts_R,
            keys,
            asked.vocab,
            asked.count,
            most,
            PART=_PART,
            num_warps=_PART_WARPS,
        )
        kernels.top_of_parts[(len(counts),)](
            keys,
            asked.logits_LV,
            asked.rows_R,
            counts_R.cumsum(0) - counts_R,
            counts_R,
            values,
            ids,
            asked.vocab,
            asked.count,
            most,
            MANY=triton.next_power_of_2(asked.count * most),
            num_warps=_PART_WARPS,
        )
    return values, ids


def _top_k_by_torch(asked: _Rows, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same, for more of a row than one by one."""
    rows = [asked.logits_LV[row] for row in asked.rows_R.tolist()]
    ids = [top_k(x_V.nan_to_num(), count) for x_V, count in zip(rows, counts, strict=True)]
    return torch.cat([x_V[best] for x_V, best in zip(rows, ids, strict=True)]), torch.cat(ids)


def _change(
    asked: _Rows, rows: Sequence[int], shapings: Sequence[Shaping]
) -> tuple[Tensor, Tensor]:
    """Change the logits that shapings name: their places among all logits, and what they were."""
    changes = [_changes(shaping, asked.vocab) for shaping in shapings]
    starts = [row * asked.vocab for row in rows]
    ids = [change.ids + start for change, start in zip(changes, starts, strict=True)]

    def joined(parts: Sequence[NDArray[np.generic]]) -> Tensor:
        return send(torch.from_numpy(np.concatenate(parts)), asked.rows_R.device)

    if not sum(map(len, ids)):
        return asked.rows_R.new_empty(0), asked.logits_LV.new_empty(0)
    places = joined(ids)
    kept = asked.logits_LV.new_empty(len(places))
    kernels.shape[(triton.cdiv(len(places), _CHANGES),)](
        asked.logits_LV,
        places,
        kept,
        joined([change.bias for change in changes]),
        joined([change.repetition for change in changes]),
        joined([change.penalty for change in changes]),
        joined([change.banned for change in changes]),
        len(places),
        BLOCK=_CHANGES,
    )
    return places, kept


class _Changes(NamedTuple):
    """What becomes of one row's ids, each there once; numbers are float64 but ids and banned."""

    ids: NDArray[np.int64]
    bias: NDArray[np.float64]
    repetition: NDArray[np.float64]
    penalty: NDArray[np.float64]
    banned: NDArray[np.uint8]


def _changes(shaping: Shaping, vocab: int) -> _Changes:
    named = [[*shaping.bias], shaping.seen, shaping.drawn, shaping.banned]
    every = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in named])
    if len(every) and not 0 <= every.min() <= every.max() < vocab:
        raise IndexError(f"a shaping names an id outside the vocabulary of {vocab}")
    ids, places = np.unique(every, return_inverse=True)
    biased, seen, drawn, banned = np.split(places, np.cumsum([len(ids) for ids in named])[:3])
    # Minus zero changes nothing, not even the sign of a zero.
    bias = np.full(len(ids), -0.0)
    bias[biased] += [*shaping.bias.values()]
    repetition = np.ones(len(ids))
    repetition[seen] = repetition[drawn] = shaping.repetition
    counts = np.bincount(drawn, minlength=len(ids))
    penalty = np.where(counts, shaping.presence + shaping.frequency * counts, 0.0)
    out = np.zeros(len(ids), dtype=np.uint8)
    out[banned] = 1
    return _Changes(ids, bias, repetition, penalty, out)


def _words(allowed: NDArray[np.uint32], vocab: int) -> NDArray[np.int32]:
    needed = triton.cdiv(vocab, 32)
    if allowed.dtype != np.uint32 or len(allowed) < needed:
        raise ValueError(
            f"a set of ids of {vocab} is {needed} words of uint32, not {len(allowed)} of "
            f"{allowed.dtype}"
        )
    return allowed[:needed].view(np.int32)


def _ban_others(whole: _Rows, words: Sequence[NDArray[np.int32]]) -> Tensor:
    """Bound all logits but those of allowed ids; what the rows were."""
    kept_RV = whole.logits_LV.new_empty((len(words), whole.vocab))
    if kept_RV.numel():
        words_RW = send(torch.from_numpy(np.stack(words)), kept_RV.device)
        kernels.allow[(len(words), whole.count)](
            whole.logits_LV,
            whole.rows_R,
            words_RW,
            kept_RV,
            whole.vocab,
            words_RW.shape[1],
            PART=_PART,
            num_warps=_PART_WARPS,
        )
    return kept_RV


@torch.inference_mode()  # a step's logits may be written nowhere else
def _put_back(logits: Tensor, places: Tensor, kept: Tensor) -> None:
    logits[places] = kept
