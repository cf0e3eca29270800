"""A weight is a `Matrix`: a format, a shape, and planes that lie where a file was mapped.

A new format is one subclass of `Format`, registered in FORMATS, and the kernels that read it. Plain
PyTorch computes with any of them by widening it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Planes = tuple[Tensor, ...]
# A plane's dtype and shape.
PlaneShape = tuple[torch.dtype, tuple[int, ...]]


class Format(ABC):
    """How the numbers of a matrix (rows, columns) lie in its planes, one or several tensors.

    Quantised formats have codes in one plane and scales in another; a plane of blocks that hold
    both is bytes.
    """

    name: str

    @abstractmethod
    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        """Dtype and shape of each plane of such a matrix. Raises ValueError for impossible ones."""

    def select(self, planes: Planes, rows: slice | Tensor) -> Planes:
        """The planes of some rows: views for a slice, copies for ids (int64)."""
        return tuple(plane[rows] for plane in planes)

    @abstractmethod
    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        """The numbers (rows, columns), each rounded once to `dtype`."""

    @abstractmethod
    def exact_in(self, dtype: torch.dtype) -> bool:
        """Whether `dtype` holds every number of this format exactly."""


class Dense(Format):
    """One plane: the numbers themselves, row-major."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = dtype_name(dtype)

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        return ((self.dtype, (rows, columns)),)

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        return planes[0].to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return torch.promote_types(self.dtype, dtype) == dtype


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> 'float16'."""
    return str(dtype).removeprefix("torch.")


@cache
def dense(dtype: torch.dtype) -> Dense:
    """The format of matrices whose numbers are plain `dtype`."""
    return Dense(dtype)


# What a checkpoint's matrices may be stored in, by name.
FORMATS: dict[str, Format] = {
    each.name: each for each in map(dense, (torch.bfloat16, torch.float16, torch.float32))
}


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A weight (rows, columns) as it is stored. Raises ValueError for planes of another format."""

    format: Format
    shape: tuple[int, int]
    planes: Planes

    def __post_init__(self) -> None:
        wanted = self.format.planes(*self.shape)
        found = tuple((plane.dtype, tuple(plane.shape)) for plane in self.planes)
        if found != wanted:
            raise ValueError(
                f"a {self.format.name} matrix {self.shape} has the planes {wanted}, not {found}"
            )

    @classmethod
    def of(cls, weight: "Weight") -> "Matrix":
        """A plain tensor (rows, columns) as the matrix that it is."""
        if isinstance(weight, Matrix):
            return weight
        rows, columns = weight.shape
        return cls(dense(weight.dtype), (rows, columns), (weight,))

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def rows(self, start: int, stop: int) -> "Matrix":
        """Rows `start` to `stop`, a view."""
        planes = self.format.select(self.planes, slice(start, stop))
        return Matrix(self.format, (len(range(self.shape[0])[start:stop]), self.shape[1]), planes)

    def take(self, rows_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by their ids (int64), widened: (T, columns)."""
        return self.format.widened(self.format.select(self.planes, rows_T), dtype)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The numbers (rows, columns), each rounded once to `dtype`."""
        return self.format.widened(self.planes, dtype)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Matrix":
        """Each plane where `move` puts it. ValueError where that makes other numbers of it."""
        return Matrix(self.format, self.shape, tuple(move(plane) for plane in self.planes))


# A parameter is a matrix of one plane.
Weight = Tensor | Matrix


def planes_of(weights: Sequence[Weight | None]) -> list[Tensor | None]:
    """All tensors that `weights` lie in, in order; None for None."""
    found: list[Tensor | None] = []
    for weight in weights:
        if isinstance(weight, Matrix):
            found += weight.planes
        else:
            found.append(weight)
    return found
