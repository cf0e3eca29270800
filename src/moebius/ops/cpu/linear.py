"""Rows of tables and linear layers by the CPU's kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu.base import CpuBase, Held, address, require_dtype, require_no_gradient
from moebius.ops.prepared import PreparedLinear, own


@dataclass(frozen=True, slots=True, eq=False)
class CpuLinear(PreparedLinear):
    """Linear layers of one input: a table of addresses, what lies there, and sizes."""

    table: _cpu.Linear
    dtype: torch.dtype
    in_size: int
    out_size: int
    held: Held

    def is_of(self, *layers: tuple[Tensor, Tensor | None]) -> bool:
        return self.held.is_of(x for each in layers for x in each)


class LinearOps(CpuBase):
    def prepare_linear(self, *layers: tuple[Tensor, Tensor | None]) -> CpuLinear:
        weights = [weight for weight, _ in layers]
        biases = [bias for _, bias in layers]
        require_no_gradient(*weights, *biases)
        dtype = require_dtype(weights[0].dtype, *weights, *biases)
        size = weights[0].shape[1]
        sizes = [len(weight) for weight in weights]
        table = _cpu.Linear(
            dtype, size, [address(x) for x in weights], [address(x) for x in biases], sizes
        )
        held = Held(x for each in layers for x in each)
        return CpuLinear(table, weights[0].dtype, size, sum(sizes), held)

    def linear(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        prepared = own(layers, CpuLinear)
        return self._linear(x_TI, prepared, prepared.dtype)

    def logits(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        return self._linear(x_TI, own(layers, CpuLinear), torch.float32)

    def _linear(self, x: Tensor, layers: CpuLinear, out_dtype: torch.dtype) -> Tensor:
        rows = x.shape[0]
        if x.dtype != layers.dtype or x.shape[1] != layers.in_size:
            raise ValueError(
                f"a linear layer of {layers.in_size} {layers.dtype} values got {tuple(x.shape)} of "
                f"{x.dtype}"
            )
        out = self._empty((rows, layers.out_size), out_dtype)
        wide = out_dtype == torch.float32
        self._native.linear(layers.table, address(x), rows, out.data_ptr(), wide)
        return out

    def embed(self, input_ids_T: Tensor, table_VD: Tensor, multiplier: float = 1.0) -> Tensor:
        require_no_gradient(table_VD)
        dtype = require_dtype(table_VD.dtype)
        count, size = table_VD.shape
        rows = len(input_ids_T)
        out = self._empty((rows, size), table_VD.dtype)
        ids = address(input_ids_T, torch.int64)
        self._native.embed(
            dtype, address(table_VD), count, ids, rows, size, multiplier, out.data_ptr()
        )
        return out
