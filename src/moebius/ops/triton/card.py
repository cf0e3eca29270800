"""What captured steps ask of a card: memory that both sides see, and a recording to play again.

All of torch.cuda that they touch is here, so that another can stand in its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class NotCaptured(Exception):
    """Why a step cannot be captured."""


class Card(ABC):
    """The device of one engine."""

    device: torch.device

    @abstractmethod
    def pinned(self, count: int) -> Tensor:
        """So many int64 of the host's memory, which the card can read by itself."""

    @abstractmethod
    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        """Begin to copy; what is returned waits until `host` may be written again."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, which writes its results to memory that stays, as one launch. Nothing may be read
        back, or come from the host, within it. Raises what the device raises."""

    @abstractmethod
    def taken(self) -> int:
        """Bytes that are taken of the card's memory."""


class CudaCard(Card):
    """A CUDA device: captured graphs share one pool of memory, as only one is under way at a time,
    and what comes of each lies elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, pin_memory=True)

    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        there.copy_(host, non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record()
        return sent.synchronize

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        # At first as it is, on another stream: what is compiled, and made once, is made then.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay

    def taken(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free
