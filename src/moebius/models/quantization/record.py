"""The record that every `quantization_config` becomes: which matrices are stored how."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# What stands behind a module's name in that of its weight.
WEIGHT = ".weight"


class Plane(NamedTuple):
    """A tensor that is a plane of a matrix.

    dtypes   what the file may call its numbers
    shapes   that it may have: the same numbers in the same order
    """

    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


class Described(Protocol):
    """A tensor of a file, as its header has it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


# By name.
Tensors = Mapping[str, Described]


class Repacking(NamedTuple):
    """A format with the very same numbers, and its bytes."""

    format: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Parts:
    """What a matrix is made of: a format (moebius.ops.formats), and a tensor for each plane.

    repacking   what is made of it when it is loaded, of what no product reads as it is stored
    """

    format: str
    planes: tuple[Plane, ...]
    repacking: Repacking | None = None


class Scheme(ABC):
    """One way in which a matrix (rows, columns) is stored, or several side by side (E, ...).

    codes_dtypes   what files may call its codes, by which they are told from plain numbers
    """

    codes_dtypes: tuple[str, ...]

    @abstractmethod
    def codes(self, name: str) -> str:
        """The tensor with the codes of the weight that would be `name` in plain numbers."""

    @abstractmethod
    def parts(self, name: str, shape: tuple[int, ...], found: "Tensors") -> Parts:
        """What the weight `name` of `shape` is made of.

        found: the checkpoint's tensors; where one is missing, or is another than Parts says, the
        caller says so. Raises ValueError for a shape that cannot be stored so.
        """


class Matches(Protocol):
    """Whether a rule is for a module."""

    def __call__(self, module: str, kind: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """How modules that match are stored; None: in plain numbers."""

    matches: Matches
    scheme: Scheme | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's matrices are stored.

    method   what its configuration calls it
    rules    the first that matches a module counts; where none does, its numbers are plain
    unread   last parts of the names of tensors that nothing here is computed with, such as scales
             of activations, which are not quantised
    """

    method: str
    rules: tuple[Rule, ...]
    unread: frozenset[str] = frozenset()

    def scheme(self, module: str, kind: str = "Linear") -> Scheme | None:
        """How a module's weight is stored where it is quantised. kind: Linear or Embedding."""
        found = (rule.scheme for rule in self.rules if rule.matches(module, kind))
        return next(found, None)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """All that there are."""
        return tuple(rule.scheme for rule in self.rules if rule.scheme is not None)


def module_of(name: str) -> str:
    """The module whose weight a tensor is: its name without `.weight`."""
    return name.removesuffix(WEIGHT)


def beside(name: str, what: str) -> str:
    """The tensor `what` of the module whose weight is `name`: X.weight -> X.what."""
    return f"{module_of(name)}.{what}"


def lead(shape: tuple[int, ...], *shapes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """These shapes for each of the matrices that stand side by side in `shape`."""
    return tuple((*shape[:-2], *each) for each in shapes)
