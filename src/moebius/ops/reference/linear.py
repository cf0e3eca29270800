"""Rows of tables and linear layers in plain PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.formats import BLOCK_FORMATS, PLANE_FORMATS, Dense, dtype_name
from moebius.ops.interface import Ops
from moebius.ops.prepared import PreparedLinear, own, same
from moebius.ops.weights import Matrix, Weight

# Rows of a low-precision vocabulary matrix that are widened to float32 at a time.
LOGITS_ROWS = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceLinear(PreparedLinear):
    """(weight (O, I), bias (O,) or None) of each layer."""

    layers: tuple[tuple[Weight, Tensor | None], ...]

    def is_of(self, *layers: tuple[Weight, Tensor | None]) -> bool:
        return len(layers) == len(self.layers) and all(map(same, layers, self.layers))


class LinearOps(Ops):
    """Weights of any format; they are widened anew for each product."""

    def formats(self, dtype: torch.dtype) -> frozenset[str]:
        # Plain numbers are widened once, by the loader: that costs twice the memory at most, and
        # widening them for each product far more time. Blocks would take four times theirs.
        blocks = {each.name for each in BLOCK_FORMATS}
        return frozenset({dtype_name(dtype)} | blocks | PLANE_FORMATS)

    def embed(
        self,
        input_ids_T: Tensor,
        table_VD: Weight,
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if isinstance(table_VD, Matrix):
            dtype = dtype or plain_dtype(table_VD)
            x_TD = table_VD.take(input_ids_T, torch.promote_types(dtype, torch.float32))
        else:
            dtype = dtype or table_VD.dtype
            x_TD = F.embedding(input_ids_T, table_VD)
            x_TD = x_TD.to(torch.promote_types(dtype, table_VD.dtype))
        return (x_TD if multiplier == 1.0 else x_TD * multiplier).to(dtype)

    def prepare_linear(
        self, *layers: tuple[Weight, Tensor | None], dtype: torch.dtype | None = None
    ) -> PreparedLinear:
        return ReferenceLinear(layers)

    def linear(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        outs = [
            F.linear(x_TI, widened_for(x_TI, weight_OI), bias_O)
            for weight_OI, bias_O in own(layers, ReferenceLinear).layers
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def logits(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        ((weight_OI, bias_O),) = own(layers, ReferenceLinear).layers
        with torch.autocast(x_TI.device.type, enabled=False):
            x = x_TI.float()
            bias = None if bias_O is None else bias_O.float()
            if isinstance(weight_OI, Tensor) and (
                weight_OI.dtype == torch.float32
                or torch.is_grad_enabled()
                or len(weight_OI) <= LOGITS_ROWS
            ):
                return F.linear(x, weight_OI.float(), bias)
            matrix = Matrix.of(weight_OI)
            starts = range(0, matrix.shape[0], LOGITS_ROWS)
            rows = (matrix.rows(start, start + LOGITS_ROWS) for start in starts)
            out = torch.cat([F.linear(x, part.widened(torch.float32)) for part in rows], dim=-1)
            return out if bias is None else out + bias


def plain_dtype(table: Matrix) -> torch.dtype:
    """The dtype of a table's own numbers. Raises ValueError for one of codes and scales."""
    if not isinstance(table.format, Dense):
        raise ValueError(f"a {table.format.name} table has no dtype of its own; name one")
    return table.format.dtype


def widened_for(x: Tensor, weight: Weight) -> Tensor:
    """`weight` as a tensor that torch multiplies x by: widened where x's dtype holds it exactly.

    What it does not hold stays as it is: autocast, or torch's refusal, has the word.
    """
    if isinstance(weight, Tensor) and weight.dtype == x.dtype:
        return weight
    matrix = Matrix.of(weight)
    if isinstance(weight, Tensor) and not matrix.format.exact_in(x.dtype):
        return weight
    return matrix.widened(x.dtype)
