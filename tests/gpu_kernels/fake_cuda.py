"""A CUDA device that is not there: torch.cuda by its rules, with the numbers in the host's memory.

    with FakeCuda() as cuda:                    # torch.cuda.is_available(), device="cuda"
        LLM(path, device="cuda").generate(...)  # kernels in Triton's interpreter
        assert cuda.replays

Whatever runs only where there is CUDA runs here as it is. A tensor of the device is a DeviceTensor,
which only operations of torch and kernels can look into. What CUDA refuses is refused, or noticed:

    operands of two devices; a kernel given the host's memory
    while a stream captures: a value that is read, a copy from or to memory that is not pinned,
        waiting, a capture that ends on another stream, a stream that would join it
    pinned memory that is written before the copy from it has ended, or read before one to it has
    memory that a graph shares with others, or that was never written: it holds NaN, and -1

All streams are one queue here: which stream waits for which is not checked, but for captures.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from gpu_kernels.device_tensor import (
    BY_PLACE,
    CARD,
    CPU,
    EMPTY,
    Called,
    DeviceTensor,
    Dispatched,
    names_card,
    numbers_of,
    reads,
    spoil,
    start,
    tensors,
    wrapped,
)

FREE_BYTES = 2**32
TOTAL_BYTES = 2**33

# What copies numbers of the host by itself: these may lie on either side.
_COPIES = frozenset({"_to_copy", "copy_"})


def capture_error(why: str) -> torch.AcceleratorError:
    """As torch words CUDA's errors of a stream that is captured."""
    return torch.AcceleratorError(f"CUDA error: {why} while the stream is capturing")


