"""Checkpoints that the formats' own libraries have packed, where those are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.ops import Matrix
from moebius.ops.reference import ReferenceOps
from packing import Pack, Tensors, stem
from quantised import Kind, held, made


def by_mlx(bits: int, group: int, dtype: str) -> Pack:
    """mlx.core.quantize, and what mlx.core.dequantize makes of it in float32."""
    mx = pytest.importorskip("mlx.core")

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        given = mx.array(weight.numpy()).astype(getattr(mx, dtype))
        codes, scales, biases = mx.quantize(given, group_size=group, bits=bits)
        wide = [x.astype(mx.float32) for x in (scales, biases)]
        meant = mx.dequantize(codes, *wide, group_size=group, bits=bits)
        stored = getattr(torch, dtype)
        tensors = {
            name: torch.from_numpy(np.array(codes)),
            f"{stem(name)}.scales": torch.from_numpy(np.array(wide[0])).to(stored),
            f"{stem(name)}.biases": torch.from_numpy(np.array(wide[1])).to(stored),
        }
        return tensors, torch.from_numpy(np.array(meant))

    return pack


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama"])
def test_numbers_are_those_of_mlx(tmp_path: Path, bits: int, dtype: str, model_type: str) -> None:
    """Bit for bit, of every matrix: attention, experts or feed-forwards, embeddings and head."""
    config = {"group_size": 32, "bits": bits}
    kind = Kind(config, by_mlx(bits, 32, dtype), key="quantization", embedding=True)
    meant = made(tmp_path, kind, model_type)
    weights = held(load_decoder(tmp_path, torch.float32, ops=ReferenceOps()))
    packed = 0
    for source in open_checkpoint(tmp_path).sources:
        weight = weights[source.parameter]
        if isinstance(weight, Matrix):
            packed += 1
            assert torch.equal(weight.widened(torch.float32), meant[source.name]), source.parameter
    assert packed > 10
