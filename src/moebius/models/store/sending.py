"""Weights from a mapped file to a device, through two buffers that the device reads by itself.

While one is on its way the other is filled, which is when the file's pages are read. So a model is
never copied in the host's memory as a whole, however large it is.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

STAGED_BYTES = 2**26
"""Of each of the two."""


class Staging(ABC):
    """What is asked of a device."""

    @abstractmethod
    def pinned(self, nbytes: int) -> Tensor:
        """Memory of the host, uint8, that the device reads by itself."""

    @abstractmethod
    def empty(self, nbytes: int) -> Tensor:
        """Memory of the device, uint8."""

    @abstractmethod
    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        """Begin to copy; what is returned waits until `host` may be written again."""


class CudaStaging(Staging):
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        there.copy_(host, non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record()
        return sent.synchronize


class Sender:
    """Sends tensors, whichever thread asks: one piece after the other."""

    def __init__(self, staging: Staging, staged_bytes: int = STAGED_BYTES) -> None:
        self._staging = staging
        self._size = staged_bytes
        self._lock = threading.Lock()
        self._buffers: list[Tensor] = []
        self._free: list[Callable[[], None]] = [_at_once, _at_once]
        self._turn = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The same numbers on the device."""
        flat = x.contiguous().view(-1).view(torch.uint8)
        there = self._staging.empty(len(flat))
        for start in range(0, len(flat), self._size):
            piece = flat[start : start + self._size]
            with self._lock:
                self._put(piece, there[start : start + self._size])
        return there.view(x.dtype).view(x.shape)

    def finish(self) -> None:
        """Wait for all that was sent, and give the memory between back."""
        with self._lock:
            for wait in self._free:
                wait()
            self._buffers = []

    def _put(self, piece: Tensor, there: Tensor) -> None:
        if not self._buffers:
            self._buffers = [self._staging.pinned(self._size) for _ in range(2)]
        self._turn ^= 1
        self._free[self._turn]()
        host = self._buffers[self._turn][: len(piece)]
        host.copy_(piece)
        self._free[self._turn] = self._staging.send(host, there)


def sender_to(device: torch.device) -> Callable[[Tensor], Tensor]:
    """What brings tensors to a device: nothing, where they are there already."""
    if device.type == "cuda":
        return Sender(CudaStaging(device))
    return lambda x: x.to(device)


def _at_once() -> None:
    """Nothing is on its way."""
