"""Following a computation on tensors without values, to learn what it calls and needs."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moebius import _cpu
from moebius.ops.capability import Feature, Operation, Use
from moebius.ops.host import HostFunction, HostResult, decided_by
from moebius.ops.program import Rows
from moebius.ops.shapes import SHAPES
from moebius.ops.steps import StepInputs

# Buffers begin at cache lines.
_ALIGNMENT = 64

# Within it no mode of torch is asked: the recorder's own looks at tensors, some twenty for each
# operation, need not be watched.
_unwatched = torch._C.DisableTorchFunction


class NotRecorded(Exception):
    """Why a computation cannot be recorded."""


class Call(Protocol):
    """An operation of the kernels with its arguments (moebius._cpu has one class for each)."""

    def run(self, ops: _cpu.Ops, rows: int) -> None: ...

    def note(self, ops: _cpu.Ops, program: _cpu.Program, count: int, factor: int) -> None:
        """To be made again on `factor` times the rows of a run's count, over the same memory."""


class StepPlan(Protocol):
    """What a program tells a backend of each run's sequences."""

    def set(self, step: StepInputs) -> None: ...


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory between calls.

    whole         all its rows, on meta
    rows          the count that says how many of them a run has
    decided       how often that count had been decided when the buffer was written
    first, last   the calls from which on and up to which it is needed
    at            where it lies in the program's memory
    """

    whole: Tensor
    rows: Rows
    decided: int
    first: int
    last: int
    at: int = 0

    @property
    def nbytes(self) -> int:
        return self.whole.numel() * self.whole.element_size()


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A buffer as it is seen outside: `factor` rows, of shape `row`, for each of its count's."""

    buffer: Buffer
    factor: int
    row: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class NativeCall:
    """A call of the kernels on `factor` times the rows of a count."""

    call: Call
    rows: Rows
    factor: int


@dataclass(frozen=True, slots=True, eq=False)
class HostCall:
    """A call to the host, and the counts that it decides."""

    function: HostFunction
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]
    decides: tuple[Rows, ...]


