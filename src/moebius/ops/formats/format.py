"""How the numbers of a weight lie in memory."""

from abc import ABC, abstractmethod

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

    def select(self, planes: Planes, rows: slice | Tensor) -> "tuple[Format, Planes]":
        """The planes of some rows, and their format: views for a slice, copies for ids (int64).

        It is this format, but where rows that share something are parted.
        """
        return self, tuple(plane[rows] for plane in planes)

    @abstractmethod
    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        """The numbers (rows, columns), each rounded once to `dtype`."""

    @abstractmethod
    def exact_in(self, dtype: torch.dtype) -> bool:
        """Whether `dtype` holds every number of this format exactly."""
