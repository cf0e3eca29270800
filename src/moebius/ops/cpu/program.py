"""Programs of the CPU's kernels: their calls in memory of its own, with the host in between."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu.recorder import HostCall, NativeCall, Recorder, View
from moebius.ops.host import counted
from moebius.ops.program import Given, Program, Rows, Trace
from moebius.ops.sources import Source, Wanted

_ALIGNMENT = 64
# Views of up to so many rows are kept: as many as decodes have.
_MOST_KEPT = 256


class Memory:
    """What a program's buffers lie in; of pages that nobody touches nothing is taken."""

    def __init__(self, nbytes: int) -> None:
        block = np.empty(nbytes + _ALIGNMENT, np.uint8)
        self.bytes = torch.from_numpy(block[-block.ctypes.data % _ALIGNMENT :][:nbytes])
        self.address = self.bytes.data_ptr()
        self.nbytes = nbytes

    def whole(self, view: View) -> Tensor:
        """All rows that a view may ever have."""
        buffer = view.buffer
        flat = self.bytes[buffer.at :][: buffer.nbytes].view(view.dtype)
        return flat.view(buffer.rows.most * view.factor, *view.row)


class _RunRows:
    """As many rows of a view as a run has.

    Of few rows they are made once: it costs torch as much as a small kernel.
    """

    def __init__(self, view: View, memory: Memory, counts: Sequence[Rows]) -> None:
        rows = view.buffer.rows
        self.whole = memory.whole(view)
        self._count = counts.index(rows)
        self._factor = view.factor
        self._views = {rows.most: self.whole}

    def of(self, counts: Sequence[int]) -> Tensor:
        count = counts[self._count]
        found = self._views.get(count)
        if found is None:
            found = self.whole[: count * self._factor]
            if count <= _MOST_KEPT:
                self._views[count] = found
        return found


class _Host:
    """A call to the host, over a program's memory."""

    def __init__(self, call: HostCall, memory: Memory, counts: Sequence[Rows]) -> None:
        self._function = call.function
        self._inputs = [_RunRows(each, memory, counts) for each in call.inputs]
        self._outputs = [_RunRows(each, memory, counts) for each in call.outputs]
        self._decides = call.decides
        self._places = [counts.index(rows) for rows in call.decides]

    def run(self, counts: list[int]) -> None:
        inputs = [each.of(counts) for each in self._inputs]
        for at, rows in zip(self._places, self._decides, strict=True):
            counts[at] = rows.most
        outputs = [each.of(counts) for each in self._outputs]
        decided = counted(self._function(inputs, outputs), self._decides)
        for at, number in zip(self._places, decided, strict=True):
            counts[at] = number


class _Segment:
    """Calls of the kernels, without anything between them."""

    def __init__(self, native: _cpu.Program, first: int, stop: int) -> None:
        self._native = native
        self._first = first
        self._stop = stop

    def run(self, counts: list[int]) -> None:
        self._native.run(self._first, self._stop, counts)


class RecordedProgram(Program[Given]):
    """Calls that were noted once, and are made again on as many rows as come."""

    def __init__(
        self,
        ops: _cpu.Ops,
        source: Source[Given, Wanted],
        recorder: Recorder,
        result: View,
        memory: Memory,
        trace: Trace,
    ) -> None:
        self.trace = trace
        self._arrays = source.arrays
        self._sequences = source.sequences
        self._rows = source.rows
        self._plans = recorder.plans
        counts = _counts(source.rows, recorder.calls)
        self._num_decided = len(counts) - 1
        self._only_native = all(isinstance(call, NativeCall) for call in recorder.calls)
        places = [memory.address + each.at for each in recorder.buffers[: source.width]]
        self._native = _cpu.Program(columns=places, counts=[0] * source.width)
        self._parts = self._make_parts(ops, recorder.calls, memory, counts)
        self._result = _RunRows(result, memory, counts)
        self.whole: Tensor = self._result.whole
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
        columns = []
        for x in arrays:
            at, length = x.buffer_info()
            if length != count:
                raise ValueError(f"a column of {length} beside one of {count} {self._rows.name}")
            columns.append(at)
        counts = [count]
        if self._only_native:
            self._native(columns, counts)
        else:
            counts += [0] * self._num_decided
            self._native.load(columns, counts)
            with torch.inference_mode():  # as where it is not recorded
                for part in self._parts:
                    part.run(counts)
        return self._result.of(counts)


def _counts(given: Rows, calls: Sequence[NativeCall | HostCall]) -> list[Rows]:
    """What a run's counts are, in their order: the one that it brings, then those decided in it."""
    decided = [rows for call in calls if isinstance(call, HostCall) for rows in call.decides]
    return list(dict.fromkeys([given, *decided]))
