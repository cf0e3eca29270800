"""Rows of tables and linear layers by Triton kernels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.formats import dtype_name
from moebius.ops.prepared import PreparedLinear, own
from moebius.ops.reference.linear import ReferenceLinear, plain_dtype
from moebius.ops.triton.kernels import linear as kernels
from moebius.ops.triton.tiles import ManyRows, SizedOps, Tile, enough, tiles_for
from moebius.ops.triton.weights import (
    DTYPES,
    PLAIN,
    Held,
    Stored,
    addresses,
    computed_in,
    one_device,
    stored,
    trained,
)
from moebius.ops.weights import Matrix, Weight, planes_of

OPERATIONS = frozenset({Operation.EMBED, Operation.LINEAR, Operation.LOGITS})

# Layers of up to so many tiles of columns, too few for a card, that sum over so many numbers at
# least have their sums split at multiples of SPLIT: a matter of the layer, however many rows come.
FEW_TILES = 128
LONG = 2048
SPLIT = 1024
# Up to so many rows, which are one tile, have a program for each split, where these take no more
# memory than that: their tiles alone would leave most of a card idle. The bits are the same.
FEW_ROWS = 16
PARTS_BYTES = 2**25
# What kernels would have to load byte by byte: a loader makes planes of it.
REPACKED = frozenset({"mxfp4"})
# Tiles of columns that take turns, so that rows are read while they are in the cache.
SWIZZLE = 8
EMBED_COLUMNS = 1024
DTYPE_OF = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}

Layer = tuple[Weight, Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """Layers that are stored alike, whose columns one launch computes.

    tiles    what the kernel reads of each tile of columns (tiles, 6), int64
    weight   the first of their weights
    bias     the dtype of their biases, empty for none
    split    how many numbers are summed by themselves; 0: all
    tile     what it is computed with
    many     the same with the tile for many rows
    """

    stored: Stored
    tiles: Tensor
    weight: Weight
    bias: str
    split: int
    tile: Tile
    many: "_Launch | None" = None

    def constants(self, dtype: torch.dtype) -> dict[str, object]:
        """What the kernels of products are compiled for."""
        tile = self.tile
        sizes = {"M": tile.rows, "N": tile.columns, "K": tile.depth}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        numbers = {"DTYPE": DTYPE_OF[dtype], "SPLIT": self.split}
        return {**self.stored.constants(), **numbers, **sizes, **options}

    def in_parts(self, rows: int, columns: int, width: int) -> bool:
        """Whether each split has a program of its own."""
        nbytes = 4 * rows * width * triton.cdiv(columns, self.split or columns)
        return self.split > 0 and rows <= FEW_ROWS and nbytes <= PARTS_BYTES

    def of_rows(self, rows: int, dtype: torch.dtype, when: ManyRows) -> "_Launch":
        """With the tile for so many rows of this dtype."""
        many = self.many
        if many is None or dtype.itemsize != 2:
            return self
        filled = rows / many.tile.rows
        tiles = math.ceil(filled) * len(many.tiles)
        return many if enough(tiles, filled, self.tiles.device, when) else self


@dataclass(frozen=True, slots=True, eq=False)
class TritonLinear(PreparedLinear):
    """Linear layers of one input, `in_size` numbers a row.

    layers     all of them
    launches   those that kernels of ours compute
    others     those that plain PyTorch computes, each with the column of its first result
    """

    layers: tuple[Layer, ...]
    launches: tuple[_Launch, ...]
    others: tuple[tuple[int, ReferenceLinear], ...]
    in_size: int
    out_size: int
    held: Held

    def is_of(self, *layers: Layer) -> bool:
        return self.held.is_of(_tensors(layers))


class LinearOps(SizedOps):
    """Products of rows in weights.DTYPES with the formats of weights.READ; weights in others,
    and those that are trained, plain PyTorch widens for each product."""

    def formats(self, dtype: torch.dtype) -> frozenset[str]:
        # Narrower numbers are widened in registers, where that loses nothing.
        exact = {
            dtype_name(each)
            for each in (torch.bfloat16, torch.float16)
            if dtype in DTYPES and torch.promote_types(each, dtype) == dtype
        }
        return (super().formats(dtype) | exact) - REPACKED

    def embed(
        self,
        input_ids_T: Tensor,
        table_VD: Weight,
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        matrix = Matrix.of(table_VD)
        kind = stored(table_VD)
        dtype = dtype or plain_dtype(matrix)
        if kind is None or dtype not in DTYPES or trained(matrix.planes):
            return super().embed(input_ids_T, table_VD, multiplier, dtype)
        rows, columns = matrix.shape
        if self.looks():
            require_ids(input_ids_T, rows)
        out = torch.empty((len(input_ids_T), columns), dtype=dtype, device=input_ids_T.device)
        if out.numel():
            kernels.embed[(len(out), triton.cdiv(columns, EMBED_COLUMNS))](
                input_ids_T,
                *addresses(table_VD),
                multiplier,
                out,
                rows,
                columns,
                kind.stride,
                kind.scale_stride,
                **kind.constants(),
                K=EMBED_COLUMNS,
            )
        return out

    def prepare_linear(self, *layers: Layer, dtype: torch.dtype | None = None) -> PreparedLinear:
        tensors = _tensors(layers)
        device = one_device(tensors)
        _check_shapes(layers)
        launches = []
        others = []
        for (kind, bias), alike in groupby(_placed(layers), lambda each: _kind(*each[1])):
            if kind is None or device is None or trained(tensors):
                others += [(column, ReferenceLinear((layer,))) for column, layer in alike]
            else:
                launches.append(_launch(kind, bias, list(alike), device))
        in_size = layers[0][0].shape[1]
        out_size = sum(weight.shape[0] for weight, _ in layers)
        return TritonLinear(
            layers, tuple(launches), tuple(others), in_size, out_size, Held.of(tensors)
        )

    def linear(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        return self._product(x_TI, own(layers, TritonLinear), wide=False)

    def logits(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        return self._product(x_TI, own(layers, TritonLinear), wide=True)

    def _product(self, x_TI: Tensor, layers: TritonLinear, *, wide: bool) -> Tensor:
        """The layers' results side by side. wide: in float32, of numbers that were not rounded."""
        if x_TI.dtype not in DTYPES or trained([x_TI]):
            plain = ReferenceLinear(layers.layers)
            return super().logits(x_TI, plain) if wide else super().linear(x_TI, plain)
        rows, columns = x_TI.shape
        if columns != layers.in_size:
            raise ValueError(f"rows for linear layers have {layers.in_size} numbers, not {columns}")
        out_dtype = torch.float32 if wide else x_TI.dtype
        out = torch.empty((rows, layers.out_size), dtype=out_dtype, device=x_TI.device)
        if not rows:
            return out
        x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        for launch in layers.launches:
            dtype = computed_in(x.dtype, launch.weight, wide=wide)
            sized = launch.of_rows(rows, dtype, self.many_rows)
            if sized is launch and launch.in_parts(rows, columns, out.shape[1]):
                _in_parts(x, launch, out, dtype)
            else:
                _in_order(x, sized, out, dtype)
        for at, layer in layers.others:
            found = super().logits(x, layer) if wide else super().linear(x, layer)
            out[:, at : at + found.shape[1]] = found
        return out


