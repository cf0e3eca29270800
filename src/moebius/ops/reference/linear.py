"""Rows of tables and linear layers in plain PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.interface import Ops
from moebius.ops.prepared import PreparedLinear, own, same

# Rows of a low-precision vocabulary matrix that are widened to float32 at a time.
LOGITS_ROWS = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceLinear(PreparedLinear):
    """(weight (O, I), bias (O,) or None) of each layer."""

    layers: tuple[tuple[Tensor, Tensor | None], ...]

    def is_of(self, *layers: tuple[Tensor, Tensor | None]) -> bool:
        return same([x for each in layers for x in each], [x for each in self.layers for x in each])


class LinearOps(Ops):
    def embed(self, input_ids_T: Tensor, table_VD: Tensor, multiplier: float = 1.0) -> Tensor:
        x_TD = F.embedding(input_ids_T, table_VD)
        return x_TD if multiplier == 1.0 else x_TD * multiplier

    def prepare_linear(self, *layers: tuple[Tensor, Tensor | None]) -> PreparedLinear:
        return ReferenceLinear(layers)

    def linear(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        outs = [
            F.linear(x_TI, weight_OI, bias_O)
            for weight_OI, bias_O in own(layers, ReferenceLinear).layers
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def logits(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        ((weight_OI, bias_O),) = own(layers, ReferenceLinear).layers
        with torch.autocast(x_TI.device.type, enabled=False):
            x = x_TI.float()
            bias = None if bias_O is None else bias_O.float()
            if (
                weight_OI.dtype == torch.float32
                or torch.is_grad_enabled()
                or weight_OI.shape[0] <= LOGITS_ROWS
            ):
                return F.linear(x, weight_OI.float(), bias)
            parts = [F.linear(x, rows.float()) for rows in torch.split(weight_OI, LOGITS_ROWS)]
            out = torch.cat(parts, dim=-1)
            return out if bias is None else out + bias
