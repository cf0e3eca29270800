"""What formats share in which groups of a row's numbers have a scale."""

from collections.abc import Callable

import torch
from torch import Tensor


def times_groups(numbers_RC: Tensor, scales_RG: Tensor, group: int) -> None:
    """Multiply each number with its group's scale, in place; the last group may be shorter.

    group: how many columns share one; 0: all.
    """
    _in_groups(numbers_RC, scales_RG, group, Tensor.mul_)


def minus_groups(numbers_RC: Tensor, zeros_RG: Tensor, group: int) -> None:
    """Subtract its group's zero from each number, in place."""
    _in_groups(numbers_RC, zeros_RG, group, Tensor.sub_)


def plus_groups(numbers_RC: Tensor, added_RG: Tensor, group: int) -> None:
    """Add what its group has to each number, in place."""
    _in_groups(numbers_RC, added_RG, group, Tensor.add_)


def _in_groups(
    numbers_RC: Tensor,
    of_groups_RG: Tensor,
    group: int,
    change: Callable[[Tensor, Tensor], Tensor],
) -> None:
    columns = numbers_RC.shape[1]
    group = group or columns
    whole = columns // group
    first = numbers_RC[:, : whole * group].view(len(numbers_RC), whole, group)
    change(first, of_groups_RG[:, :whole].unsqueeze(-1))
    if whole * group < columns:
        change(numbers_RC[:, whole * group :], of_groups_RG[:, whole:])


def row_ids(rows: slice | Tensor, plane: Tensor) -> Tensor:
    """The numbers of the rows that are selected of a plane (int64)."""
    if isinstance(rows, Tensor):
        return rows
    return torch.arange(len(plane), device=plane.device)[rows]


def transposed(plane: Tensor) -> Tensor:
    """A copy with rows for columns, dense even where there is one row alone."""
    columns, rows = plane.shape
    return torch.empty(rows, columns, dtype=plane.dtype, device=plane.device).copy_(plane.T)


def unpacked(words_RW: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits out of int32 words, the lowest bits first: (R, W * 32 / bits) uint8."""
    bytes_RY = words_RW.view(torch.uint8)
    return bytes_RY if bits == 8 else two_a_byte(bytes_RY)


def two_a_byte(bytes_RY: Tensor) -> Tensor:
    """Codes of 4 bits, of each byte the low ones first: (R, 2 * Y) uint8."""
    return torch.stack((bytes_RY & 15, bytes_RY >> 4), dim=-1).flatten(1)


def packed(codes_RC: Tensor, bits: int) -> Tensor:
    """The inverse; C is a multiple of 32 / bits."""
    if bits == 4:
        codes_RC = codes_RC[:, ::2] | (codes_RC[:, 1::2] << 4)
    return codes_RC.contiguous().view(torch.int32)
