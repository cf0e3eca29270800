"""What the parts of the CPU's backend share: the compiled kernels, and how tensors reach them."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from moebius import _cpu, machine
from moebius.errors import ConfigError
from moebius.ops.capability import Feature, Operation, Use
from moebius.ops.config import Activations
from moebius.ops.cpu.recorder import Call, Recorder
from moebius.ops.formats import MX_GROUP, Affine, Fp8, Integers, Mxfp4Planes, dense
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from moebius.ops.weights import Matrix, Weight, planes_of

# As csrc/kernels.h and formats.h number them: what is computed in, held in caches, and matrices are
# stored in.
DTYPES = {torch.bfloat16: 0, torch.float32: 1}
CACHES = {**DTYPES, torch.int8: 2}
FORMATS = {name: number for number, name in enumerate(_cpu.formats())}


def check(x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError for what the kernels would read as what it is not."""
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"the CPU kernels want {dtype} here, not {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(
            f"the CPU kernels want contiguous tensors, not strides {x.stride()} for shape "
            f"{tuple(x.shape)}"
        )


def check_shape(what: str, x: Tensor | None, *shape: int) -> None:
    """Raises ValueError for an x of another shape, behind whose end the kernels would read."""
    if x is not None and x.shape != shape:
        raise ValueError(f"the CPU kernels want {what} {shape}, not {tuple(x.shape)}")


def address(x: Tensor | None, dtype: torch.dtype | None = None) -> int:
    """Where x lies, contiguous and, where that is given, of `dtype`; 0 for none."""
    if x is None:
        return 0
    check(x, dtype)
    return x.data_ptr()


def require_no_gradient(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "the CPU kernels compute no gradients; train with ReferenceOps, or serve under no_grad"
        )


def require_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> int:
    for x in tensors:
        if x is not None and x.dtype != dtype:
            raise ValueError(f"the CPU kernels want one dtype, not {dtype} and {x.dtype}")
    if dtype not in DTYPES:
        raise ValueError(f"the CPU kernels compute in bfloat16 and float32, not in {dtype}")
    return DTYPES[dtype]


def norm_dtype(dtype: torch.dtype, weight: Tensor) -> int:
    """The number of a norm weight's dtype beside rows of `dtype`."""
    return DTYPES[torch.float32] if weight.dtype == torch.float32 else require_dtype(dtype, weight)


# Codes whose scales lie in a plane of their own, read where groups of columns are whole blocks.
_GROUPED = {
    "int4": (
        "int4 of 32",
        "int4 of 32 with zeros",
        "int4_ordered of 32",
        "int4_ordered of 32 with zeros",
    ),
    "int8": ("int8 of 32",),
    "int8_words": ("int8_words of 32", "int8_words_ordered of 32"),
    "affine4": ("affine4 of 32",),
    "affine8": ("affine8 of 32",),
}
_OF_GROUPS = (Affine, Integers, Mxfp4Planes)
# As csrc/block_kernels.h numbers them; bytes are powers of two.
_SCALES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2, torch.uint8: 3}


def _reads(name: str, dtype: torch.dtype) -> bool:
    return dtype in DTYPES and name in FORMATS and _cpu.reads(DTYPES[dtype], FORMATS[name])


@cache
def formats(dtype: torch.dtype) -> frozenset[str]:
    """The formats that products of `dtype` read."""
    names = [name for name in FORMATS if _reads(name, dtype)]
    return frozenset(each for name in names for each in _GROUPED.get(name, (name,)))


@cache
def _format_number(name: str, dtype: torch.dtype) -> int:
    """A format's number in the kernels. Raises ValueError where products of `dtype` read none."""
    name = name.partition("[")[0].removesuffix("_ordered")
    if not _reads(name, dtype):
        raise ValueError(f"the CPU kernels read no {name} weights where they compute in {dtype}")
    return FORMATS[name]


def native_matrix(weight: Weight, dtype: torch.dtype) -> _cpu.Matrix:
    """A weight for products of `dtype`, where it lies."""
    rows, columns = weight.shape
    if isinstance(weight, Tensor):
        number = _format_number(dense(weight.dtype).name, dtype)
        return _cpu.Matrix(format=number, rows=rows, columns=columns, data=address(weight))
    number = _format_number(weight.format.name, dtype)
    if isinstance(weight.format, Fp8):
        codes, scales = weight.planes
        wide = scales.float().contiguous()
        return _cpu.Matrix(
            format=number,
            rows=rows,
            columns=columns,
            data=address(codes),
            scales=address(wide),
            block_rows=weight.format.block_rows or rows,
            block_columns=weight.format.block_columns or columns,
        )
    if isinstance(weight.format, _OF_GROUPS):
        return _of_groups(weight, number)
    (plane,) = weight.planes
    return _cpu.Matrix(format=number, rows=rows, columns=columns, data=address(plane))


