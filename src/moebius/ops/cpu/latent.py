"""Latent attention's own operations by the CPU's kernels (csrc/latent_calls.h)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.capability import Feature, Operation
from moebius.ops.config import Temperature
from moebius.ops.cpu.attention import CpuCache
from moebius.ops.cpu.base import (
    CpuBase,
    Held,
    check_shape,
    native_matrix,
    norm_dtype,
    require_dtype,
    require_no_gradient,
)
from moebius.ops.prepared import LayerCache, PreparedHeads, own
from moebius.ops.steps import Rotation
from moebius.ops.weights import Matrix, Weight, planes_of


@dataclass(frozen=True, slots=True, eq=False)
class CpuHeads(PreparedHeads):
    """Heads' own matrices: a table of addresses, what lies there, and sizes."""

    table: _cpu.HeadMatrices
    dtype: torch.dtype
    heads: int
    in_size: int
    out_size: int
    held: Held

    def is_of(self, weight: Weight) -> bool:
        return self.held.is_of(planes_of([weight]))


class LatentOps(CpuBase):
    """Every operation of the interface, in bfloat16 and float32."""

    def prepare_heads(
        self, weight: Weight, heads: int, dtype: torch.dtype | None = None
    ) -> CpuHeads:
        tensors = planes_of([weight])
        with self._looking_at(tensors):
            require_no_gradient(*tensors)
            rows, columns = weight.shape
            each, rest = divmod(rows, heads)
            if rest:
                raise ValueError(f"{rows} rows are no matrices of {heads} heads")
            whole = Matrix.of(weight)
            dtype = dtype or whole.planes[0].dtype
            matrices = [
                native_matrix(whole.rows(start, start + each), dtype)
                for start in range(0, rows, each)
            ]
            table = _cpu.HeadMatrices(dtype=require_dtype(dtype), weights=matrices)
            return CpuHeads(table, dtype, heads, columns, each, Held(tensors))

    def head_products(self, x_THN: Tensor, heads: PreparedHeads) -> Tensor:
        prepared = own(heads, CpuHeads)
        rows, count, size = x_THN.shape
        kept = size - prepared.in_size
        if count != prepared.heads or kept < 0 or x_THN.dtype != prepared.dtype:
            raise ValueError(
                f"{prepared.heads} heads of at least {prepared.in_size} {prepared.dtype} values "
                f"got {tuple(x_THN.shape)} of {x_THN.dtype}"
            )
        out = self._empty(x_THN, (count, prepared.out_size + kept), x_THN.dtype)
        call = _cpu.HeadProducts(
            heads=prepared.table, x=self._at(x_THN), kept=kept, out=self._at(out)
        )
        self._run(Operation.HEAD_PRODUCTS, call, x_THN, rows, prepared)
        return out

    def rotate_and_store_latent(
        self,
        q_THN: Tensor,
        latent_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        norm_C: Tensor,
        eps: float,
        *,
        temperature: Temperature | None = None,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        held = own(cache, CpuCache)
        size = held.keys.shape[1]
        rows, heads, _ = q_THN.shape
        cos_TR, sin_TR, interleaved = rotation
        half = cos_TR.shape[1]
        if Feature.LATENT not in held.features or 2 * half > size - held.values.shape[1]:
            raise ValueError(f"{2 * half} values of a key turn, which {held.keys} does not hold")
        check_shape("queries", q_THN, rows, heads, size)
        check_shape("latents", latent_TI, rows, size)
        check_shape("a norm's weight", norm_C, held.values.shape[1])
        check_shape("cosines", cos_TR, rows, half)
        check_shape("sines", sin_TR, rows, half)
        check_shape("slots", slot_mapping_T, rows)
        check_shape("positions", positions_T, rows)
        grows = temperature is not None and positions_T is not None
        call = _cpu.StoreLatent(
            dtype=require_dtype(held.keys.dtype, q_THN, latent_TI),
            shape=held.shape,
            blocks=held.num_blocks,
            q=self._at(q_THN),
            q_heads=heads,
            latent=self._at(latent_TI),
            norm=self._at(norm_C),
            norm_dtype=norm_dtype(q_THN.dtype, norm_C),
            eps=eps,
            cos=self._at(cos_TR, torch.float32),
            sin=self._at(sin_TR, torch.float32),
            half=half,
            interleaved=interleaved,
            slots=self._at(slot_mapping_T, torch.int64),
            cache=self._at(held.buffer),
            positions=self._at(positions_T if grows else None, torch.int64),
            beta=temperature.beta if temperature is not None else 0.0,
            original=temperature.original if temperature is not None else 1,
        )
        use = Operation.ROTATE_AND_STORE_LATENT
        self._run(use, call, q_THN, rows, held, features=held.features)
        return q_THN
