"""What no product reads where it lies, as its columns are stored otherwise: it is repacked once.

GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) pack their codes for kernels of GPUs, inputs
first. With act-order, columns of a group are scattered over the matrix.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moebius.ops.formats.dense import dtype_name
from moebius.ops.formats.format import Format, Planes, PlaneShape
from moebius.ops.formats.groups import packed, transposed, unpacked
from moebius.ops.formats.integers import Integers, Zeros

GptqZeros = Literal["symmetric", "minus one", "plain"]
Index = Literal["none", "plain", "ordered"]


class Repacked(Format):
    """A format that becomes another one (`target`) before anything is computed with it."""

    target: Integers

    @abstractmethod
    def repacked(self, planes: Planes) -> Planes:
        """The planes of `target`. Raises ValueError for what contradicts the format."""

    def select(self, planes: Planes, rows: slice | Tensor) -> tuple[Format, Planes]:
        return self.target.select(self.repacked(planes), rows)

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        return self.target.widened(self.repacked(planes), dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return False


def _by_group(index_C: Tensor, groups: int) -> Tensor:
    """The columns (int64), those of the first group first, of a plane that says each one's group.
    Raises ValueError for groups that are not all of one size."""
    if len(index_C) and not 0 <= int(index_C.min()) <= int(index_C.max()) < groups:
        raise ValueError(f"its g_idx names groups beyond the {groups} that there are")
    counts = torch.bincount(index_C.long(), minlength=groups)
    if int(counts.min()) != int(counts.max()):
        raise ValueError(
            f"its g_idx has groups of {int(counts.min())} to {int(counts.max())} columns, which "
            "all have to be of one size"
        )
    return torch.argsort(index_C.long(), stable=True)


def _words_in_order(words_RW: Tensor, bits: int, columns_C: Tensor) -> Tensor:
    """Words along a row, of the same codes in another order."""
    return packed(unpacked(words_RW, bits)[:, columns_C], bits)


@dataclass(frozen=True, slots=True, eq=False)
class Indexed(Repacked):
    """compressed-tensors' act-order. Planes: those of `target`, but that columns lie in the matrix'
    order, and the last plane says which group each one is in (columns,) int32."""

    name: str
    target: Integers

    @classmethod
    def of(cls, bits: int, group: int, scale: torch.dtype, zeros: Zeros) -> "Indexed":
        target = Integers.of(bits, group, scale, zeros=zeros, ordered=True)
        return cls(target.name.replace("_ordered", "_indexed"), target)

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        return self.target.planes(rows, columns)

    def repacked(self, planes: Planes) -> Planes:
        words_RW, scales_RG, *zeros, index_C = planes
        columns_C = _by_group(index_C, scales_RG.shape[1])
        codes_RW = _words_in_order(words_RW, self.target.bits, columns_C)
        return (codes_RW, scales_RG, *zeros, columns_C.int())


@dataclass(frozen=True, slots=True, eq=False)
class Gptq(Repacked):
    """Planes: codes (columns / n, rows), zeros (groups, rows / n), n a word; scales (groups, rows).

    zeros   `symmetric`: 2^(bits-1), whichever of the two spellings is stored; `minus one`: what is
            stored is one less than the zero point (version 1); `plain`: as it is (version 2)
    index   whether there is a plane (columns,) int32 that says which group a column is in:
            `plain`, groups follow one another; `ordered`, they do not (act-order)
    """

    name: str
    bits: int
    group: int
    zeros: GptqZeros
    index: Index
    target: Integers

    @classmethod
    def of(
        cls, bits: int, group: int, scale: torch.dtype, zeros: GptqZeros, index: Index
    ) -> "Gptq":
        # Version 1 has zero points up to 2^bits, one more than codes have bits for.
        plain: Zeros = "int8" if bits == 4 else "int16"
        target = Integers.of(
            bits,
            group,
            scale,
            zeros="none" if zeros == "symmetric" else plain,
            ordered=index == "ordered",
        )
        name = f"gptq{bits}[{group},{dtype_name(scale)},{zeros},{index}]"
        return cls(name, bits, group, zeros, index, target)

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        per_word = 32 // self.bits
        if rows % per_word:
            raise ValueError(f"{rows} rows are no whole words of {per_word}")
        self.target.planes(rows, columns)
        groups = columns // self.group if self.group else 1
        found: list[PlaneShape] = [
            (torch.int32, (columns // per_word, rows)),
            (torch.int32, (groups, rows // per_word)),
            (self.target.scale, (groups, rows)),
        ]
        if self.index != "none":
            found.append((torch.int32, (columns,)))
        return tuple(found)

    def repacked(self, planes: Planes) -> Planes:
        words_WR, zeros_GY, scales_GR, *index = planes
        # A word holds consecutive columns of one row, the lowest bits first, as the target's do.
        words_RW = transposed(words_WR)
        order = self._order(index[0], len(scales_GR)) if index else []
        if order:
            words_RW = _words_in_order(words_RW, self.bits, order[0])
        found = [words_RW, transposed(scales_GR)]
        zeros_RG = transposed(unpacked(zeros_GY, self.bits)).to(torch.int16)
        middle = 1 << (self.bits - 1)
        if self.zeros == "symmetric":
            _require_symmetric(zeros_RG, middle)
        else:
            signed = zeros_RG - (middle - (self.zeros == "minus one"))
            found.append(signed.to(getattr(torch, self.target.zeros)))
        return (*found, *(columns_C.int() for columns_C in order))

    def _order(self, index_C: Tensor, groups: int) -> list[Tensor]:
        """The order that the target's columns lie in (int64), where it has one of its own."""
        columns_C = _by_group(index_C, groups)
        if self.index == "ordered":
            return [columns_C]
        following = torch.arange(len(index_C), device=index_C.device) // (
            self.group or len(index_C)
        )
        if not torch.equal(index_C.long(), following):
            raise ValueError(
                "its g_idx has an order of its own, but quantization_config says desc_act = false; "
                "it would have to be true"
            )
        return []


