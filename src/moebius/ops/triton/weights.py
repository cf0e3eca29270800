"""Which weights our kernels read, and what they are told of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.ops.formats import Dense, Fp8, dtype_name
from moebius.ops.weights import Matrix, Weight

# What our kernels compute in, whichever operation they are of: rows of other dtypes are plain
# PyTorch's in all of them.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What numbers that are not codes may be stored in.
PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN_NAMES = frozenset(map(dtype_name, PLAIN))
_BYTES = ("q8_0", "q4_k", "q6_k")
READ = frozenset({*_PLAIN_NAMES, *_BYTES, "mxfp4_planes", "fp8"})
"""Formats whose kernels are ours, by their names without parameters."""
# What is loaded two bytes at a time.
_IN_PAIRS = ("q8_0", "q6_k")
_VECTOR = 16


class Stored(NamedTuple):
    """How matrices are stored, which is compiled into a kernel, but for the strides.

    format         one of READ
    stride         elements from one row of the first plane to the next
    aligned        rows of the first plane begin at multiples of 16 bytes
    scale_stride   as stride, of the plane of scales, where there is one
    scale          the dtype of these scales
    scale_rows, scale_columns   how many rows and columns share one; 0: all
    """

    format: str
    stride: int
    aligned: bool
    scale_stride: int = 0
    scale: str = ""
    scale_rows: int = 0
    scale_columns: int = 0

    @property
    def codes(self) -> bool:
        """They are no plain numbers, and widened where they are read."""
        return self.format not in _PLAIN_NAMES

    def constants(self) -> dict[str, object]:
        """What is compiled into a kernel, as they call it."""
        return {
            "FORMAT": self.format,
            "SCALE": self.scale,
            "SCALE_ROWS": self.scale_rows,
            "SCALE_COLUMNS": self.scale_columns,
            "ALIGNED": self.aligned,
        }


def stored(weight: Weight) -> Stored | None:
    """How `weight` is stored; None where our kernels don't read that."""
    matrix = Matrix.of(weight)
    planes = matrix.planes
    name = matrix.format.name.partition("[")[0]
    first = planes[0]
    readable = name in READ and all(plane.stride(-1) == 1 for plane in planes)
    if not readable or (name in _IN_PAIRS and first.data_ptr() % 2):
        return None
    stride = first.stride(0)
    bytes_apart = stride * first.element_size()
    aligned = first.data_ptr() % _VECTOR == 0 and bytes_apart % _VECTOR == 0
    if isinstance(matrix.format, Dense) or len(planes) == 1:
        return Stored(name, stride, aligned)
    scales = planes[1]
    plain = Stored(name, stride, aligned, scales.stride(0))
    if not isinstance(matrix.format, Fp8):
        return plain
    format = matrix.format
    return plain._replace(
        scale=dtype_name(format.scale),
        scale_rows=format.block_rows,
        scale_columns=format.block_columns,
    )


def common(weights: Iterable[Weight]) -> Stored | None:
    """How all of them are stored; None where that differs, or our kernels don't read it."""
    found = [stored(weight) for weight in weights]
    first = found[0]
    if first is None or any(
        each is None or each._replace(aligned=first.aligned) != first for each in found
    ):
        return None
    return first._replace(aligned=all(each is not None and each.aligned for each in found))


def addresses(weight: Weight | None) -> tuple[int, int]:
    """Where its first plane and its scales lie; 0 for none."""
    if weight is None:
        return 0, 0
    planes = Matrix.of(weight).planes
    return planes[0].data_ptr(), planes[1].data_ptr() if len(planes) > 1 else 0


def computed_in(x: torch.dtype, weight: Weight, *, wide: bool) -> torch.dtype:
    """What products of rows of dtype x are made of: x, as which codes are rounded, or where neither
    is to lose anything, `wide`, maybe float32.

    Raises ValueError for plain numbers that would have to be rounded.
    """
    format = Matrix.of(weight).format
    if format.exact_in(x):
        return x
    if wide:
        return torch.float32
    if isinstance(format, Dense):
        raise ValueError(f"rows of {x} meet weights of {format.dtype}, which it doesn't hold")
    return x


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Tensors where they lay when their addresses were noted; their memory lives as long as this.

    A parameter's own `data` may be exchanged (nn.Module.to does so), hence aliases of it.
    """

    tensors: tuple[Tensor | None, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> "Held":
        aliases = tuple(None if x is None else x.detach() for x in tensors)
        return cls(aliases, tuple(map(_place, aliases)))

    def is_of(self, tensors: Sequence[Tensor | None]) -> bool:
        return len(tensors) == len(self.places) and all(
            place == _place(x) for place, x in zip(self.places, tensors, strict=True)
        )


def _place(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def one_device(tensors: Sequence[Tensor | None]) -> torch.device | None:
    """The device that all of them lie on; None where there is no such device."""
    devices = {x.device for x in tensors if x is not None}
    return devices.pop() if len(devices) == 1 else None


def trained(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient is asked of any of them, which our kernels don't compute."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
