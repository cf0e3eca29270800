"""What stands in for a card where there is none: it notes what is launched, plays it again, and
lets nobody read a value meanwhile.

A CUDA graph has only what was launched, on the memory that it was launched on: no line of Python
runs again. So here, too, what torch's operations and our kernels were called with is noted, and a
replay calls these again on the very same tensors. What the host reads, branches on or brings from
its own memory would stay as it was in a graph; here to read a tensor's values is an error.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

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
    """With a tape it notes what passes."""

    def __init__(self, tape: list[_Launch] | None = None) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        kwargs = kwargs or {}
        if inside_interpreter():
            return func(*args, **kwargs)
        if name in READS | BRINGS or by_mask:
            raise HostRead(f"torch's {name}{' with a mask' if by_mask else ''}")
        found = func(*args, **kwargs)
        if self._tape is not None:
            self._tape.append(_Launch(func, args, kwargs, _tensors(found)))
        return found


@dataclasses.dataclass
class _Launch:
    """A call, and the tensors that it made: to call it again is to leave there what comes of it."""

    call: Callable[..., Any]
    args: Any
    kwargs: Any
    made: list[Tensor]

    def again(self) -> None:
        given = {x.untyped_storage().data_ptr() for x in _tensors((*self.args, self.kwargs))}
        for old, new in zip(self.made, _tensors(self.call(*self.args, **self.kwargs)), strict=True):
            if old.untyped_storage().data_ptr() not in given:
                old.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [x for each in value for x in _tensors(each)]
    return []


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
def _kernels_noted(tape: list[_Launch]) -> Iterator[None]:
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        run(self, *args, **kwargs)
        tape.append(_Launch(partial(run, self), args, kwargs, []))

    with mock.patch.object(InterpretedFunction, "run", noted):
        yield


class StandIn(Card):
    """A card of the host's memory. `replays` counts what was played again, `captured` what was
    noted."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.replays = 0
        self.captured = 0
        self._noting: ExitStack | None = None
        self._tape: list[_Launch] = []

    def pinned(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        there.copy_(host)
        return bool

    @contextmanager
    def beside(self) -> Iterator[None]:
        assert self._noting is None
        yield

    def begin(self) -> None:
        assert self._noting is None
        self._tape = []
        self._noting = ExitStack()
        self._noting.enter_context(_kernels_noted(self._tape))
        self._noting.enter_context(_Calls())
        self._noting.enter_context(_Dispatched(self._tape))

    def end(self) -> Callable[[], None]:
        assert self._noting is not None
        self._noting.close()
        self._noting = None
        self.captured += 1
        tape = self._tape

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():
                for each in tape:
                    each.again()

        return replay

    def drop(self) -> None:
        if self._noting is not None:
            self._noting.close()
            self._noting = None
        # An inference mode that was entered while there was a mode, and left when there was none,
        # has brought back what torch keeps of there being one.
        with _Dispatched():
            pass

    def taken(self) -> int:
        return 0
