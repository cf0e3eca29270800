"""Formats made of blocks of bytes, one after the other in a row: the types of GGUF files.

A block holds so many numbers in so many bytes: small integer codes, and the floating-point scales
that they share. Their layouts are those of ggml (ggml-common.h); the numbers that they stand for
are computed in float32, in the order in which gguf-py computes them, so that both have the same
bits.

Suffixes: N blocks, E numbers of a block, S sub-blocks of a block with scales of their own, P
numbers of a sub-block (E = S * P), Y bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.ops.formats.format import Format, Planes, PlaneShape


class Unpacked(NamedTuple):
    """Blocks taken apart: their numbers are scales * codes, plus what each sub-block has added.

    scales_NS, added_NS   float32; added is None where a format adds nothing
    codes_NSP             small integers, as float32
    """

    scales_NS: Tensor
    codes_NSP: Tensor
    added_NS: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BlockFormat(Format):
    """One plane, uint8: the blocks of each row.

    elements   numbers of a block; columns are a multiple of it
    nbytes     bytes of a block, which is aligned to nothing
    unpack     takes blocks (N, nbytes) apart
    exact      the narrowest dtype that holds each of its numbers exactly; None where float32
               rounds some of them
    """

    name: str
    elements: int
    nbytes: int
    unpack: Callable[[Tensor], Unpacked]
    exact: torch.dtype | None = torch.float32

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        if columns % self.elements:
            raise ValueError(
                f"rows of {columns} numbers are no whole blocks of {self.name}, which hold "
                f"{self.elements} each"
            )
        return ((torch.uint8, (rows, columns // self.elements * self.nbytes)),)

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        (bytes_RY,) = planes
        scales_NS, codes_NSP, added_NS = self.unpack(bytes_RY.reshape(-1, self.nbytes))
        numbers_NSP = codes_NSP.mul_(scales_NS.unsqueeze(-1))
        if added_NS is not None:
            numbers_NSP.add_(added_NS.unsqueeze(-1))
        columns = bytes_RY.shape[1] // self.nbytes * self.elements
        return numbers_NSP.view(len(bytes_RY), columns).to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return self.exact is not None and torch.promote_types(self.exact, dtype) == dtype


def halves(blocks_NY: Tensor, start: int) -> Tensor:
    """The float16 number that begins at byte `start` of each block, as float32 (N, 1)."""
    # A copy, because a view must lie on an even address.
    both = blocks_NY[:, start : start + 2].clone(memory_format=torch.contiguous_format)
    return both.view(torch.float16).float()


def nibbles(bytes_NY: Tensor, run: int) -> Tensor:
    """Of each run of bytes the low four bits, then the high ones: (N, runs, 2 * run) uint8."""
    return fields(bytes_NY, run, 4)


def fields(bytes_NY: Tensor, run: int, bits: int) -> Tensor:
    """Of each run of bytes their lowest bits, then the next, up to the highest.

    (N, runs, 8 // bits * run) uint8.
    """
    runs = bytes_NY.reshape(len(bytes_NY), bytes_NY.shape[1] // run, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=bytes_NY.device).view(-1, 1)
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(2)


def looked_up(codes: Tensor, table: tuple[int, ...]) -> Tensor:
    """table[codes], float32."""
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.long()]