class Recorder:
    """Notes the calls of one computation, over the same memory in each run.

    It is used twice: at first it learns which buffers there are and from which call to which each
    is needed (`place` then says where they lie), and then, given these places and the memory's
    address, it notes the calls with all of their addresses.

    on_meta: weights and caches have no memory either, and nothing will be run.
    """

    def __init__(
        self,
        rows: Rows,
        width: int,
        places: Sequence[int] = (),
        memory: int = 0,
        *,
        on_meta: bool = False,
    ) -> None:
        self.calls: list[NativeCall | HostCall] = []
        self.buffers: list[Buffer] = []
        # Attention plans, each with the group of layers whose block table it is told.
        self.plans: list[tuple[StepPlan, int]] = []
        self.uses: set[Use] = set()
        # What calls point to besides the buffers.
        self.held: list[object] = []
        self.reason = ""
        self._rows = rows
        self._places = places
        self._memory = memory
        self._on_meta = on_meta
        self._of: dict[int, Buffer] = {}
        # The buffers that the next call is given.
        self._given: list[Buffer] = []
        # How often calls to the host have decided each count.
        self._decided = Counter[Rows]()
        self._watch = _Watch(self)
        self.columns = [self._buffer(rows, (rows.most,), torch.int64) for _ in range(width)]

    def _buffer(self, rows: Rows, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # Only tensors of no inference mode know how often they were changed.
        with _unwatched(), torch.inference_mode(False):
            whole = torch.empty(shape, dtype=dtype, device="meta")
        now = len(self.calls)
        buffer = Buffer(whole, rows, self._decided[rows], first=now, last=now)
        if self._places:
            if len(self.buffers) == len(self._places):
                raise self.refuse("it called other operations than were planned")
            buffer.at = self._places[len(self.buffers)]
        self.buffers.append(buffer)
        with _unwatched():
            self._of[whole.untyped_storage()._cdata] = buffer
        return whole

    def find(self, x: Tensor) -> Buffer | None:
        """The buffer that x is a view of."""
        return self._of.get(x.untyped_storage()._cdata) if x.is_meta else None

    def makes(self, given: Sequence[object], out: object) -> bool:
        """Whether a tensor on meta came of none: one like a step's, by somebody else."""
        if any(x.is_meta for x in _tensors(given)):
            return False
        return any(x.is_meta for x in _tensors((out,)))

    def refuse(self, reason: str) -> NotRecorded:
        """To be raised; it holds even where somebody catches it."""
        self.reason = self.reason or reason
        return NotRecorded(reason)

    def buffer_of(self, x: Tensor) -> Buffer:
        """The buffer whose rows x has, all of them."""
        with _unwatched():
            return self._buffer_of(x)

    def _buffer_of(self, x: Tensor) -> Buffer:
        found = self.find(x)
        if found is None:
            raise self.refuse("an operation is given a tensor that is not of this step")
        if x.storage_offset() or x.numel() * x.element_size() != found.nbytes:
            raise self.refuse("an operation is given some of a step's rows or columns")
        if found.decided != self._decided[found.rows]:
            raise self.refuse(f"it was written before the number of {found.rows.name} changed")
        return found

    def view_of(self, x: Tensor) -> View:
        """x as it is to be seen at the next call, or behind the last."""
        buffer = self.buffer_of(x)
        buffer.last = len(self.calls)
        factor, rest = divmod(len(x) if x.dim() else 0, buffer.rows.most)
        if rest or not factor or not x.is_contiguous():
            raise self.refuse("a step's rows are wanted in another order")
        return View(buffer, factor, tuple(x.shape[1:]), x.dtype)

    def empty(self, like: Tensor, row: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for as many rows as `like` has."""
        return self._buffer(self.buffer_of(like).rows, (len(like), *row), dtype)

    def address(self, x: Tensor) -> int:
        """Where the next call finds x: a buffer's place, or where a weight or a cache lies."""
        with _unwatched():
            if self.find(x) is not None:
                buffer = self._buffer_of(x)
                buffer.last = len(self.calls)
                self._given.append(buffer)
                return self._memory + buffer.at
            if x.is_meta and not self._on_meta:
                raise self.refuse("an operation is given a tensor that was made for a step")
            self.held.append(x.detach())
            return 0 if x.is_meta else x.data_ptr()

    def note(
        self,
        operation: Operation,
        call: Call,
        x: Tensor,
        rows: int,
        dtype: torch.dtype,
        features: frozenset[Feature],
    ) -> None:
        """`call`, which computes in `dtype` on `rows` rows: those of x or a multiple of them."""
        count = self.buffer_of(x).rows
        if rows % count.most:
            raise self.refuse(f"{operation} is called on another number of rows than the step's")
        for other in self._given:
            if other.rows != count:
                raise self.refuse(
                    f"{operation} is called on as many {count.name} as {other.rows.name}, which "
                    "may differ"
                )
        self._given.clear()
        self.uses.add(Use(operation, dtype, features))
        self.calls.append(NativeCall(call, count, rows // count.most))

    def note_host(
        self, function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
    ) -> list[Tensor]:
        """A call to the host, and what it writes."""
        given = tuple(self.view_of(x) for x in inputs)
        rows_of = [
            each.rows if isinstance(each.rows, Rows) else self.buffer_of(each.rows).rows
            for each in outputs
        ]
        decides = decided_by(outputs)
        for rows in decides:
            self._require_own_name(rows)
            self._decided[rows] += 1
        made: list[Tensor] = []
        for rows, (like, row, dtype) in zip(rows_of, outputs, strict=True):
            number = rows.most if isinstance(like, Rows) else len(like)
            made.append(self._buffer(rows, (number, *row), dtype))
        self.calls.append(HostCall(function, given, tuple(map(self.view_of, made)), decides))
        return made

    def _require_own_name(self, rows: Rows) -> None:
        """A name means one count: raises ValueError for the run's, or one of another `most`."""
        for other in (self._rows, *self._decided):
            if other.name == rows.name and (other == self._rows or other != rows):
                raise ValueError(f"a call to the host decides {rows}, but there are {other}")

    @property
    def segments(self) -> int:
        """Runs of the kernels' calls."""
        kinds = [isinstance(each, NativeCall) for each in self.calls]
        return sum(native and (i == 0 or not kinds[i - 1]) for i, native in enumerate(kinds))

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Within it what torch does to this recorder's tensors is watched."""
        random = torch.get_rng_state()
        with self._watch:
            yield
        if not torch.equal(torch.get_rng_state(), random):
            self.refuse("it draws random numbers, which would be the same in each run")

    @contextmanager
    def unwatched(self, tensors: Iterable[Tensor | None]) -> Iterator[None]:
        """Within it the backend looks at weights, of which there are thousands: watching each look
        would take longer than all else."""
        # torch keeps modes on a stack, and this one is on top.
        self._watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            if not self._on_meta and any(x is not None and x.is_meta for x in tensors):
                raise self.refuse("a weight is a tensor that was made for a step")
            yield
        finally:
            self._watch.__enter__()  # type: ignore[no-untyped-call]


class _Watch(TorchFunctionMode):
    """Lets views pass, and refuses all else that torch could do with a tensor of the recording."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__" or func in SHAPES:
            return func(*args, **kwargs)
        given = (*args, *kwargs.values())
        touched = [x for x in _tensors(given) if self._recorder.find(x) is not None]
        if not touched:
            out = func(*args, **kwargs)
            if self._recorder.makes(args, out):
                raise self._recorder.refuse(f"torch's {name} makes a tensor for a step")
            return out
        if func is Tensor.data_ptr:
            raise self._recorder.refuse("Tensor.data_ptr asks for the address of a step's tensor")
        before = [x._version for x in touched]
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            raise self._recorder.refuse(f"torch's {name} needs a step's values") from error
        if [x._version for x in touched] != before:
            raise self._recorder.refuse(f"torch's {name} changes a tensor between the operations")
        for x in _tensors((out,)):
            if self._recorder.find(x) is None:
                raise self._recorder.refuse(f"torch's {name} computes between the operations")
        return out


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def place(buffers: Sequence[Buffer]) -> tuple[tuple[int, ...], int]:
    """A place for each buffer, and the memory that all need.

    None shares a byte with another that is needed at the same time. Each takes the lowest room
    there is; in a decoder, whose layers need the same, that is the best.
    """
    places: list[int] = []
    taken: list[tuple[int, int, int]] = []  # (from, to, last call)
    size = 0
    for buffer in buffers:
        taken = sorted(each for each in taken if each[2] >= buffer.first)
        nbytes = -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
        at = 0
        for start, stop, _ in taken:
            if start - at >= nbytes:
                break
            at = max(at, stop)
        places.append(at)
        taken.append((at, at + nbytes, buffer.last))
        size = max(size, at + nbytes)
    return tuple(places), size
