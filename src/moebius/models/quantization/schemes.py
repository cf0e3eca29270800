"""The ways in which a matrix is stored: what its tensors are called, their dtypes and shapes.

Layouts are those of transformers' integrations, compressed-tensors, GPTQModel, AutoAWQ, modelopt
and mlx-lm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moebius.models.quantization.fields import PLAIN_SCALES
from moebius.models.quantization.record import (
    Parts,
    Plane,
    Repacking,
    Scheme,
    Tensors,
    beside,
    lead,
)

_POWERS = {"F8_E8M0": "float8_e8m0fnu", "U8": "float8_e8m0fnu"}
_SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _named(tensor: str, found: Tensors, known: Mapping[str, str]) -> str:
    """What a stored tensor's dtype is called here; some known one where it is not known."""
    first = next(iter(known.values()))
    return known.get(found[tensor].dtype, first) if tensor in found else first


def _scale_shapes(shape: tuple[int, ...], rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    """What scales of blocks, so many one below and beside another, may be stored as."""
    found: list[tuple[int, ...]] = [(rows, columns)]
    if columns == 1:
        found.append((rows,))
        if rows == 1:
            found.append(())
    return lead(shape, *found)


def _groups(columns: int, group: int) -> int:
    if group and columns % group:
        raise ValueError(f"rows of {columns} numbers are no whole groups of {group}")
    return columns // group if group else 1


@dataclass(frozen=True, slots=True)
class Fp8Scheme(Scheme):
    """8-bit floating-point codes under the weight's own name.

    block   rows and columns that share a scale, 0 for all that there are; None: what is stored
            tells a scale a row from one for the matrix
    """

    block: tuple[int, int] | None
    codes_dtypes = ("F8_E4M3",)

    def codes(self, name: str) -> str:
        return name

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        scale = f"{name}_scale_inv"
        if scale not in found:
            scale = f"{name}_scale"
        rows, columns = shape[-2:]
        matrices = math.prod(shape[:-2])
        block = self.block
        if block is None:
            one = scale in found and math.prod(found[scale].shape) == matrices
            block = (0, 0) if one else (1, 0)
        n = -(-rows // block[0]) if block[0] else 1
        k = -(-columns // block[1]) if block[1] else 1
        shapes = _scale_shapes(shape, n, k)
        known = {**PLAIN_SCALES, **_POWERS}
        size = f"{block[0]}x{block[1]}"
        return Parts(
            f"fp8[{size},{_named(scale, found, known)}]",
            (Plane(name, self.codes_dtypes, (shape,)), Plane(scale, tuple(known), shapes)),
        )


@dataclass(frozen=True, slots=True)
class MxFp4Scheme(Scheme):
    """4-bit floating-point codes and a power of two for each 32 columns.

    suffixes   of the tensors of codes and of scales
    """

    suffixes: tuple[str, str] = ("_blocks", "_scales")
    codes_dtypes = ("U8",)

    def codes(self, name: str) -> str:
        return name + self.suffixes[0]

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        rows, columns = shape[-2:]
        groups = _groups(columns, 32)
        codes = lead(shape, (rows, groups, 16), (rows, columns // 2))
        scales = Plane(name + self.suffixes[1], tuple(_POWERS), lead(shape, (rows, groups)))
        planes = (Plane(self.codes(name), self.codes_dtypes, codes), scales)
        return Parts("mxfp4_planes", planes)


@dataclass(frozen=True, slots=True)
class NvFp4Scheme(Scheme):
    """4-bit floating-point codes, E4M3 scales of 16 columns, and a scale of the matrix.

    suffixes   of the three tensors
    divided    whether the groups' scales are divided by the matrix's, or multiplied with it
    """

    suffixes: tuple[str, str, str]
    divided: bool
    codes_dtypes = ("U8",)

    def codes(self, name: str) -> str:
        return name + self.suffixes[0]

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        rows, columns = shape[-2:]
        groups = _groups(columns, 16)
        scale = name + self.suffixes[1]
        whole = name + self.suffixes[2]
        planes = (
            Plane(self.codes(name), self.codes_dtypes, lead(shape, (rows, columns // 2))),
            Plane(scale, ("F8_E4M3",), lead(shape, (rows, groups))),
            Plane(whole, ("F32",), lead(shape, (1,), (), (1, 1))),
        )
        return Parts("nvfp4_divided" if self.divided else "nvfp4_multiplied", planes)


@dataclass(frozen=True, slots=True)
class WordsScheme(Scheme):
    """compressed-tensors' pack-quantized: codes of 4 or 8 bits in words along a row.

    group   columns that share a scale; 0 is the row
    zeros   there are zero points, packed along the rows
    ordered there is a g_idx
    """

    bits: int
    group: int
    zeros: bool = False
    ordered: bool = False
    codes_dtypes = ("I32",)

    def codes(self, name: str) -> str:
        return f"{name}_packed"

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        rows, columns = shape[-2:]
        groups = _groups(columns, self.group)
        per_word = 32 // self.bits
        if columns % per_word:
            raise ValueError(f"rows of {columns} codes are no whole words of {per_word}")
        scale = f"{name}_scale"
        planes = [
            Plane(self.codes(name), ("I32",), lead(shape, (rows, columns // per_word))),
            Plane(scale, tuple(PLAIN_SCALES), lead(shape, (rows, groups))),
        ]
        zeros = ""
        if self.zeros:
            zeros = ",words zeros"
            packed = lead(shape, (-(-rows // per_word), groups))
            planes.append(Plane(f"{name}_zero_point", ("I32",), packed))
        if self.ordered:
            planes.append(Plane(f"{name}_g_idx", ("I32",), lead(shape, (columns,))))
        base = f"int{self.bits}{'_words' if self.bits == 8 else ''}"
        dtype = _named(scale, found, PLAIN_SCALES)
        parameters = f"[{self.group},{dtype}{zeros}]"
        if not self.ordered:
            return Parts(base + parameters, tuple(planes))
        nbytes = rows * columns * self.bits // 8 + rows * groups * _SCALE_BYTES[dtype] + 4 * columns
        if self.zeros:
            nbytes += 4 * -(-rows // per_word) * groups
        ordered = Repacking(f"{base}_ordered{parameters}", nbytes)
        return Parts(f"{base}_indexed{parameters}", tuple(planes), ordered)


@dataclass(frozen=True, slots=True)
class BytesScheme(Scheme):
    """compressed-tensors' int-quantized: an int8 a code, under the weight's own name.

    group   columns that share a scale; 0 is the row
    zeros   there are zero points, int8
    """

    group: int
    zeros: bool = False
    codes_dtypes = ("I8",)

    def codes(self, name: str) -> str:
        return name

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        rows, columns = shape[-2:]
        groups = _groups(columns, self.group)
        scale = f"{name}_scale"
        shapes = _scale_shapes(shape, rows, groups)
        planes = [
            Plane(name, ("I8",), (shape,)),
            Plane(scale, tuple(PLAIN_SCALES), shapes),
        ]
        zeros = ""
        if self.zeros:
            zeros = ",int8 zeros"
            planes.append(Plane(f"{name}_zero_point", ("I8",), shapes))
        dtype = _named(scale, found, PLAIN_SCALES)
        return Parts(f"int8[{self.group},{dtype}{zeros}]", tuple(planes))


@dataclass(frozen=True, slots=True)
class AffineScheme(Scheme):
    """MLX's affine codes: packed in words along a row under the weight's own name."""

    bits: int
    group: int
    codes_dtypes = ("U32",)

    def codes(self, name: str) -> str:
        return name

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        rows, columns = shape[-2:]
        of_groups = lead(shape, (rows, _groups(columns, self.group)))
        words = lead(shape, (rows, columns * self.bits // 32))
        scales = beside(name, "scales")
        biases = beside(name, "biases")
        dtype = _named(scales, found, PLAIN_SCALES)
        stored = next(each for each, named in PLAIN_SCALES.items() if named == dtype)
        planes = (
            Plane(name, self.codes_dtypes, words),
            Plane(scales, tuple(PLAIN_SCALES), of_groups),
            Plane(biases, (stored,), of_groups),
        )
        return Parts(f"affine{self.bits}[{self.group},{dtype}]", planes)


def _require_words(shape: tuple[int, ...], rows_of: int, columns_of: int) -> None:
    """ValueError for rows or columns that are no whole words of so many."""
    if len(shape) > 2:
        raise ValueError("matrices that stand side by side in one tensor are not packed so")
    for count, each, what in ((shape[0], rows_of, "rows"), (shape[1], columns_of, "columns")):
        if count % each:
            raise ValueError(f"{count} {what} are no whole words of {each}")


@dataclass(frozen=True, slots=True)
class GptqScheme(Scheme):
    """GPTQ's, whose codes are packed along the columns, inputs first.

    zeros     as moebius.ops.formats.repacked.Gptq has them
    ordered   act-order: a g_idx says which group a column is in
    """

    bits: int
    group: int
    zeros: str
    ordered: bool
    codes_dtypes = ("I32",)

    def codes(self, name: str) -> str:
        return beside(name, "qweight")

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        per_word = 32 // self.bits
        _require_words(shape, per_word, per_word)
        rows, columns = shape
        groups = _groups(columns, self.group)
        zeros = beside(name, "qzeros")
        scales = beside(name, "scales")
        order = beside(name, "g_idx")
        planes = [
            Plane(self.codes(name), ("I32",), ((columns // per_word, rows),)),
            Plane(zeros, ("I32",), ((groups, rows // per_word),)),
            Plane(scales, tuple(PLAIN_SCALES), ((groups, rows),)),
        ]
        index = "ordered" if self.ordered else "plain" if order in found else "none"
        if index != "none":
            planes.append(Plane(order, ("I32",), ((columns,),)))
        dtype = _named(scales, found, PLAIN_SCALES)
        format = f"gptq{self.bits}[{self.group},{dtype},{self.zeros},{index}]"
        return Parts(format, tuple(planes), self._integers(rows, columns, dtype))

    def _integers(self, rows: int, columns: int, dtype: str) -> Repacking:
        """With plain zero points that have room for 2^bits."""
        groups = _groups(columns, self.group)
        base = "int4" if self.bits == 4 else "int8_words"
        base += "_ordered" if self.ordered else ""
        nbytes = rows * columns * self.bits // 8 + rows * groups * _SCALE_BYTES[dtype]
        zeros = ""
        if self.zeros != "symmetric":
            zeros = ",int8 zeros" if self.bits == 4 else ",int16 zeros"
            nbytes += rows * groups * (1 if self.bits == 4 else 2)
        if self.ordered:
            nbytes += 4 * columns
        return Repacking(f"{base}[{self.group},{dtype}{zeros}]", nbytes)


@dataclass(frozen=True, slots=True)
class AwqScheme(Scheme):
    """AutoAWQ's version "gemm": 4 bits, packed along the rows, inputs first."""

    group: int
    codes_dtypes = ("I32",)

    def codes(self, name: str) -> str:
        return beside(name, "qweight")

    def parts(self, name: str, shape: tuple[int, ...], found: Tensors) -> Parts:
        _require_words(shape, 8, 8)
        rows, columns = shape
        groups = _groups(columns, self.group)
        scales = beside(name, "scales")
        planes = (
            Plane(self.codes(name), ("I32",), ((columns, rows // 8),)),
            Plane(beside(name, "qzeros"), ("I32",), ((groups, rows // 8),)),
            Plane(scales, tuple(PLAIN_SCALES), ((groups, rows),)),
        )
        dtype = _named(scales, found, PLAIN_SCALES)
        nbytes = rows * columns // 2 + rows * groups * (_SCALE_BYTES[dtype] + 1)
        integers = Repacking(f"int4[{self.group},{dtype},int8 zeros]", nbytes)
        return Parts(f"awq[{self.group},{dtype}]", planes, integers)
