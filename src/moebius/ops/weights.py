"""A weight is a `Matrix`: a format, a shape, and planes that lie where a file was mapped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.ops.formats import Format, Planes, dense


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

    def rows(self, start: int, stop: int, step: int = 1) -> "Matrix":
        """Rows `start` to `stop`, or every step-th of them, a view."""
        chosen = slice(start, stop, step)
        format, planes = self.format.select(self.planes, chosen)
        return Matrix(format, (len(range(self.shape[0])[chosen]), self.shape[1]), planes)

    def take(self, rows_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by their ids (int64), widened: (T, columns)."""
        format, planes = self.format.select(self.planes, rows_T)
        return format.widened(planes, dtype)

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
