"""Programs of plain PyTorch, which records nothing: the computation itself, called anew."""

from collections.abc import Callable, Sequence
from typing import Generic

import torch
from torch import Tensor

from moebius.ops.host import HostFunction, HostResult, counted
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
        made = []
        for result in outputs:
            rows = result.rows.most if isinstance(result.rows, Rows) else len(result.rows)
            shape = (rows, *result.row)
            made.append(torch.empty(shape, dtype=result.dtype, device=inputs[0].device))
        counts = function(inputs, made)
        return [
            out[: counted(counts, result.rows)] if isinstance(result.rows, Rows) else out
            for out, result in zip(made, outputs, strict=True)
        ]
