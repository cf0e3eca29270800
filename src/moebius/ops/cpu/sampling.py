"""From logits to tokens by the CPU's kernels."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu.base import CpuBase, address
from moebius.ops.sampling import Shaping, TopK, only_allowed


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
        before = self._native.shape(
            _logits(logits_LV), rows, [_shaping(shaping) for shaping in shapings]
        )
        try:
            with only_allowed(logits_LV, rows, shapings):
                yield
        finally:
            before.restore()


def _logits(logits_LV: Tensor) -> _cpu.Logits:
    return _cpu.Logits(address(logits_LV, torch.float32), *logits_LV.shape)


def _shaping(s: Shaping) -> _cpu.Shaping:
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
