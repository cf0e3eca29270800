"""From logits to tokens by Triton kernels: what comes back from the device is tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.draws import Draw, kinds_of
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

    def choose(self, logits_LV: Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> Tensor:
        """A row with many candidates is drawn on the host, whoever else is there."""
        kinds = kinds_of(draws)
        few = [at for at in kinds.narrow if draws[at].width <= _MOST_LOOKED_FOR]
        many = [at for at in kinds.narrow if draws[at].width > _MOST_LOOKED_FOR]
        found_R = _Rows(logits_LV, rows).ids()

        def put(places: Sequence[int], draw: Callable[[_Rows, Sequence[Draw]], Tensor]) -> None:
            if places:
                asked = _Rows(logits_LV, [rows[at] for at in places])
                at_P = send_numbers(places, torch.int64, found_R.device)
                found_R[at_P] = draw(asked, [draws[at] for at in places])

        put(kinds.greedy, lambda asked, _: _best(asked))
        put(kinds.free, _drawn_from_all)
        put(few, _drawn_from_few)
        put(many, self._drawn_from_many)
        return found_R

    def _drawn_from_many(self, asked: "_Rows", draws: Sequence[Draw]) -> Tensor:
        drawn = self.draw_candidates(asked.logits_LV, asked.rows, draws)
        return asked.numbers(drawn, torch.int64)

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

    def ranks(self, logits_LV: Tensor, rows: Sequence[int], ids_R: Tensor) -> Tensor:
        asked = _Rows(logits_LV, rows)
        asked.require_one_each(len(ids_R))
        counts_RP = torch.empty((len(rows), asked.count), dtype=torch.int32, device=ids_R.device)
        if len(rows):
            kernels.count_before[counts_RP.shape](
                logits_LV,
                asked.rows_R,
                ids_R,
                counts_RP,
                asked.vocab,
                asked.count,
                PART=_PART,
                num_warps=_PART_WARPS,
            )
        return counts_RP.sum(1) + 1

    @contextmanager
    def shaped(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        shapings: Sequence[Shaping],
        newest_R: Tensor | None = None,
    ) -> Iterator[None]:
        asked = _Rows(logits_LV, rows)
        banning = [
            (row, _words(shaping.allowed, asked.vocab))
            for row, shaping in zip(rows, shapings, strict=True)
            if shaping.allowed is not None
        ]
        changed = _change(asked, shapings, newest_R)
        whole = _Rows(logits_LV, [row for row, _ in banning])
        kept_RV = _ban_others(whole, [words for _, words in banning])
        try:
            yield
        finally:
            _put_back(logits_LV, whole.rows_R, kept_RV)
            for change in changed:
                _put_back(logits_LV.view(-1), change.places, change.kept)


class _Known(NamedTuple):
    """Of each part of each row (R, P): its largest logit, that one's id, and the sum of its
    weights."""

    largest: Tensor
    ids: Tensor
    sums: Tensor


class _Rows:
    """Rows of logits that are asked about, in parts.

    rows     their places; rows_R on the device, int64
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
        self.rows = rows
        self.vocab = logits_LV.shape[1]
        self.count = triton.cdiv(self.vocab, _PART)
        self.padded = triton.next_power_of_2(self.count)
        self.rows_R = send_numbers(rows, torch.int64, logits_LV.device)

    def numbers(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """One of each row, on the device."""
        self.require_one_each(len(values))
        return send_numbers(values, dtype, self.rows_R.device)

    def require_one_each(self, count: int) -> None:
        if count != len(self.rows):
            raise ValueError(f"{count} parameters for {len(self.rows)} rows")

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


def _drawn_from_all(asked: _Rows, draws: Sequence[Draw]) -> Tensor:
    return _drawn(asked, [draw.temperature for draw in draws], [draw.uniform for draw in draws])


def _drawn_from_few(asked: _Rows, draws: Sequence[Draw]) -> Tensor:
    """As draw_candidates, of up to _MOST_LOOKED_FOR candidates a row; nobody waits for it."""
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


class _Changes(NamedTuple):
    """What becomes of some logits, each there once.

    places             among all logits, int64; kept: what they are before
    bias to penalty    float64, as a Shaping has them for each; banned: 0 where it is not
    """

    places: Tensor
    kept: Tensor
    bias: Tensor
    repetition: Tensor
    penalty: Tensor
    banned: Tensor


def _change(
    asked: _Rows, shapings: Sequence[Shaping], newest_R: Tensor | None
) -> Sequence[_Changes]:
    """Change logits as shapings say; what was changed, to be put back.

    A newest id that is listed already is changed twice, both times from what it was before.
    """
    if not shapings:
        return []
    listed = _Listed(asked, shapings)
    changes = [listed.changes]
    if newest_R is not None:
        asked.require_one_each(len(newest_R))
        changes.append(listed.with_newest(newest_R))
    for each in changes:
        if len(each.places):
            kernels.shape[(triton.cdiv(len(each.places), _CHANGES),)](
                asked.logits_LV, *each, len(each.places), BLOCK=_CHANGES
            )
    return changes


class _Listed:
    """The ids that shapings name, on the device, and what becomes of their logits.

    Numbers are the host's, so that an id has the same ones whoever knows it first. Behind those of
    the named ids come those of one id a row that is not named, and is drawn once.

    keys_N     sorted: the ids of the first row, of the second with V added, and so on
    numbers    (5, N): bias, repetition, penalty, whether it is banned, and the penalty of an id
               that is drawn once more
    """

    def __init__(self, asked: _Rows, shapings: Sequence[Shaping]) -> None:
        vocab = asked.vocab
        named = [_named(shaping, vocab) for shaping in shapings]
        keys = [ids + place * vocab for place, (ids, _) in enumerate(named)]
        places = [ids + row * vocab for row, (ids, _) in zip(asked.rows, named, strict=True)]
        integers = np.stack((np.concatenate(keys), np.concatenate(places)))
        beyond = np.full((2, len(shapings)), len(shapings) * vocab)
        others = [(-0.0, s.repetition, 0.0, 0.0, s.presence + s.frequency) for s in shapings]
        numbers = [*(numbers for _, numbers in named), np.array(others).T]
        device = asked.logits_LV.device
        self._asked = asked
        self._count = integers.shape[1]
        self._keys_N, places_N = send(torch.from_numpy(np.hstack((integers, beyond))), device)
        self._numbers = send(torch.from_numpy(np.hstack(numbers)), device)
        places_E = places_N[: self._count]
        bias, repetition, penalty, banned, _ = self._numbers[:, : self._count]
        kept_E = asked.logits_LV.view(-1)[places_E]
        self.changes = _Changes(places_E, kept_E, bias, repetition, penalty, banned)

    def with_newest(self, newest_R: Tensor) -> _Changes:
        """Of one more id a row, drawn once more; made before anything is changed."""
        asked = self._asked
        order_R = torch.arange(len(newest_R), device=newest_R.device)
        key_R = order_R * asked.vocab + newest_R
        at_R = torch.searchsorted(self._keys_N, key_R)
        other_R = order_R + self._count
        own_R = torch.where(self._keys_N[at_R] == key_R, at_R, other_R)
        bias_R, _, _, banned_R, penalty_R = self._numbers[:, own_R]
        repetition_R = self._numbers[1, self._count :]
        places_R = asked.rows_R * asked.vocab + newest_R
        kept_R = asked.logits_LV.view(-1)[places_R]
        return _Changes(places_R, kept_R, bias_R, repetition_R, penalty_R, banned_R)


def _named(shaping: Shaping, vocab: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that a shaping names, each once and in order, and the numbers (5, ids) of each."""
    named = [[*shaping.bias], shaping.seen, shaping.drawn, shaping.banned]
    every = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in named])
    if len(every) and not 0 <= every.min() <= every.max() < vocab:
        raise IndexError(f"a shaping names an id outside the vocabulary of {vocab}")
    ids, places = np.unique(every, return_inverse=True)
    biased, seen, drawn, banned = np.split(places, np.cumsum([len(ids) for ids in named])[:3])
    counts = np.bincount(drawn, minlength=len(ids))
    numbers = np.zeros((5, len(ids)))
    # Minus zero changes nothing, not even the sign of a zero.
    numbers[0] = -0.0
    numbers[0, biased] += [*shaping.bias.values()]
    numbers[1] = 1.0
    numbers[1, seen] = numbers[1, drawn] = shaping.repetition
    numbers[2] = np.where(counts, _penalties(shaping, counts), 0.0)
    numbers[3, banned] = 1.0
    numbers[4] = _penalties(shaping, counts + 1)
    return ids, numbers


def _penalties(shaping: Shaping, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of ids that were drawn so often."""
    return shaping.presence + shaping.frequency * counts.astype(np.float64)


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
