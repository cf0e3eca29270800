"""What a captured step is played again as: graphs, and between them what is done anew each time.

A graph ends before the host is called (`Ops.host`), and the next begins behind that. What the host
is given a graph leaves at a fixed place, and from such a place the next one takes what the host
wrote. The host sees the rows that a run has, and never those that pad it.

How many rows the host decides there are is another number in each run, so what is computed on them
is no graph: its operations are called again each time, until results are home, on rows of the step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moebius.ops.host import HostFunction, HostResult, counted, decided_by
from moebius.ops.program import Rows

Varying = dict[int, Tensor]
"""What is on rows that the host decides, as a run has it, by the id of what stood for it when the
step was captured."""

_NOBODY = -1


class Part(Protocol):
    def run(self, rows: int, varying: Varying) -> None:
        """Of a step of so many rows."""


class Pieces:
    """A step's parts, in their order."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self.graphs = 0

    def add(self, part: Part) -> None:
        self._parts.append(part)
        self.graphs += isinstance(part, Graph)

    def replay(self, rows: int) -> None:
        """Of so many rows; those beside them are nobody's."""
        varying: Varying = {}
        with torch.inference_mode():  # as where it is not captured
            for part in self._parts:
                part.run(rows, varying)


class Graph:
    """What is launched at once."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self._replay = replay

    def run(self, rows: int, varying: Varying) -> None:
        self._replay()


class Places:
    """Where rows cross between graphs and the host: a place for each kind of tensor. All calls of
    all captured steps share them, as graphs copy and one call is under way at a time."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def of(
        self,
        use: tuple[str, int],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        """Room for rows: of a use, of what shape a row has, and of a dtype, there is one place."""
        rows, *row = shape
        kind = (use, tuple(row), dtype)
        held = self._held.get(kind)
        if held is None or len(held) < rows:
            # No tensor of inference mode: graphs write to it outside of that, too.
            with torch.inference_mode(False):
                held = nobodys(shape, dtype, device)
            self._held[kind] = held
        return held[:rows]


def nobodys(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Rows that belong to nobody: ids are of no expert, and numbers zeros."""
    value = 0 if dtype.is_floating_point else _NOBODY
    return torch.full(tuple(shape), value, dtype=dtype, device=device)


class HostCall:
    """A call to the host that writes rows of the step, which was captured for `most`.

    inputs   places, or what stands for rows that the host decides
    """

    def __init__(
        self, function: HostFunction, most: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self._function = function
        self._most = most
        self._inputs = inputs
        self._outputs = outputs

    def run(self, rows: int, varying: Varying) -> None:
        given = inputs_of(self._inputs, self._most, rows, varying)
        written = [_real(each, self._most, rows) for each in self._outputs]
        for whole, real in zip(self._outputs, written, strict=True):
            if len(real) < len(whole) and not whole.is_floating_point():
                whole[len(real) :] = _NOBODY
        counted(self._function(given, written), ())
        varying.clear()


class DecidingCall:
    """A call to the host that decides how many rows there are. made: what stands for these."""

    def __init__(
        self,
        function: HostFunction,
        most: int,
        inputs: Sequence[Tensor],
        outputs: Sequence[HostResult],
        made: Sequence[Tensor],
    ) -> None:
        self._function = function
        self._most = most
        self._inputs = inputs
        self._outputs = outputs
        self._made = made
        self._decides = decided_by(outputs)

    def run(self, rows: int, varying: Varying) -> None:
        given = inputs_of(self._inputs, self._most, rows, varying)
        written = []
        for out, made in zip(self._outputs, self._made, strict=True):
            room = out.rows.most if isinstance(out.rows, Rows) else len(varying[id(out.rows)])
            written.append(made.new_empty((room, *out.row)))
        numbers = counted(self._function(given, written), self._decides)
        counts = dict(zip(self._decides, numbers, strict=True))
        for out, made, whole in zip(self._outputs, self._made, written, strict=True):
            found = whole[: counts[out.rows]] if isinstance(out.rows, Rows) else whole
            varying[id(made)] = found


class Operation:
    """An operation on rows whose number the host decides. made: what stands for its results."""

    def __init__(
        self,
        compute: Callable[..., object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        made: Sequence[Tensor],
    ) -> None:
        self._compute = compute
        self._args = args
        self._kwargs = kwargs
        self._made = made

    def run(self, rows: int, varying: Varying) -> None:
        args = [_of_run(each, varying) for each in self._args]
        kwargs = {name: _of_run(each, varying) for name, each in self._kwargs.items()}
        found = tensors_in((self._compute(*args, **kwargs),))
        for made, result in zip(self._made, found, strict=True):
            varying[id(made)] = result


def inputs_of(inputs: Sequence[Tensor], most: int, rows: int, varying: Varying) -> list[Tensor]:
    """What the host is given in a run."""
    return [
        varying[id(each)] if id(each) in varying else _real(each, most, rows) for each in inputs
    ]


def _real(whole: Tensor, most: int, rows: int) -> Tensor:
    """The rows that are there, of a tensor of a multiple of the rows of a step."""
    return whole[: len(whole) // most * rows]


def _of_run(value: Any, varying: Varying) -> Any:
    if isinstance(value, Tensor):
        return varying.get(id(value), value)
    if type(value) in (tuple, list):
        return type(value)(_of_run(each, varying) for each in value)
    return value


def tensors_in(values: Sequence[object]) -> Iterator[Tensor]:
    """The tensors among values, and in tuples and lists of theirs."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