def _of_groups(weight: Matrix, number: int) -> _cpu.Matrix:
    """Codes and scales where they lie. Raises ValueError for groups that are no whole blocks."""
    format = weight.format
    rows, columns = weight.shape
    zeros = order = None
    group = MX_GROUP
    if isinstance(format, Affine | Integers):
        group = format.group or columns
    if isinstance(format, Integers):
        zeros = format.zero_points(weight.planes)
        order = weight.planes[-1] if format.ordered else None
    codes, scales = weight.planes[:2]
    biases = weight.planes[2] if isinstance(format, Affine) else None
    return _cpu.Matrix(
        format=number,
        rows=rows,
        columns=columns,
        data=address(codes),
        scales=address(scales),
        block_columns=group,
        scale_type=_SCALES[scales.dtype],
        zeros=address(zeros),
        copy_zeros=not any(zeros is plane for plane in weight.planes),
        biases=address(biases),
        order=address(order),
    )


def common_dtype(weights: Iterable[Weight]) -> torch.dtype:
    """The dtype of all of them."""
    planes = [weight if isinstance(weight, Tensor) else weight.planes[0] for weight in weights]
    found = list(dict.fromkeys(plane.dtype for plane in planes))
    if len(found) != 1:
        raise ValueError(f"the CPU kernels want one dtype, not {' and '.join(map(str, found))}")
    return found[0]


class Held:
    """Tensors where they lay when their addresses were noted; their memory lives as long as this.

    A parameter's own `data` may be exchanged (nn.Module.to does so), hence aliases of it.
    """

    __slots__ = ("_addresses", "_tensors")

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        self._tensors = tuple(None if x is None else x.detach() for x in tensors)
        self._addresses = list(map(_place, self._tensors))

    def is_of(self, tensors: Sequence[Tensor | None]) -> bool:
        if len(tensors) != len(self._addresses):
            return False
        # One by one, as the first of thousands that are others is enough.
        pairs = zip(self._addresses, tensors, strict=True)
        return all(address == _place(x) for address, x in pairs)


def _place(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class CpuBase(Ops):
    """The compiled kernels, and where their results go.

    activations: int8 for what meets weights in blocks to be quantised, which is fast and has the
    same bits on every instruction set; float for it to stay as it is.

    Raises ConfigError for an instruction set that does not exist or that the processor lacks.
    """

    own_threads = True

    def __init__(
        self,
        threads: int | None = None,
        isa: str | None = None,
        activations: Activations = "int8",
        *,
        ordered: bool = False,
    ) -> None:
        """ordered   products of plain numbers are summed in one order, the same on every
        instruction set, as products of blocks are anyway; it is not the fastest"""
        isa = os.environ.get("MOEBIUS_CPU_ISA", "") if isa is None else isa
        as_floats = activations == "float"
        try:
            self._native = _cpu.Ops(isa, threads or machine.threads(), as_floats, ordered)
        except ValueError as error:
            has = ", ".join(_cpu.available())
            raise ConfigError(
                f"MOEBIUS_CPU_ISA={isa}: {error}; here there are: {has}, reference"
            ) from None
        self.name = f"cpu-{self._native.name}"
        if activations == "float":
            self.name += "-float"
        self._recorder: Recorder | None = None
        # Logits of which some ids alone are allowed (ops/cpu/sampling.py).
        self._shaped: tuple[Tensor, _cpu.Logits] | None = None
        # What the kernels lack, plain PyTorch computes: `capability` says where.
        self._fallback = ReferenceOps()

    def _empty(self, like: Tensor, row: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for as many rows as `like` has."""
        if self._recorder is not None:
            return self._recorder.empty(like, row, dtype)
        return torch.empty((len(like), *row), dtype=dtype)

    def _at(self, x: Tensor | None, dtype: torch.dtype | None = None) -> int:
        """Where the kernels find x, which must be contiguous and, where that is given, of `dtype`;
        0 for none."""
        if x is None or self._recorder is None:
            return address(x, dtype)
        check(x, dtype)
        return self._recorder.address(x)

    def _looking_at(self, tensors: Sequence[Tensor | None]) -> AbstractContextManager[None]:
        """Around what is worked out of weights alone, whether or not a step is being recorded."""
        return nullcontext() if self._recorder is None else self._recorder.unwatched(tensors)

    def _matrix(self, weight: Weight, dtype: torch.dtype) -> _cpu.Matrix:
        """A weight for products of `dtype`, which a recording holds."""
        matrix = native_matrix(weight, dtype)
        for plane in planes_of([weight]):
            self._at(plane)
        return matrix

    def _run(
        self,
        operation: Operation,
        call: Call,
        x: Tensor,
        rows: int,
        *held: object,
        dtype: torch.dtype | None = None,
        features: frozenset[Feature] = frozenset(),
    ) -> None:
        """Make `call`, or note it: on `rows` rows, x's or a multiple of them.

        held: what the call points to, besides tensors. dtype: what it computes in, None for x's.
        """
        if self._recorder is None:
            call.run(self._native, rows)
            return
        self._recorder.note(operation, call, x, rows, dtype or x.dtype, features)
        self._recorder.held += held

    def _lacks(self, use: Use) -> None:
        """The kernels lack `use`, which the reference computes."""
        if self._recorder is not None:
            self._recorder.uses.add(use)
