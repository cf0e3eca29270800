"""Programs of the CPU's kernels: their calls in memory of its own, with the host in between."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu.recorder import Buffer, HostCall, NativeCall, Recorder
from moebius.ops.host import counted
from moebius.ops.program import Given, Program, Rows, Trace
from moebius.ops.sources import Source, Wanted

_ALIGNMENT = 64


class Memory:
    """What a program's buffers lie in; of pages that nobody touches nothing is taken."""

    def __init__(self, nbytes: int) -> None:
        block = np.empty(nbytes + _ALIGNMENT, np.uint8)
        self.bytes = torch.from_numpy(block[-block.ctypes.data % _ALIGNMENT :][:nbytes])
        self.address = self.bytes.data_ptr()
        self.nbytes = nbytes

    def rows(self, buffer: Buffer) -> Tensor:
        """A buffer's rows."""
        shape = buffer.whole.shape
        return self.bytes[buffer.at :][: buffer.nbytes].view(buffer.whole.dtype).view(shape)


class _Host:
    """A call to the host, over a program's memory."""

    def __init__(self, call: HostCall, memory: Memory, counts: Sequence[Rows]) -> None:
        self._function = call.function
        self._inputs = [(memory.rows(each), *_count(each, counts)) for each in call.inputs]
        self._outputs = [(memory.rows(each), *_count(each, counts)) for each in call.outputs]
        self._decides = [(counts.index(rows), rows) for rows in call.decides]

    def run(self, counts: list[int]) -> None:
        for at, rows in self._decides:
            counts[at] = rows.most
        inputs = [whole[: counts[at] * factor] for whole, at, factor in self._inputs]
        outputs = [whole[: counts[at] * factor] for whole, at, factor in self._outputs]
        decided = self._function(inputs, outputs)
        for at, rows in self._decides:
            counts[at] = counted(decided, rows)


class _Segment:
    """Calls of the kernels, without anything between them."""

    def __init__(self, native: _cpu.Program, first: int, stop: int) -> None:
        self._native = native
        self._first = first
        self._stop = stop

    def run(self, counts: list[int]) -> None:
        self._native.run(self._first, self._stop, counts)


def _count(buffer: Buffer, counts: Sequence[Rows]) -> tuple[int, int]:
    return counts.index(buffer.rows), buffer.factor


class RecordedProgram(Program[Given]):
    """Calls that were noted once, and are made again on as many rows as come."""

    def __init__(
        self,
        ops: _cpu.Ops,
        source: Source[Given, Wanted],
        recorder: Recorder,
        result: Buffer,
        memory: Memory,
        trace: Trace,
    ) -> None:
        self.trace = trace
        self._arrays = source.arrays
        self._sequences = source.sequences
        self._rows = source.rows
        self._plans = recorder.plans
        counts = _counts(source.rows, recorder.calls)
        self._num_counts = len(counts)
        places = [memory.address + each.at for each in recorder.buffers[: source.width]]
        self._native = _cpu.Program(columns=places, counts=[0] * source.width)
        self._parts = self._make_parts(ops, recorder.calls, memory, counts)
        self.whole: Tensor = memory.rows(result)
        self._result_count = counts.index(result.rows)
        self._result_factor = result.factor
        self._views: dict[int, Tensor] = {}
        self.memory = memory
        self._held = (ops, recorder.calls, recorder.held)

    def _make_parts(
        self,
        ops: _cpu.Ops,
        calls: Sequence[NativeCall | HostCall],
        memory: Memory,
        counts: Sequence[Rows],
    ) -> list[_Segment | _Host]:
        parts: list[_Segment | _Host] = []
        first = noted = 0
        for call in calls:
            if isinstance(call, NativeCall):
                call.call.note(ops, self._native, counts.index(call.rows), call.factor)
                noted += 1
                continue
            if noted > first:
                parts.append(_Segment(self._native, first, noted))
                first = noted
            parts.append(_Host(call, memory, counts))
        if noted > first:
            parts.append(_Segment(self._native, first, noted))
        return parts

    def run(self, given: Given) -> Tensor:
        arrays = self._arrays(given)
        count = len(arrays[0])
        if count > self._rows.most:
            raise ValueError(
                f"{count} {self._rows.name} where {self._rows.most} were said to be the most"
            )
        if self._plans:
            step = self._sequences(given)
            assert step is not None, "attention is recorded, but a run brings no sequences"
            for plan, group in self._plans:
                plan.set(step.of(group))
        columns = [x.buffer_info()[0] for x in arrays]
        if len(self._parts) == 1 and self._num_counts == 1:
            self._native(columns, [count])
            rows = count * self._result_factor
        else:
            counts = [count] + [0] * (self._num_counts - 1)
            self._native.load(columns, counts)
            for part in self._parts:
                part.run(counts)
            rows = counts[self._result_count] * self._result_factor
        if rows not in self._views:  # a view costs torch as much as a small kernel
            self._views[rows] = self.whole[:rows]
        return self._views[rows]


def _counts(given: Rows, calls: Sequence[NativeCall | HostCall]) -> list[Rows]:
    """What a run's counts are, in their order: the one that it brings, then those decided in it."""
    decided = [rows for call in calls if isinstance(call, HostCall) for rows in call.decides]
    return list(dict.fromkeys([given, *decided]))
