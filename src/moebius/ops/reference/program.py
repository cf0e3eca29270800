"""Programs of plain PyTorch, which records nothing: the computation itself, called anew."""

from collections.abc import Callable, Sequence
from typing import Generic

import torch
from torch import Tensor

from moebius.ops.host import HostFunction, HostResult, counted, decided_by
from moebius.ops.interface import Ops
from moebius.ops.program import Given, Program, Rows, Trace
from moebius.ops.sources import Source, Wanted


class Unrecorded(Program[Given], Generic[Given, Wanted]):
    """The computation as it is, called anew each time."""

    def __init__(
        self,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        device: torch.device | str,
        trace: Trace,
    ) -> None:
        self.trace = trace
        self._compute = compute
        self._source = source
        self._device = device

    def run(self, given: Given) -> Tensor:
        return self._compute(self._source.wanted(given, self._device))


class ProgramOps(Ops):
    """Nothing is recorded."""

    def trace(self, compute: Callable[[Wanted], Tensor], source: Source[Given, Wanted]) -> Trace:
        return Trace(0, 1, frozenset(), "plain PyTorch is not recorded")

    def record(
        self,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        device: torch.device | str,
        planned: Trace | None = None,
    ) -> Program[Given]:
        return Unrecorded(compute, source, device, planned or self.trace(compute, source))

    def host(
        self, function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
    ) -> list[Tensor]:
        device = inputs[0].device if inputs else None
        made = []
        for rows, row, dtype in outputs:
            number = rows.most if isinstance(rows, Rows) else len(rows)
            made.append(torch.empty((number, *row), dtype=dtype, device=device))
        decides = decided_by(outputs)
        counts = dict(zip(decides, counted(function(inputs, made), decides), strict=True))
        return [
            out[: counts[rows]] if isinstance(rows, Rows) else out
            for out, (rows, _, _) in zip(made, outputs, strict=True)
        ]
