"""What runs of an engine's programs bring: steps, and rows whose logits are wanted."""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moebius.ops.program import Given, Rows
from moebius.ops.steps import Step, StepInputs
from moebius.ops.transfer import send_numbers

TOKENS = "tokens"
LOGITS = "logits"

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


@dataclass(frozen=True, slots=True)
class Decodes:
    """Steps of one row a sequence, as they may come.

    sequences, context   how many at most, and of how many tokens
    block_size           of the cache that they read
    states               the model has recurrent states
    """

    sequences: int
    context: int
    block_size: int
    states: bool


class StepSource(Source[StepInputs, Step]):
    """Steps of up to `most` tokens, for `groups` groups of layers, each with a block table.

    decodes: what is known of those without prompts, for a backend that prepares for them.
    """

    def __init__(self, most: int, groups: int = 1, decodes: Decodes | None = None) -> None:
        self.rows = Rows(TOKENS, most)
        self.decodes = decodes
        self.width = 2 + groups
        self._groups = range(groups)

    def arrays(self, given: StepInputs) -> "Sequence[array[int]]":
        slots = [given.of(group).slot_mapping_host for group in self._groups]
        ids = given.input_ids_host if given.drawn is None else array("q", given.drawn.tolist())
        return [ids, given.positions_host, *slots]

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
        return send_numbers(given, torch.int64, device)

    def symbolic(self, columns: Sequence[Tensor]) -> Tensor:
        return columns[0]
