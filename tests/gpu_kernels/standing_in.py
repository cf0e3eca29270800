"""What stands in for a card where there is none: it plays captured work again, and lets nobody read
a value meanwhile.

A CUDA graph has only what was launched: what the host reads, branches on or brings from its own
memory while it is captured stays as it was. So here each replay runs the work anew, where to read a
tensor's values is an error: whatever passes would give the same as a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.ops.triton import experts, linear
from moebius.ops.triton.card import Card

# What gives the host a value, or waits for the device to know a size.
READS = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    }
)
# What makes a tensor of the host's own numbers.
BRINGS = frozenset({"lift_fresh", "lift_fresh_copy"})
_CALLS = frozenset(
    {
        "__bool__",
        "__float__",
        "__index__",
        "__int__",
        "as_tensor",
        "cpu",
        "from_numpy",
        "frombuffer",
        "item",
        "numpy",
        "tensor",
        "tolist",
    }
)


class HostRead(Exception):
    """A value was read, or brought, where a graph could not do it."""


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CALLS and not inside_interpreter():
            raise HostRead(f"torch's {name}")
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if (name in READS | BRINGS or by_mask) and not inside_interpreter():
            raise HostRead(f"torch's {name}{' with a mask' if by_mask else ''}")
        return func(*args, **(kwargs or {}))


def inside_interpreter() -> bool:
    """Whether Triton's interpreter asks, which stands for the device itself."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("triton."):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Within it to read a tensor's value, or to make one of the host's numbers, is a HostRead."""
    with _Calls(), _Dispatched():
        yield


@contextmanager
def _as_captured() -> Iterator[None]:
    """Within it our operations hear that a graph is captured."""
    with ExitStack() as undo:
        for module in (linear, experts):
            undo.enter_context(mock.patch.object(module, "capturing", lambda x: True))
        yield


class StandIn(Card):
    """A card of the host's memory. `replays` counts what was played again."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.replays = 0
        self.captured = 0

    def pinned(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        there.copy_(host)
        return bool

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        self.captured += 1

        def replay() -> None:
            self.replays += 1
            with _as_captured(), no_host_reads():
                work()

        # While it is captured the same holds.
        replay()
        self.replays -= 1
        return replay

    def taken(self) -> int:
        return 0
