"""From logits to tokens by the CPU's kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu.base import CpuBase, address
from moebius.ops.sampling import Shaping, TopK, with_newest
from moebius.ops.transfer import send_numbers


class SamplingOps(CpuBase):
    def argmax(self, logits_LV: Tensor, rows: Sequence[int] | None = None) -> list[int]:
        return self._native.argmax(
            self._logits(logits_LV), range(len(logits_LV)) if rows is None else rows
        )

    def draw(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[float],
    ) -> list[int]:
        return self._native.draw(self._logits(logits_LV), rows, temperatures, uniforms)

    def log_softmax_top_k(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
        temperatures: Sequence[float] | None = None,
    ) -> TopK:
        counts = [min(count, logits_LV.shape[1]) for count in counts]
        heats = [1.0] * len(rows) if temperatures is None else temperatures
        log_sums_R = torch.empty(len(rows), dtype=torch.float64)
        values = torch.empty(sum(counts))
        ids = torch.empty(sum(counts), dtype=torch.int64)
        into = (log_sums_R.data_ptr(), values.data_ptr(), ids.data_ptr())
        self._native.log_softmax_top_k(self._logits(logits_LV), rows, counts, heats, *into)
        return TopK(log_sums_R, values, ids)

    def ranks(self, logits_LV: Tensor, rows: Sequence[int], ids_R: Tensor) -> Tensor:
        ranks = self._native.ranks(self._logits(logits_LV), rows, ids_R.tolist())
        return send_numbers(ranks, torch.int64, logits_LV.device)

    @contextmanager
    def shaped(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        shapings: Sequence[Shaping],
        newest_R: Tensor | None = None,
    ) -> Iterator[None]:
        shapings = with_newest(shapings, newest_R)
        logits = _logits(logits_LV)
        named: list[int] = []
        changes: list[_cpu.Shaping] = []
        for row, shaping in zip(rows, shapings, strict=True):
            if shaping.allowed is not None:
                logits.allow(row, *_words(shaping.allowed))
            if shaping.named:
                named.append(row)
                changes.append(_changes(shaping))
        before = self._native.shape(logits, named, changes)
        self._shaped = (logits_LV, logits)
        try:
            yield
        finally:
            self._shaped = None
            before.restore()

    def _logits(self, logits_LV: Tensor) -> _cpu.Logits:
        """Within `shaped`, with what is allowed in them: rows are bounded as they are read."""
        if self._shaped is not None and self._shaped[0] is logits_LV:
            return self._shaped[1]
        return _logits(logits_LV)


def _logits(logits_LV: Tensor) -> _cpu.Logits:
    return _cpu.Logits(address(logits_LV, torch.float32), *logits_LV.shape)


def _words(ids: NDArray[np.uint32]) -> tuple[int, int]:
    """Where a set of ids lies, and how many words it has."""
    if not (ids.dtype == np.uint32 and ids.flags.c_contiguous):
        raise ValueError(
            f"a set of ids is contiguous words of uint32, not {ids.dtype} with strides "
            f"{ids.strides}"
        )
    return ids.__array_interface__["data"][0], ids.size  # ids.ctypes takes five times as long


def _changes(s: Shaping) -> _cpu.Shaping:
    return _cpu.Shaping(
        biased=list(s.bias),
        bias=list(s.bias.values()),
        seen=s.seen,
        drawn=s.drawn,
        repetition=s.repetition,
        presence=s.presence,
        frequency=s.frequency,
        banned=s.banned,
    )