def _require_symmetric(zeros: Tensor, middle: int) -> None:
    """Zero points of version 1 are stored as 2^(bits-1) - 1, of version 2 as 2^(bits-1); files that
    call themselves the one may hold the other."""
    first = int(zeros[0, 0]) if zeros.numel() else middle
    if first not in (middle - 1, middle) or not bool((zeros == first).all()):
        raise ValueError(
            f"its qzeros are not all {middle - 1}, or all {middle}, but quantization_config says "
            "sym = true; it would have to be false"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Awq(Repacked):
    """Planes: codes (columns, rows / 8), zeros (groups, rows / 8), scales (groups, rows); 4 bits.

    The codes of eight rows in a word are interleaved; version "gemm" of AutoAWQ.
    """

    name: str
    group: int
    target: Integers

    @classmethod
    def of(cls, group: int, scale: torch.dtype) -> "Awq":
        name = f"awq[{group},{dtype_name(scale)}]"
        return cls(name, group, Integers.of(4, group, scale, zeros="int8"))

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        if rows % 8:
            raise ValueError(f"{rows} rows are no whole words of 8")
        self.target.planes(rows, columns)
        groups = columns // self.group if self.group else 1
        return (
            (torch.int32, (columns, rows // 8)),
            (torch.int32, (groups, rows // 8)),
            (self.target.scale, (groups, rows)),
        )

    def repacked(self, planes: Planes) -> Planes:
        words_CY, zeros_GY, scales_GR = planes
        codes_RC = transposed(_in_order(words_CY))
        zeros_RG = transposed(_in_order(zeros_GY)).to(torch.int8) - 8
        return packed(codes_RC, 4), transposed(scales_GR), zeros_RG


def _in_order(words: Tensor) -> Tensor:
    """The codes of AWQ's words, a row's outputs in order: (..., 8 * words) uint8.

    Those of outputs 0 to 7 are in bits 0, 16, 4, 20, 8, 24, 12 and 28 onward.
    """
    codes = unpacked(words, 4).view(len(words), -1, 2, 4)
    return codes.transpose(2, 3).flatten(1)
