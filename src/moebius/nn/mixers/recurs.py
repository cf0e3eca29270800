"""What recurrent mixers ask of the past: the states of the step's sequences."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from moebius.ops import Ops, StatePlan


class Recurrence(NamedTuple):
    """One layer's states, and which of them are whose.

    states   planes by their names (moebius.ops.cache_spec), (S, *shape) each, which the layer's
             operations read and rewrite in place; none where nothing is kept
    plan     the step's sequences, as the backend planned them
    """

    states: Mapping[str, Tensor]
    plan: StatePlan


class Recurrent(Protocol):
    """A recurrent mixer at work in one layer."""

    ops: Ops
    layer: int


class Recurs(Protocol):
    """A past of states: what recurrent mixers ask of whoever runs a step."""

    def recur(self, mixer: Recurrent, x_TD: Tensor) -> Recurrence:
        """The states of the mixer's layer, for the step's rows x."""
