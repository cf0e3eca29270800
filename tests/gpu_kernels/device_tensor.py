"""Tensors of a device that is not there: their numbers lie in the host's memory.

Only operations of torch and kernels, as the device hands them on, see these. torch of a build
without CUDA can't be asked where "cuda" is, so what asks for that is answered in front of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_kernels.standing_in import READS

CARD = torch.device("cuda:0")
CPU = torch.device("cpu")

EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
# What takes places from either side.
BY_PLACE = frozenset({"index", "index_put", "index_put_", "getitem", "setitem"})


class Device(Protocol):
    """Who computes with these tensors."""

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation of torch, on any tensors."""

    def launch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation of the device's."""

    def pinned(self, x: Tensor) -> Tensor:
        """A tensor of the host, which the device reads by itself from now on."""


class DeviceTensor(Tensor):
    """`held` has its numbers."""

    device_now: Device
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        # torch would count versions of a tensor of inference mode that is a subclass's.
        with torch.inference_mode(False):
            made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=CARD,
            )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a thread that the device does not know")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __getitem__(self, place: Any) -> Any:
        return DeviceTensor.device_now.launch(operator.getitem, (self, place), {})

    def __setitem__(self, place: Any, value: Any) -> None:
        DeviceTensor.device_now.launch(operator.setitem, (self, place, value), {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.held!r})"


_NUMBERS: dict[Any, Callable[[Any], Any]] = {
    Tensor.__bool__: bool,
    Tensor.__float__: float,
    Tensor.__int__: int,
    Tensor.__index__: operator.index,
    Tensor.item: lambda number: number,
}


class Called(TorchFunctionMode):
    """Answers what torch would ask of its build for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = DeviceTensor.device_now
        kwargs = dict(kwargs or {})
        if names_card(kwargs.get("device")):
            kwargs["device"] = CARD
        if func is Tensor.to:
            args = tuple(CARD if names_card(each) else each for each in args)
        if func is torch.tensor and kwargs.get("device") == CARD:
            return func(*args, **kwargs | {"device": CPU}).to(CARD)
        if func is Tensor.pin_memory:
            return device.pinned(args[0].clone())
        if not any(isinstance(x, DeviceTensor) for x in args[:2]):
            return func(*args, **kwargs)
        x = args[0]
        if func is Tensor.__invert__:
            return torch.bitwise_not(x)
        if func is Tensor.contiguous:
            return x if x.is_contiguous() else torch.clone(x, memory_format=torch.contiguous_format)
        if func in _NUMBERS:
            (number,) = x.reshape(1).tolist()
            return _NUMBERS[func](number)
        if func is Tensor.copy_:
            blocking = args[2:] or (kwargs.get("non_blocking", False),)
            return device.dispatch(torch.ops.aten.copy_.default, (*args[:2], *blocking), {})
        return func(*args, **kwargs)


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DeviceTensor.device_now.dispatch(func, args, dict(kwargs or {}))


def names_card(value: Any) -> bool:
    return isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"


def wrapped(found: Any, given: list[Tensor]) -> Any:
    """Results as the device's; what was changed in place is the same tensor as before."""
    if isinstance(found, Tensor):
        for x in given:
            if isinstance(x, DeviceTensor) and x.held is found:
                return x
        return DeviceTensor(found)
    if isinstance(found, (tuple, list)):
        values = [wrapped(each, given) for each in found]
        return values if isinstance(found, list) else tuple(values)
    return found


def numbers_of(value: Any) -> Any:
    """The value with tensors of the host in place of the device's."""
    if isinstance(value, DeviceTensor):
        return value.held
    if isinstance(value, dict):
        return {name: numbers_of(each) for name, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(numbers_of(each) for each in value)
    return value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [x for each in value for x in tensors(each)]
    return []


def start(x: Tensor) -> int:
    """Where its memory begins."""
    held: Tensor = numbers_of(x)
    return held.untyped_storage().data_ptr()


def spoil(x: Tensor) -> None:
    """Let it hold what nobody has written."""
    if x.is_floating_point():
        x.fill_(torch.nan)
    elif x.dtype != torch.bool:
        x.fill_(-1 if x.dtype.is_signed else 255)


def reads(name: str, args: Any) -> bool:
    """Whether an operation gives the host a value, or waits for a size."""
    masks = tensors(args[1:2]) if name in BY_PLACE else []
    return name in READS or any(x.dtype in (torch.bool, torch.uint8) for x in masks)
