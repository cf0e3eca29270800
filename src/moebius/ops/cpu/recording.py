"""Kernels that were noted on one row, and are called again on as many as come."""

import math
import re
import weakref
from array import array
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moebius import _cpu
from moebius.ops.steps import StepInputs

# Torch functions that write to a tensor: copy_, __setitem__, __iadd__ and their kind.
_CHANGES = re.compile(r"[a-z]\w*[a-z0-9]_|__setitem__|__i(?!nt|ndex|nvert)\w+__")


class KernelsOnly(TorchFunctionMode):
    """Notices what torch itself computes, other views of the same memory apart: a recording would
    not know of it.

    (A TorchDispatchMode would see more, but importing what it needs takes seconds.)
    """

    only: bool = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        made = [
            x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)
        ]
        changes = _CHANGES.fullmatch(getattr(func, "__name__", ""))
        if changes or not all(x.untyped_storage().data_ptr() in given for x in made):
            self.only = func is torch.frombuffer and self.only
        return out


class StepPlan(Protocol):
    """What a recorded step is told of each step's sequences."""

    def set(self, step: StepInputs) -> None: ...


class Recording:
    """Kernels that were noted on one row, and are called again, all at once, on as many rows as
    come, over the same memory.

    Every tensor in between lies in memory of its own for `max_rows` rows, which a later tensor of
    the same size takes over when it is gone: the kernels run in one order. So a step allocates
    nothing, and Python's share of it does not grow with the layers.
    """

    out: Tensor

    def __init__(self, inputs: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self.plans: list[StepPlan] = []
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self.inputs = [self.buffer((), torch.int64).zero_() for _ in range(inputs)]
        self.program = _cpu.Program([x.data_ptr() for x in self.inputs])
        self._views: dict[int, Tensor] = {}

    def __call__(self, *inputs: "array[int]") -> Tensor:
        count = len(inputs[0])
        if count > self.max_rows:
            raise ValueError(f"{count} rows where {self.max_rows} were said to be the most")
        self.program(count, [x.buffer_info()[0] for x in inputs])
        if count not in self._views:  # a view costs torch as much as a small kernel
            self._views[count] = self.out[:count]
        return self._views[count]

    def buffer(self, row: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(max_rows, *row). Its memory is free again when its last view is gone."""
        count = math.prod(row) * self.max_rows
        nbytes, free = count * dtype.itemsize, self._free
        memory = free[nbytes].pop() if free[nbytes] else np.empty(nbytes + 64, np.uint8)
        view = memory[-memory.ctypes.data % 64 :]
        weakref.finalize(view, free[nbytes].append, memory)
        return torch.frombuffer(view, dtype=dtype, count=count).view(self.max_rows, *row)
