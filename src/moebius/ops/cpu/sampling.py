"""From logits to tokens by the CPU's kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu.base import CpuBase, address
from moebius.ops.sampling import Shaping, TopK


class SamplingOps(CpuBase):
    def argmax(self, logits_LV: Tensor, rows: Sequence[int] | None = None) -> list[int]:
        return self._native.argmax(
            _logits(logits_LV), range(len(logits_LV)) if rows is None else rows
        )

    def draw(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[float],
    ) -> list[int]:
        return self._native.draw(_logits(logits_LV), rows, temperatures, uniforms)

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
        self._native.log_softmax_top_k(_logits(logits_LV), rows, counts, heats, *into)
        return TopK(log_sums_R, values, ids)

    def ranks(self, logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        return self._native.ranks(_logits(logits_LV), rows, token_ids)

    @contextmanager
    def shaped(
        self, logits_LV: Tensor, rows: Sequence[int], shapings: Sequence[Shaping]
    ) -> Iterator[None]:
        kept = self._room_for(logits_LV.shape[1] * sum(s.allowed is not None for s in shapings))
        before = self._native.shape(
            _logits(logits_LV), rows, [_shaping(shaping) for shaping in shapings], address(kept)
        )
        try:
            yield
        finally:
            before.restore()
            self._kept = kept

    def _room_for(self, floats: int) -> Tensor:
        """Memory that was there before, if it can be: new pages cost more than what is written to
        them here."""
        kept = self._kept
        self._kept = torch.empty(0)
        return kept if len(kept) >= floats else torch.empty(floats)


def _logits(logits_LV: Tensor) -> _cpu.Logits:
    return _cpu.Logits(address(logits_LV, torch.float32), *logits_LV.shape)


def _shaping(s: Shaping) -> _cpu.Shaping:
    """What is allowed is read when rows are shaped, and not afterwards."""
    ids = s.allowed
    if ids is not None and not (ids.dtype == np.uint32 and ids.flags.c_contiguous):
        raise ValueError(
            f"a set of ids is contiguous words of uint32, not {ids.dtype} with strides "
            f"{ids.strides}"
        )
    return _cpu.Shaping(
        biased=list(s.bias),
        bias=list(s.bias.values()),
        seen=s.seen,
        drawn=s.drawn,
        repetition=s.repetition,
        presence=s.presence,
        frequency=s.frequency,
        banned=s.banned,
        allowed=0 if ids is None else ids.ctypes.data,
        words=0 if ids is None else ids.size,
    )
