"""What captured steps ask of a card: memory that both sides see, and a recording to play again.

All of torch.cuda that they touch is here, so that another can stand in its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import Tensor


class NotCaptured(Exception):
    """Why a step cannot be captured."""


# CUDA's errors of a stream that is captured, cudaErrorStreamCapture*: they end the capture alone.
_OF_CAPTURES = "captur"


def ended_capture(error: torch.AcceleratorError) -> bool:
    """Whether it was no more than something that a graph cannot have, as a value that is read. The
    device goes on after that, as after no other error of its own."""
    return _OF_CAPTURES in str(error)


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
    def beside(self) -> AbstractContextManager[None]:
        """Within it work is captured, and done for the first time before that; behind it all of
        that is through."""

    @abstractmethod
    def begin(self) -> None:
        """From now on work is noted, and not done. Nothing may be read back, or come from the host.
        What noted work leaves in memory of its own is there for what is noted later."""

    @abstractmethod
    def end(self) -> Callable[[], None]:
        """What was noted since `begin`, as one launch. Raises what the device raises."""

    @abstractmethod
    def drop(self) -> None:
        """Note no more, if anything was, and keep nothing of what was noted since `begin`."""

    @abstractmethod
    def taken(self) -> int:
        """Bytes that are taken of the card's memory."""


class CudaCard(Card):
    """A CUDA device: captured graphs share one pool of memory, as only one is under way at a time,
    and what comes of a step lies elsewhere. A step's pieces are played again in their order, so
    that what one leaves to a later one in that pool is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    def pinned(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, pin_memory=True)

    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        there.copy_(host, non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record()
        return sent.synchronize

    @contextmanager
    def beside(self) -> Iterator[None]:
        usual = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(usual)
        try:
            with torch.cuda.stream(self._stream):
                yield
        except BaseException:
            # No stream may wait for one that captures.
            self.drop()
            raise
        finally:
            usual.wait_stream(self._stream)
        torch.cuda.synchronize(self.device)
        # While work is noted what is cached for others cannot be had.
        torch.cuda.empty_cache()

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, NCCL's among them, is none of it.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        graph = self._graph
        assert graph is not None, "begin was called"
        graph.capture_end()
        self._graph = None
        return graph.replay

    def drop(self) -> None:
        graph = self._graph
        self._graph = None
        if graph is None:
            return
        try:
            # A capture ends on the stream that it began on.
            with torch.cuda.stream(self._stream):
                graph.capture_end()
        except RuntimeError:
            self._leave_pool()

    def _leave_pool(self) -> None:
        """Where CUDA ended a capture by itself, torch leaves its allocator believe that it goes on,
        and that the graph holds the pool."""
        device = torch.cuda.current_device()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
        self._pool = torch.cuda.graph_pool_handle()

    def taken(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free
