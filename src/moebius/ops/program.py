"""Programs: what a step computes, noted once and called again.

A recording is made on tensors that have shapes and no values, so that nothing of one step can slip
into all others: reading a value is not possible, and what torch computes between the operations is
noticed. Where that happens the computation is not recorded; it runs as it is, and says why.

A program's calls come in segments. Within one are the backend's own calls; between two the host is
called (`Ops.host`), for a collective or for an expert in another memory. Each call is made on a
named number of rows, which a run brings or a call to the host decides.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from moebius.ops.capability import Use


@dataclass(frozen=True, slots=True)
class Rows:
    """A named number of rows (tokens, logits, received pairs); `most` is what memory is for."""

    name: str
    most: int


Given = TypeVar("Given")


@dataclass(frozen=True, slots=True)
class Trace:
    """What recording a computation would take, told without allocating anything.

    nbytes     memory between its calls; 0 where it is not recorded
    segments   runs of the backend's own calls, with calls to the host between them
    uses       the operations that it calls, as far as it was followed
    reason     why it is not recorded; empty where it is
    places     where each of its buffers lies in that memory
    """

    nbytes: int
    segments: int
    uses: frozenset[Use]
    reason: str = ""
    places: tuple[int, ...] = ()

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
