"""Differentiable grouped products by Triton kernels, for experts that are trained.

torch.nn.functional.grouped_mm is fast on some cards alone, on others waits for the device to know
the groups, leaves rows behind the last group as memory was, and has had wrong gradients for groups
without rows (pytorch issues 172439 and 193633). These kernels are one source for all cards from
Ampere on, read each expert's matrix where it lies, and wait for nothing.

Shape legend: P rows that are sorted by expert, O outputs, I inputs, E experts, H those held here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import triton
from torch import Tensor

from moebius.ops.formats import dtype_name
from moebius.ops.triton.kernels import grouped as kernels
from moebius.ops.triton.linear import DTYPE_OF
from moebius.ops.triton.tiles import Tile

# By the bytes of a number. Training has rows by the hundred: larger tiles than serving's. What is
# on its way of three steps fits into the 99 KiB of the smallest cards that there are kernels for.
TILES = {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)}


class Groups(NamedTuple):
    """Which rows are whose.

    starts   (E + 2,) int32: where each expert's rows begin, then where those begin that no expert
             has, and where these end
    """

    starts: Tensor

    @classmethod
    def of(cls, sorted_ids_P: Tensor, experts: int) -> Self:
        """Of rows in the order of their experts' numbers; that of E stands for none."""
        wanted = torch.arange(experts + 2, device=sorted_ids_P.device)
        return cls(torch.searchsorted(sorted_ids_P, wanted, out_int32=True))

    @property
    def experts(self) -> int:
        return len(self.starts) - 2


class Matrices(NamedTuple):
    """One matrix of each expert, all of one shape and dtype.

    held     those that are here, (O, I) each
    places   the expert of each of them
    table    (E + 1,) int64: where each expert's lies; 0 for those elsewhere, and for none
    """

    held: tuple[Tensor, ...]
    places: tuple[int, ...]
    table: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor | None]) -> Self:
        """Of contiguous weights, which have to stay where they are."""
        held = tuple(weight for weight in weights if weight is not None)
        places = tuple(e for e, weight in enumerate(weights) if weight is not None)
        assert all(weight.is_contiguous() for weight in held), "a parameter is"
        addresses = [0 if weight is None else weight.data_ptr() for weight in weights]
        table = torch.tensor([*addresses, 0], dtype=torch.int64).to(held[0].device)
        return cls(held, places, table)

    @property
    def aligned(self) -> bool:
        return all(weight.data_ptr() % 16 == 0 for weight in self.held)


def grouped_product(x_PI: Tensor, groups: Groups, matrices: Matrices) -> Tensor:
    """Each row times its expert's matrix, transposed (P, O); rows of none are zeros.

    Differentiable in the rows and in the matrices. Sums are in float32, in one order.
    """
    given = (x_PI, groups, matrices, *matrices.held)
    out: Tensor = _Product.apply(*given)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_PI: Tensor, groups: Groups, matrices: Matrices, *held: Tensor
    ) -> Tensor:
        x_PI = x_PI.contiguous()
        ctx.groups = groups
        ctx.matrices = matrices
        ctx.save_for_backward(x_PI, *held)
        outer, inner = held[0].shape
        return _by_matrix(x_PI, groups, matrices, (inner, outer), (1, inner))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_PO = grads[0].contiguous()
        x_PI, *held = ctx.saved_tensors
        outer, inner = held[0].shape
        grad_x_PI = None
        if ctx.needs_input_grad[0]:
            grad_x_PI = _by_matrix(grad_PO, ctx.groups, ctx.matrices, (outer, inner), (inner, 1))
        of_matrices: list[Tensor | None] = [None] * len(held)
        if any(ctx.needs_input_grad[3:]):
            grad_EOI = _by_rows(grad_PO, x_PI, ctx.groups)
            every = grad_EOI.unbind()
            of_matrices = [every[e] for e in ctx.matrices.places]
        return grad_x_PI, None, None, *of_matrices


def _by_matrix(
    x: Tensor,
    groups: Groups,
    matrices: Matrices,
    sizes: tuple[int, int],
    strides: tuple[int, int],
) -> Tensor:
    """sizes, strides: of a matrix along what is summed over, and along what comes out."""
    inner, outer = sizes
    out = x.new_empty(len(x), outer)
    tile = TILES[x.element_size()]
    # Each group's last tile may hold but one row.
    tiles = min(len(x), len(x) // tile.rows + groups.experts + 1)
    if tiles and outer:
        kernels.rows_by_matrix[(tiles, triton.cdiv(outer, tile.columns))](
            x,
            matrices.table,
            groups.starts,
            out,
            groups.experts + 1,
            inner,
            outer,
            x.stride(0),
            *strides,
            NAME=dtype_name(matrices.held[0].dtype),
            ALIGNED=matrices.aligned,
            DTYPE=DTYPE_OF[x.dtype],
            GROUPS=triton.next_power_of_2(groups.experts + 1),
            **_constants(tile),
        )
    return out


def _by_rows(left_PO: Tensor, right_PI: Tensor, groups: Groups) -> Tensor:
    """Of each expert the sum over its rows of left times right: (E, O, I)."""
    outer = left_PO.shape[1]
    inner = right_PI.shape[1]
    out = left_PO.new_empty(groups.experts, outer, inner)
    tile = TILES[left_PO.element_size()]
    tiles = triton.cdiv(outer, tile.rows) * triton.cdiv(inner, tile.columns)
    kernels.rows_by_rows[(tiles, groups.experts)](
        left_PO,
        right_PI,
        groups.starts,
        out,
        outer,
        inner,
        left_PO.stride(0),
        right_PI.stride(0),
        DTYPE=DTYPE_OF[left_PO.dtype],
        **_constants(tile),
    )
    return out


def _constants(tile: Tile) -> dict[str, int]:
    return {
        "M": tile.rows,
        "N": tile.columns,
        "K": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
