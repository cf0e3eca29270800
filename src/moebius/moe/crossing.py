"""How a step's rows get from a device's memory to the host's and back.

Shapes: R rows that are wanted, P answers; the others as in moebius.ops.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_INT64 = 8


@dataclass(frozen=True, slots=True)
class CrossingRows:
    """The most that crosses in a step: T tokens of D values, each with K choices of experts."""

    tokens: int
    top_k: int
    size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What the buffers take that rows cross by: the ids of all choices, a token's row once, an
        answer for each choice, and where both belong."""
        answers = self.tokens * self.top_k
        rows = (self.tokens + answers) * self.size * self.dtype.itemsize
        return rows + (2 * answers + self.tokens) * _INT64


class Crossing(Protocol):
    """One way for all layers of a model, which take turns.

    What `ids` and `rows` return is read until the next call of the same method.
    """

    def begin(self, ids_TK: Tensor, x_TD: Tensor) -> None:
        """Let a layer's choices be brought, and wait for nothing. x, the layer's input, stays as it
        is until `rows` has been called."""

    def ids(self, ids_TK: Tensor) -> Tensor:
        """The choices that `begin` was called with, on the host."""

    def rows(self, tokens_R: Tensor) -> Tensor:
        """Rows of the layer's input by their numbers (on the host, int64): (R, D), on the host.

        What the device has been given to compute since `begin` is not waited for.
        """

    def give(self, answers_PD: Tensor, places_P: Tensor, out: Tensor) -> None:
        """Write answers of the host into rows `places` (on the host, int64) of a tensor on the
        device."""


class OneMemory:
    """The device computes in the host's memory."""

    def begin(self, ids_TK: Tensor, x_TD: Tensor) -> None:
        self._x = x_TD

    def ids(self, ids_TK: Tensor) -> Tensor:
        return ids_TK

    def rows(self, tokens_R: Tensor) -> Tensor:
        return self._x.index_select(0, tokens_R)

    def give(self, answers_PD: Tensor, places_P: Tensor, out: Tensor) -> None:
        out.index_copy_(0, places_P, answers_PD)


class TwoMemories:
    """The device has memory of its own. Rows cross by pinned buffers, which are allocated once.

    A buffer that the device reads is written again in another layer, whose choices are waited for
    first: they come behind what reads it.
    """

    def __init__(self, device: torch.device, most: CrossingRows) -> None:
        self._device = device
        answers = most.tokens * most.top_k
        row = most.size * most.dtype.itemsize
        self._ids = self._pinned(answers * _INT64)
        self._tokens = self._pinned(most.tokens * _INT64)
        self._rows = self._pinned(most.tokens * row)
        self._answers = self._pinned(answers * row)
        self._places = self._pinned(answers * _INT64)
        # Beside the one that computes, whose experts are not to be waited for.
        self._stream = torch.Stream(device)
        self._asked = torch.Event(device)

    @staticmethod
    def _pinned(nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def begin(self, ids_TK: Tensor, x_TD: Tensor) -> None:
        self._x = x_TD
        _part(self._ids, ids_TK).copy_(ids_TK, non_blocking=True)
        self._asked.record()

    def ids(self, ids_TK: Tensor) -> Tensor:
        self._asked.synchronize()
        return _part(self._ids, ids_TK)

    def rows(self, tokens_R: Tensor) -> Tensor:
        rows_RD = _part(self._rows, self._x[: len(tokens_R)])
        with self._stream:
            wanted_R = self._sent(self._tokens, tokens_R)
            rows_RD.copy_(self._x.index_select(0, wanted_R), non_blocking=True)
        self._stream.synchronize()
        return rows_RD

    def give(self, answers_PD: Tensor, places_P: Tensor, out: Tensor) -> None:
        places = self._sent(self._places, places_P)
        out.index_copy_(0, places, self._sent(self._answers, answers_PD))

    def _sent(self, buffer: Tensor, x: Tensor) -> Tensor:
        """A tensor of the host on the device, by way of a pinned buffer."""
        return _part(buffer, x).copy_(x).to(self._device, non_blocking=True)


def _part(buffer: Tensor, like: Tensor) -> Tensor:
    """As much of a buffer as a tensor has, in its dtype and shape."""
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)


def crossing(device: torch.device, most: CrossingRows) -> Crossing:
    """From a device to the host and back."""
    return OneMemory() if device.type == "cpu" else TwoMemories(device, most)