def _in_order(x: Tensor, launch: _Launch, out: Tensor, dtype: torch.dtype) -> None:
    rows, columns = x.shape
    kernels.linear[(triton.cdiv(rows, launch.tile.rows), len(launch.tiles))](
        x,
        launch.tiles,
        out,
        rows,
        columns,
        x.stride(0),
        out.stride(0),
        launch.stored.stride,
        launch.stored.scale_stride,
        BIAS=launch.bias,
        GROUP=SWIZZLE,
        **launch.constants(dtype),
    )


def _in_parts(x: Tensor, launch: _Launch, out: Tensor, dtype: torch.dtype) -> None:
    rows, columns = x.shape
    width = out.shape[1]
    splits = triton.cdiv(columns, launch.split)
    parts = torch.empty((splits, rows, width), dtype=torch.float32, device=x.device)
    kernels.linear_split[(len(launch.tiles), splits)](
        x,
        launch.tiles,
        parts,
        rows,
        columns,
        x.stride(0),
        width,
        launch.stored.stride,
        launch.stored.scale_stride,
        **launch.constants(dtype),
    )
    kernels.join_splits[(rows, len(launch.tiles))](
        parts,
        launch.tiles,
        out,
        rows,
        splits,
        width,
        out.stride(0),
        BIAS=launch.bias,
        N=launch.tile.columns,
        num_warps=1,
    )


def require_ids(ids: Tensor, count: int) -> None:
    """Raises IndexError for a token id outside a table of so many rows."""
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise IndexError(f"token id {int(wrong[0])} is outside the table of {count} rows")


def _tensors(layers: Sequence[Layer]) -> list[Tensor | None]:
    return planes_of([x for each in layers for x in each])


def _check_shapes(layers: Sequence[Layer]) -> None:
    """Raises ValueError for what the kernels would read beyond its end."""
    in_size = layers[0][0].shape[1]
    for weight, bias in layers:
        if weight.shape[1] != in_size:
            raise ValueError(
                f"linear layers of one input have {in_size} and {weight.shape[1]} columns"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"a bias has the shape {tuple(bias.shape)}, not ({weight.shape[0]},)")


def _placed(layers: Sequence[Layer]) -> list[tuple[int, Layer]]:
    """Each layer with the column of its first result."""
    ends = accumulate((weight.shape[0] for weight, _ in layers), initial=0)
    return list(zip(ends, layers, strict=False))


def _kind(weight: Weight, bias: Tensor | None) -> tuple[Stored | None, str]:
    """How a layer is stored, None for what our kernels don't read, and its bias's dtype."""
    if bias is None:
        return stored(weight), ""
    readable = bias.dtype in PLAIN and bias.is_contiguous()
    return stored(weight) if readable else None, dtype_name(bias.dtype)


def _launch(
    kind: Stored, bias: str, layers: Sequence[tuple[int, Layer]], device: torch.device
) -> _Launch:
    """Sums are split as the tile for few rows asks for it, whichever computes them."""
    sizes = tiles_for(device)
    weight = layers[0][1][0]
    few = _columns(layers, sizes.few)
    split = SPLIT if len(few) <= FEW_TILES and weight.shape[1] >= LONG else 0
    tile = sizes.sized(many=True, codes=kind.codes)
    many = _Launch(kind, _columns(layers, tile).to(device), weight, bias, split, tile)
    return replace(many, tiles=few.to(device), tile=sizes.few, many=many)


def _columns(layers: Sequence[tuple[int, Layer]], tile: Tile) -> Tensor:
    """What the kernel reads of each tile of columns."""
    tiles = []
    for column, (weight, bias_O) in layers:
        planes = addresses(weight)
        biases = 0 if bias_O is None else bias_O.data_ptr()
        size = weight.shape[0]
        tiles += [
            (*planes, row, min(size - row, tile.columns), biases, column + row)
            for row in range(0, size, tile.columns)
        ]
    return torch.tensor(tiles, dtype=torch.int64).view(-1, 6)
