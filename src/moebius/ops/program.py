"""Programs: what a step computes, noted once and called again.

A recording is made on tensors that have shapes and no values, so that nothing of one step can slip
into all others: reading a value is not possible, and what torch computes between the operations is
noticed. Where that happens the computation is not recorded; it runs as it is, and says why.

A program's calls come in segments. Within one are the backend's own calls; between two the host is
called (`Ops.host`), for a collective or for an expert in another memory. Each call is made on a
named number of rows, which a run brings or a call to the host decides.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moebius.ops.capability import Use
from moebius.ops.steps import Step, StepInputs


@dataclass(frozen=True, slots=True)
class Rows:
    """A named number of rows (tokens, logits, received pairs); `most` is what memory is for."""

    name: str
    most: int


TOKENS = "tokens"
LOGITS = "logits"

# Given (inputs, outputs) it writes the outputs, and returns the counts that it decides.
HostFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], Mapping[str, int]]


class HostResult(NamedTuple):
    """What a call to the host writes: rows of shape `row`.

    rows   a tensor that has as many, or a count that the call decides and returns by name; then it
           is handed all `most` rows to write to
    """

    rows: Tensor | Rows
    row: tuple[int, ...]
    dtype: torch.dtype


Given = TypeVar("Given")
Wanted = TypeVar("Wanted")


class Source(ABC, Generic[Given, Wanted]):
    """How a program gets what each run brings: `width` columns of integers (int64).

    Given is what a run hands in, Wanted what the computation is called with.
    """

    rows: Rows
    width: int

    @abstractmethod
    def arrays(self, given: Given) -> "Sequence[array[int]]":
        """The columns of a run."""

    @abstractmethod
    def sequences(self, given: Given) -> StepInputs | None:
        """The step whose sequences attention is planned for, where there is one."""

    @abstractmethod
    def wanted(self, given: Given, device: torch.device | str) -> Wanted:
        """What an unrecorded run calls the computation with."""

    @abstractmethod
    def symbolic(self, columns: Sequence[Tensor]) -> Wanted:
        """What a recording calls it with."""


class RecordedStep(NamedTuple):
    """A step as a recording sees it, and the layers of one group of it."""

    input_ids: Tensor
    positions: Tensor
    slot_mappings: tuple[Tensor, ...]
    group: int = 0

    @property
    def slot_mapping(self) -> Tensor:
        return self.slot_mappings[self.group]

    def of(self, group: int) -> "RecordedStep":
        return self._replace(group=group)


class StepSource(Source[StepInputs, Step]):
    """Steps of up to `most` tokens, for `groups` groups of layers, each with a block table."""

    def __init__(self, most: int, groups: int = 1) -> None:
        self.rows = Rows(TOKENS, most)
        self.width = 2 + groups
        self._groups = range(groups)

    def arrays(self, given: StepInputs) -> "Sequence[array[int]]":
        slots = [given.of(group).slot_mapping_host for group in self._groups]
        return [given.input_ids_host, given.positions_host, *slots]

    def sequences(self, given: StepInputs) -> StepInputs:
        return given

    def wanted(self, given: StepInputs, device: torch.device | str) -> StepInputs:
        return given

    def symbolic(self, columns: Sequence[Tensor]) -> RecordedStep:
        input_ids, positions, *slots = columns
        return RecordedStep(input_ids, positions, tuple(slots))


class RowSource(Source["array[int]", Tensor]):
    """Up to `most` numbers of rows."""

    def __init__(self, name: str, most: int) -> None:
        self.rows = Rows(name, most)
        self.width = 1

    def arrays(self, given: "array[int]") -> "Sequence[array[int]]":
        return (given,)

    def sequences(self, given: "array[int]") -> None:
        return None

    def wanted(self, given: "array[int]", device: torch.device | str) -> Tensor:
        return torch.tensor(given, dtype=torch.int64, device=device)

    def symbolic(self, columns: Sequence[Tensor]) -> Tensor:
        return columns[0]


@dataclass(frozen=True, slots=True)
class Trace:
    """What recording a computation would take, told without allocating anything.

    nbytes     memory between its calls; 0 where it is not recorded
    segments   runs of the backend's own calls, with calls to the host between them
    uses       the operations that it calls, as far as it was followed
    reason     why it is not recorded; empty where it is
    layout     (place, bytes) of each of its buffers in that memory
    """

    nbytes: int
    segments: int
    uses: frozenset[Use]
    reason: str = ""
    layout: tuple[tuple[int, int], ...] = ()

    @property
    def recorded(self) -> bool:
        return not self.reason


class Program(ABC, Generic[Given]):
    """A computation to be run again and again; its result is read until the next run.

    trace   what it takes, and whether it is recorded
    whole   all rows that a result may ever have, in the place where each run leaves them, which
            another program may be recorded to read; None where it is not recorded
    """

    trace: Trace
    whole: Tensor | None = None

    @abstractmethod
    def run(self, given: Given) -> Tensor:
        """The result's rows. Raises ValueError for more rows than it was made for."""


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


def call_host(
    function: HostFunction, inputs: Sequence[Tensor], outputs: Sequence[HostResult]
) -> list[Tensor]:
    """Outside of recordings: allocate, call, and cut to the counts that the call decided."""
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


def counted(counts: Mapping[str, int], rows: Rows) -> int:
    """What a call to the host says of a count that it decides. Raises ValueError."""
    found = counts.get(rows.name)
    if found is None or not 0 <= found <= rows.most:
        raise ValueError(
            f"a call to the host decided that there are {found} {rows.name}; it must return "
            f"between 0 and {rows.most} under that name"
        )
    return found
