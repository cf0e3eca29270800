"""What recurrent mixers compute with beside their parameters: parts of these, or worked out of
them."""

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from moebius.nn.linear import Changes, ParameterModule
from moebius.ops import Weight
from moebius.ops.weights import Matrix

_Made = TypeVar("_Made")


class Derived(Generic[_Made]):
    """One such thing: made at first use, and anew where a parameter is another since."""

    def __init__(self) -> None:
        self._made: _Made | None = None
        self._made_at = 0

    def get(self, changes: Changes, make: Callable[[], _Made]) -> _Made:
        """`changes` are those of the parameters that `make` reads."""
        if self._made is None or self._made_at != changes.count or torch.is_grad_enabled():
            self._made = make()
            self._made_at = changes.count
        return self._made


class Convolution(ParameterModule):
    """Taps of each column's convolution over time, oldest first, as they are stored: (C, 1, J), or
    with more sizes of 1."""

    def __init__(self, shape: tuple[int, ...], *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        columns = math.prod(shape[:-1])
        self.bias = nn.Parameter(torch.empty(columns, dtype=torch.float32)) if bias else None

    @property
    def taps_CJ(self) -> Tensor:
        return self.weight.flatten(0, -2)


def rows_of(weight: Weight, first: int, last: int) -> Weight:
    """Rows of a weight, where they lie; the very weight for all of them."""
    if (first, last) == (0, weight.shape[0]):
        return weight
    return weight.rows(first, last) if isinstance(weight, Matrix) else weight[first:last]
