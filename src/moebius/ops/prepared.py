"""What a backend makes for itself and others only hand back to it: opaque, but not untyped.

What is prepared from tensors holds them, so that no address outlives what lies there. Whoever keeps
it asks `is_of` before each use: a parameter may have been moved or replaced since.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import is_
from typing import TypeVar

from torch import Tensor

from moebius.ops.steps import ExpertWeights
from moebius.ops.weights import Weight


class PreparedLinear(ABC):
    """Linear layers of one input, as the backend that made it wants them."""

    __slots__ = ()

    @abstractmethod
    def is_of(self, *layers: tuple[Weight, Tensor | None]) -> bool:
        """Whether it was made of these very tensors, and they lie where they lay."""


class PreparedExperts(ABC):
    """One layer's experts, as the backend that made it wants them."""

    __slots__ = ()

    @abstractmethod
    def is_of(self, weights: ExpertWeights) -> bool:
        """Whether it was made of these very tensors, and they lie where they lay."""

    def become(self, other: "PreparedExperts") -> bool:
        """Take the place of `other`, of the same sizes, in programs too that were recorded with
        this; between two runs. False where this backend records nothing, or cannot."""
        return False


class PreparedHeads(ABC):
    """The matrices that each head has of its own, as the backend that made it wants them."""

    __slots__ = ()

    @abstractmethod
    def is_of(self, weight: Weight) -> bool:
        """Whether it was made of this very weight, and it lies where it lay."""


class LayerCache:
    """One layer's keys and values, in the layout of the backend that made it."""

    __slots__ = ()


class AttentionPlan:
    """What layers with the same window need to know of a step to attend."""

    __slots__ = ()


class StatePlan:
    """What recurrent layers need to know of a step: its sequences' rows, and slots of states."""

    __slots__ = ()


def same(weights: Sequence[Weight | None], others: Sequence[Weight | None]) -> bool:
    """Whether both are the same objects in the same order; asked in each layer of each pass."""
    return len(weights) == len(others) and all(map(is_, weights, others))


_Own = TypeVar("_Own")


def own(handle: object, kind: type[_Own]) -> _Own:
    """`handle`, which must be of this backend's `kind`. Raises TypeError for another's."""
    if not isinstance(handle, kind):
        raise TypeError(
            f"{type(handle).__name__} was made by another backend; this one takes {kind.__name__}"
        )
    return handle