class _Generator(torch.Generator):
    """Of a device's random numbers, which here are a CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self._stream: _Stream | None = None
        self.captured: _Capture | None = None
        self._after = 0

    def record(self, stream: _Stream | None = None) -> None:
        cuda = FakeCuda.now
        stream = stream or cuda.stream
        self.captured = cuda.capture if cuda.capture and cuda.capture.stream is stream else None
        self._after = cuda.begun

    def synchronize(self) -> None:
        if self.captured:
            raise FakeCuda.now.refuse("an event of a capture is waited for")
        FakeCuda.now.require_no_capture("synchronize")
        FakeCuda.now.arrive(self._after)

    def query(self) -> bool:
        self.synchronize()
        return True

    def wait(self, stream: _Stream | None = None) -> None:
        (stream or FakeCuda.now.stream).wait_event(self)


class _Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = CARD
        self._within = ExitStack()

    def __enter__(self) -> _Stream:
        self._within.enter_context(FakeCuda.now.on_stream(self))
        return self

    def __exit__(self, *_: Any) -> None:
        self._within.close()

    def wait_event(self, event: _Event) -> None:
        if event.captured and event.captured.stream is not self:
            raise FakeCuda.now.refuse("a stream that began before would depend on the captured one")

    def wait_stream(self, other: _Stream) -> None:
        event = _Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        FakeCuda.now.synchronize()

    def query(self) -> bool:
        FakeCuda.now.synchronize()
        return True


class _Capture:
    """What is noted of a stream: calls, and the tensors that each made."""

    def __init__(self, stream: _Stream, pool: object) -> None:
        self.stream = stream
        self.pool = pool
        self.broken = False
        self.tape: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self.begun_by = threading.get_ident()
        # What was there before as it was, and the memory of what was made since.
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()
        # Captures that read what each other made, which is there for that: a step's pieces.
        self.together: list[_Capture] = [self]

    def see(self, given: list[Tensor], others: Iterable[_Capture]) -> None:
        """Operands of what will be noted, and not done."""
        for x in given:
            for other in others:
                if start(x) in other._own and other not in self.together:
                    self.together += other.together
                    for each in self.together:
                        each.together = self.together
            if start(x) not in self._own | self._before.keys():
                whole = torch.empty(0, dtype=torch.uint8).set_(numbers_of(x).untyped_storage())
                self._before[start(x)] = (whole, whole.clone())

    def note(self, call: Callable[[], Any], given: list[Tensor], made: list[Tensor]) -> None:
        old = {start(x) for x in given}
        new = [numbers_of(x) for x in made if start(x) not in old]
        self._own.update(map(start, new))
        self.tape.append((call, new))

    def end(self) -> None:
        with _disable_current_modes(), torch.inference_mode():
            for whole, numbers in self._before.values():
                whole.copy_(numbers)
        self._before.clear()
        self.spoil()

    def spoil(self) -> None:
        """Its memory has served others."""
        with _disable_current_modes(), torch.inference_mode():
            for _, made in self.tape:
                for x in made:
                    spoil(x)


class _Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._capture: _Capture | None = None
        self._ended = False

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        cuda = FakeCuda.now
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        if cuda.stream is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if cuda.capture is not None or pool in cuda.broken_pools:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._capture = cuda.capture = _Capture(cuda.stream, pool)

    def capture_end(self) -> None:
        cuda = FakeCuda.now
        capture = self._capture
        assert capture is not None
        if cuda.stream is not capture.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        if cuda.capture is not capture:
            raise torch.AcceleratorError("CUDA error: the stream is not capturing")
        cuda.capture = None
        capture.end()
        if capture.broken:
            # The allocator is not told of the end.
            cuda.broken_pools.append(capture.pool)
            raise torch.AcceleratorError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        assert capture.tape, "the graph is empty"
        self._ended = True
        cuda.captures.add(capture)

    def replay(self) -> None:
        cuda = FakeCuda.now
        cuda.require_no_capture("a graph is launched")
        assert self._ended and self._capture is not None, "replay without a successful capture"
        cuda.replay(self._capture)


class FakeCuda:
    """The one device of this process, while it is entered. replays: how many graphs were played;
    waits: how often the host waited for a value, or for a copy."""

    now: FakeCuda

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability
        self.replays = 0
        self.waits = 0
        self.default = _Stream()
        self.capture: _Capture | None = None
        self.broken_pools: list[object] = []
        """To which the allocator believes that a capture goes on."""
        self.held_pools: list[object] = []
        """Which a graph holds that there is not."""
        self.captures: weakref.WeakSet[_Capture] = weakref.WeakSet()
        """Of graphs that are there."""
        self.begun = 0
        """Copies so far."""
        self._coming: list[tuple[int, Callable[[], None]]] = []
        self._pinned: dict[int, int] = {}
        self._here = threading.local()
        self._stack = ExitStack()

    # What is asked of torch.cuda

    @property
    def stream(self) -> _Stream:
        return getattr(self._here, "stream", self.default)

    @contextmanager
    def on_stream(self, stream: _Stream) -> Iterator[None]:
        before = self.stream
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before

    def synchronize(self, device: Any = None) -> None:
        self.require_no_capture("synchronize")
        self.arrive(self.begun)

    def require_no_capture(self, doing: str) -> None:
        """By the thread that captures; others may."""
        if self.capture is not None and self.capture.begun_by == threading.get_ident():
            raise self.refuse(doing)

    def refuse(self, why: str) -> torch.AcceleratorError:
        if self.capture is not None:
            self.capture.broken = True
        return capture_error(why)

    def end_allocate(self, device: int, pool: object) -> None:
        if pool not in self.broken_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.broken_pools.remove(pool)
        self.held_pools.append(pool)

    def release_pool(self, device: int, pool: object) -> None:
        self.held_pools.remove(pool)

    # Copies between the host's pinned memory and the device

    def pinned(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._pinned[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
        weakref.finalize(storage, self._pinned.pop, storage.data_ptr(), None)
        return x

    def is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._pinned

    def arrive(self, until: int) -> None:
        """Copies end that were begun by then."""
        coming = [work for number, work in self._coming if number <= until]
        self._coming = [(number, work) for number, work in self._coming if number > until]
        for work in coming:
            work()

    def _wait(self) -> None:
        self.waits += 1
        self.arrive(self.begun)

    def _copy(self, there: Tensor, source: Tensor, non_blocking: bool) -> None:
        """Between the two sides."""
        here, *_ = (x for x in (source, there) if not isinstance(x, DeviceTensor))
        if not self.is_pinned(here):
            self.require_no_capture("memory that is not pinned is copied")
        begins = non_blocking and self.is_pinned(here)
        if not begins:
            self._wait()
        with _disable_current_modes():
            numbers = numbers_of(source).clone()
            if there is here and begins:
                spoil(there)
            else:
                numbers_of(there).copy_(numbers)
        if not begins:
            return
        self.begun += 1
        self._coming.append((self.begun, partial(self._end_copy, there, source, numbers)))

    def _end_copy(self, there: Tensor, source: Tensor, numbers: Tensor) -> None:
        with _disable_current_modes():
            if isinstance(there, DeviceTensor):
                assert _same(source, numbers), "pinned memory was written before it was copied"
            else:
                there.copy_(numbers)

    # Operations

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        if kwargs.pop("pin_memory", None):
            with _disable_current_modes():
                return self.pinned(func(*args, **kwargs))
        if name == "is_pinned":
            return not isinstance(args[0], DeviceTensor) and self.is_pinned(args[0])
        if name == "to":  # as it comes in inference mode
            with Dispatched():
                return func.decompose(*args, **kwargs)
        if name in _COPIES:
            return self._copied(func, name, args, kwargs)
        operands = tensors((args, kwargs))
        if names_card(kwargs.get("device")) or any(isinstance(x, DeviceTensor) for x in operands):
            return self.launch(func, args, kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _copied(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        source = args[1] if name == "copy_" else args[0]
        device = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        if names_card(device) == isinstance(source, DeviceTensor):
            if names_card(device):
                return self.launch(func, args, kwargs)
            with _disable_current_modes():
                return func(*args, **kwargs)
        blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
        if name == "copy_":
            self._copy(args[0], source, bool(blocking))
            return args[0]
        with _disable_current_modes():
            dtype = kwargs.get("dtype") or source.dtype
            there: Tensor = torch.empty(source.shape, dtype=dtype)
        if names_card(device):
            there = DeviceTensor(there)
        self._copy(there, source, bool(blocking))
        return there

    def launch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation of the device."""
        name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        self._check_operands(name, args, kwargs)
        if reads(name, args):
            self.require_no_capture(f"{name} reads a value")
            self._wait()
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": CPU}
        call = partial(self._compute, name, func, args, kwargs)
        given = tensors((args, kwargs))
        with self._noted(call, given) as made:
            out = wrapped(call(), given)
            made += [x for x in tensors(out) if isinstance(x, DeviceTensor)]
        return out

    @contextmanager
    def _noted(self, call: Callable[[], Any], given: list[Tensor]) -> Iterator[list[Tensor]]:
        """Within it `call` is made for the first time. Takes what it makes."""
        made: list[Tensor] = []
        capture = self.capture
        if capture is None or capture.begun_by != threading.get_ident():
            yield made
            return
        with _disable_current_modes():
            capture.see(given, self.captures)
        yield made
        capture.note(call, given, made)

    def _compute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            found = func(*numbers_of(args), **numbers_of(kwargs))
            if name in EMPTY:
                spoil(found)
            return found

    def _check_operands(self, name: str, args: Any, kwargs: Any) -> None:
        others = [x for x in tensors((args, kwargs)) if not isinstance(x, DeviceTensor)]
        others = [x for x in others if x.device.type != "meta"]
        if name in BY_PLACE:
            if others:
                self.require_no_capture("a place of the host's memory is copied")
            return
        if any(x.dim() for x in others):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} was given cpu and cuda:0"
            )

    def run_kernel(self, run: Any, kernel: Any, *args: Any, **kwargs: Any) -> None:
        """A launch of Triton's."""
        for x in tensors((args, kwargs)):
            if not isinstance(x, DeviceTensor):
                raise ValueError(f"{kernel.fn.__name__} cannot access a tensor of the host")

        def call() -> None:
            with _disable_current_modes():
                run(kernel, *numbers_of(args), **numbers_of(kwargs))

        with self._noted(call, tensors((args, kwargs))):
            call()

    def replay(self, capture: _Capture) -> None:
        self.replays += 1
        for other in self.captures:
            if other.pool is capture.pool and other not in capture.together:
                other.spoil()
        with torch.inference_mode():
            for call, made in capture.tape:
                found = [x for x in tensors(call()) if made]
                for old, new in zip(made, found, strict=True):
                    old.copy_(new)

    # The device comes and goes

    def __enter__(self) -> FakeCuda:
        FakeCuda.now = self
        DeviceTensor.device_now = self
        replaced: list[tuple[object, dict[str, Any]]] = [
            (torch.cuda, self._told() | {"CUDAGraph": _Graph, "Stream": _Stream, "Event": _Event}),
            (torch, {"Stream": _Stream, "Event": _Event, "Generator": _Generator}),
            (torch._C, self._allocator()),
            (InterpretedFunction, {"run": self._launcher(InterpretedFunction.run)}),
            (threading.Thread, {"run": _with_modes(threading.Thread.run)}),
        ]
        for where, names in replaced:
            for name, value in names.items():
                patch = mock.patch.object(where, name, value, create=where is torch._C)
                self._stack.enter_context(patch)
        self._stack.enter_context(Called())
        self._stack.enter_context(Dispatched())
        return self

    def _told(self) -> dict[str, Any]:
        """What torch.cuda answers."""
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": lambda: None,
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: "Fake Card",
            "mem_get_info": lambda device=None: (FREE_BYTES, TOTAL_BYTES),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 2**20,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: self.require_no_capture("memory is given back"),
            "synchronize": self.synchronize,
            "current_stream": lambda device=None: self.stream,
            "default_stream": lambda device=None: self.default,
            "stream": self.on_stream,
            "graph_pool_handle": object,
        }

    def _allocator(self) -> dict[str, Any]:
        return {
            "_cuda_endAllocateToPool": self.end_allocate,
            "_cuda_releasePool": self.release_pool,
        }

    def _launcher(self, run: Any) -> Any:
        def run_kernel(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self.run_kernel(run, kernel, *args, **kwargs)

        return run_kernel

    def __exit__(self, *_: Any) -> None:
        self._stack.close()


def _with_modes(run: Callable[[threading.Thread], None]) -> Any:
    def run_thread(thread: threading.Thread) -> None:
        with Called(), Dispatched():
            run(thread)

    return run_thread


def _same(one: Tensor, other: Tensor) -> bool:
    whole = torch.contiguous_format  # whatever strides a dimension of one has
    a, b = (x.clone(memory_format=whole).view(torch.uint8) for x in (one, other))
    return a.equal(b)
