"""Matrices of integer codes: groups of a row's numbers share a scale, and some a zero point.

As compressed-tensors stores them, and as GPTQ's and AWQ's are repacked.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moebius.ops.formats.dense import dtype_name
from moebius.ops.formats.format import Format, Planes, PlaneShape
from moebius.ops.formats.groups import (
    minus_groups,
    plus_groups,
    row_ids,
    times_groups,
    transposed,
    unpacked,
)

Zeros = Literal["none", "words", "int8", "int16"]


@dataclass(frozen=True, slots=True, eq=False)
class Integers(Format):
    """Numbers (code - zero) * scale. Planes: codes, scales, then zeros and order if there are any.

    words     codes are packed in int32 words along a row, the lowest bits first, as c + 2^(bits-1);
              else each is an int8
    bits      4 or 8; of codes that are not packed it says nothing
    group     columns that share a scale; 0 is the whole row
    scale     the scales' dtype, (rows, groups)
    zeros     how zero points are stored: none are, all are 0; `words`: packed as codes are, but
              along the rows; else as plain integers (rows, groups). Subtracted from signed codes
    ordered   columns lie group by group, which is not their order in the matrix (GPTQ's act-order):
              the last plane says which column each is (columns,) int32
    """

    name: str
    words: bool
    bits: int
    group: int
    scale: torch.dtype
    zeros: Zeros
    ordered: bool

    @classmethod
    def of(
        cls,
        bits: int,
        group: int,
        scale: torch.dtype,
        *,
        words: bool = True,
        zeros: Zeros = "none",
        ordered: bool = False,
    ) -> "Integers":
        base = f"int{bits}" + ("_words" if words and bits == 8 else "")
        arguments = [str(group), dtype_name(scale)]
        if zeros != "none":
            arguments.append(f"{zeros} zeros")
        name = f"{base}{'_ordered' if ordered else ''}[{','.join(arguments)}]"
        return cls(name, words, bits, group, scale, zeros, ordered)

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        if columns % (self.group or 1):
            raise ValueError(f"rows of {columns} numbers are no whole groups of {self.group}")
        if self.words and columns % self.per_word:
            raise ValueError(f"rows of {columns} codes are no whole words of {self.per_word}")
        codes: PlaneShape = (torch.int8, (rows, columns))
        if self.words:
            codes = (torch.int32, (rows, columns // self.per_word))
        groups = columns // self.group if self.group else 1
        found = [codes, (self.scale, (rows, groups))]
        if self.zeros == "words":
            found.append((torch.int32, (-(-rows // self.per_word), groups)))
        elif self.zeros != "none":
            found.append((getattr(torch, self.zeros), (rows, groups)))
        if self.ordered:
            found.append((torch.int32, (columns,)))
        return tuple(found)

    def select(self, planes: Planes, rows: slice | Tensor) -> tuple[Format, Planes]:
        codes, scales, *rest = planes
        order = rest[-1:] if self.ordered else []
        chosen = (codes[rows], scales[rows])
        if self.zeros == "none":
            return self, (*chosen, *order)
        zeros = rest[0]
        if self.zeros != "words":
            return self, (*chosen, zeros[rows], *order)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(codes))
            if step == 1 and start % self.per_word == 0:
                last = -(-max(stop, start) // self.per_word)
                return self, (*chosen, zeros[start // self.per_word : last], *order)
        plain = self._zeros(zeros, len(codes))[row_ids(rows, codes)]
        parted = Integers.of(
            self.bits,
            self.group,
            self.scale,
            words=self.words,
            zeros="int8",
            ordered=self.ordered,
        )
        return parted, (*chosen, plain, *order)

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        codes, scales, *rest = planes
        if self.words:
            numbers = unpacked(codes, self.bits).float().sub_(1 << (self.bits - 1))
        else:
            numbers = codes.float()
        zeros = self._zeros(rest[0], len(codes)).float() if self.zeros != "none" else None
        if zeros is not None:
            minus_groups(numbers, zeros, self.group)
        times_groups(numbers, scales.float(), self.group)
        if self.ordered:
            numbers = torch.empty_like(numbers).index_copy_(1, rest[-1].long(), numbers)
        return numbers.to(dtype)

    def zero_points(self, planes: Planes) -> Tensor | None:
        """Those of signed codes, (rows, groups), where there are any: unpacked, or as they lie."""
        if self.zeros == "none":
            return None
        return self._zeros(planes[2], len(planes[0])).contiguous()

    def _zeros(self, stored: Tensor, rows: int) -> Tensor:
        """Zero points of signed codes, (rows, groups)."""
        if self.zeros != "words":
            return stored
        codes_GR = unpacked(transposed(stored), self.bits)[:, :rows]
        return (codes_GR.to(torch.int16) - (1 << (self.bits - 1))).T.to(torch.int8)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return False


@dataclass(frozen=True, slots=True, eq=False)
class Affine(Format):
    """Numbers scale * code + bias, as MLX stores them: codes packed in words along a row.

    Codes are unsigned; scales and biases have the same dtype and shape (rows, groups).
    """

    name: str
    bits: int
    group: int
    scale: torch.dtype

    @classmethod
    def of(cls, bits: int, group: int, scale: torch.dtype) -> "Affine":
        return cls(f"affine{bits}[{group},{dtype_name(scale)}]", bits, group, scale)

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        if columns % self.group:
            raise ValueError(f"rows of {columns} numbers are no whole groups of {self.group}")
        codes = (torch.int32, (rows, columns * self.bits // 32))
        of_groups = (self.scale, (rows, columns // self.group))
        return codes, of_groups, of_groups

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        words, scales, biases = planes
        numbers = unpacked(words, self.bits).float()
        times_groups(numbers, scales.float(), self.group)
        plus_groups(numbers, biases.float(), self.group)
        return numbers.to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return False
