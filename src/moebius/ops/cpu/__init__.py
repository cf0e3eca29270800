"""The operations on a CPU: csrc's kernels. Weights are read where they lie, never packed or copied.

The instruction set is the best that the processor has; the environment variable MOEBIUS_CPU_ISA
limits it (portable, avx2, avx512, avx512vnni, avx512bf16, amx, or reference for plain PyTorch).
Every kernel computes a row in the same way whatever rows surround it, however many threads there
are and wherever the KV cache holds its tokens: they are batch invariant (promise P1). Products with
weights in blocks have the same bits on every instruction set (csrc/block_kernels.h), and so have
recurrent layers (csrc/recurrent.h).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moebius.ops.capability import Capability, Operation, Use
from moebius.ops.cpu.attention import AttentionOps
from moebius.ops.cpu.base import DTYPES
from moebius.ops.cpu.experts import ExpertOps
from moebius.ops.cpu.linear import LinearOps
from moebius.ops.cpu.pointwise import PointwiseOps
from moebius.ops.cpu.program import Memory, RecordedProgram
from moebius.ops.cpu.recorder import NotRecorded, Recorder, View, place
from moebius.ops.cpu.recurrent import RecurrentOps
from moebius.ops.cpu.sampling import SamplingOps
from moebius.ops.host import HostFunction, HostResult
from moebius.ops.program import Given, Program, Trace
from moebius.ops.reference.program import Unrecorded
from moebius.ops.sources import Source, Wanted

__all__ = ["CpuOps", "RecordedProgram"]


class CpuOps(LinearOps, PointwiseOps, AttentionOps, RecurrentOps, ExpertOps, SamplingOps):
    """C++ kernels on `threads` threads of a pool of their own."""

    def capability(self, use: Use) -> Capability | None:
        if use.dtype not in DTYPES:
            return None
        if use.operation == Operation.ROTARY:
            return self._fallback.capability(use)
        recorded = use.operation != Operation.SAMPLING
        return Capability(self.name, batch_invariant=True, recorded=recorded)

    def trace(self, compute: Callable[[Wanted], Tensor], source: Source[Given, Wanted]) -> Trace:
        return self._trace(compute, source, on_meta=True)

    def record(
        self,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        device: torch.device | str,
        planned: Trace | None = None,
    ) -> Program[Given]:
        trace = planned or self._trace(compute, source)
        if not trace.recorded:
            return Unrecorded(compute, source, device, trace)
        memory = Memory(trace.nbytes)
        recorder = Recorder(source.rows, source.width, trace.places, memory.address)
        try:
            result = self._follow(recorder, compute, source)
            if place(recorder.buffers) != (trace.places, trace.nbytes):
                raise recorder.refuse("it called other operations than were planned")
        except NotRecorded as why:
            trace = Trace(0, 1, frozenset(recorder.uses), str(why))
            return Unrecorded(compute, source, device, trace)
        return RecordedProgram(self._native, source, recorder, result, memory, trace)

    def _trace(
        self,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        *,
        on_meta: bool = False,
    ) -> Trace:
        recorder = Recorder(source.rows, source.width, on_meta=on_meta)
        try:
            self._follow(recorder, compute, source)
        except NotRecorded as why:
            return Trace(0, 1, frozenset(recorder.uses), str(why))
        places, nbytes = place(recorder.buffers)
        return Trace(nbytes, recorder.segments, frozenset(recorder.uses), places=places)

    def _follow(
        self,
        recorder: Recorder,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
    ) -> View:
        """Note what `compute` calls; its result. Raises NotRecorded."""
        self._recorder = recorder
        try:
            with recorder.follow():
                out = compute(source.symbolic(recorder.columns))
        finally:
            self._recorder = None
        if recorder.reason:
            raise NotRecorded(recorder.reason)
        return recorder.view_of(out)

    def host(
        self, function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
    ) -> list[Tensor]:
        if self._recorder is None:
            return self._fallback.host(function, inputs, outputs)
        return self._recorder.note_host(function, inputs, outputs)
