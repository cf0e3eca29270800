"""Rows of tables and linear layers by the CPU's kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.capability import Operation
from moebius.ops.cpu.base import (
    CpuBase,
    Held,
    address,
    check_shape,
    common_dtype,
    formats,
    native_matrix,
    require_dtype,
    require_no_gradient,
)
from moebius.ops.prepared import PreparedLinear, own
from moebius.ops.weights import Matrix, Weight, planes_of


@dataclass(frozen=True, slots=True, eq=False)
class CpuLinear(PreparedLinear):
    """Linear layers of one input: a table of addresses, what lies there, and sizes."""

    table: _cpu.Linear
    dtype: torch.dtype
    in_size: int
    out_size: int
    held: Held

    def is_of(self, *layers: tuple[Weight, Tensor | None]) -> bool:
        return self.held.is_of(planes_of([x for each in layers for x in each]))


class LinearOps(CpuBase):
    def formats(self, dtype: torch.dtype) -> frozenset[str]:
        return formats(dtype)

    def prepare_linear(
        self, *layers: tuple[Weight, Tensor | None], dtype: torch.dtype | None = None
    ) -> CpuLinear:
        tensors = planes_of([x for each in layers for x in each])
        with self._looking_at(tensors):
            return self._prepared_linear(layers, dtype, tensors)

    def _prepared_linear(
        self,
        layers: Sequence[tuple[Weight, Tensor | None]],
        dtype: torch.dtype | None,
        tensors: Sequence[Tensor | None],
    ) -> CpuLinear:
        require_no_gradient(*tensors)
        weights = [weight for weight, _ in layers]
        biases = [bias for _, bias in layers]
        for weight, bias in layers:
            check_shape("a bias", bias, weight.shape[0])
        dtype = dtype or common_dtype(weights)
        number = require_dtype(dtype, *biases)
        matrices = [native_matrix(weight, _met_in(weight, dtype)) for weight in weights]
        addresses = [address(x) for x in biases]
        table = _cpu.Linear(dtype=number, weights=matrices, biases=addresses)
        out_size = sum(weight.shape[0] for weight in weights)
        return CpuLinear(table, dtype, weights[0].shape[1], out_size, Held(tensors))

    def linear(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        prepared = own(layers, CpuLinear)
        return self._linear(Operation.LINEAR, x_TI, prepared, prepared.dtype)

    def logits(self, x_TI: Tensor, layers: PreparedLinear) -> Tensor:
        return self._linear(Operation.LOGITS, x_TI, own(layers, CpuLinear), torch.float32)

    def _linear(
        self, operation: Operation, x: Tensor, layers: CpuLinear, out_dtype: torch.dtype
    ) -> Tensor:
        if x.dtype != layers.dtype or x.shape != (len(x), layers.in_size):
            raise ValueError(
                f"a linear layer of {layers.in_size} {layers.dtype} values got {tuple(x.shape)} of "
                f"{x.dtype}"
            )
        out = self._empty(x, (layers.out_size,), out_dtype)
        call = _cpu.LinearCall(
            layers=layers.table, x=self._at(x), wide=out_dtype == torch.float32, out=self._at(out)
        )
        self._run(operation, call, x, len(x), layers)
        return out

    def embed(
        self,
        input_ids_T: Tensor,
        table_VD: Weight,
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        check_shape("ids", input_ids_T, len(input_ids_T))
        table = Matrix.of(table_VD)
        require_no_gradient(*table.planes)
        dtype = dtype or common_dtype((table,))
        out = self._empty(input_ids_T, (table.shape[1],), dtype)
        call = _cpu.Embed(
            dtype=require_dtype(dtype),
            table=self._matrix(table, dtype),
            multiplier=multiplier,
            ids=self._at(input_ids_T, torch.int64),
            out=self._at(out),
        )
        self._run(Operation.EMBED, call, input_ids_T, len(input_ids_T), dtype=dtype)
        return out


def _met_in(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """What rows of `dtype` are when they meet a weight: widened for one in float32."""
    wide = isinstance(weight, Tensor) and weight.dtype == torch.float32
    return torch.float32 if wide else dtype
