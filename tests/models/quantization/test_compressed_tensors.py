"""Numbers of compressed-tensors' checkpoints, bit for bit as the library itself has them.

Runs where it is installed: `pip install compressed-tensors`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from moebius.models.quantization import read_quantization
from moebius.models.store import StoredTensor
from moebius.ops import Matrix
from moebius.ops.formats import format_named
from quantised import KINDS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

NAMES = [
    name for name, kind in KINDS.items() if kind.config.get("quant_method") == "compressed-tensors"
]
# It reads an order of its own no longer.
NAMES.remove("pack-4-ordered")
STORED = {
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_the_library_s(name: str) -> None:
    kind = KINDS[name]
    torch.manual_seed(1)
    shape = (20, 96)
    tensors, meant = kind.pack("weight", torch.randn(shape))
    scheme = QuantizationScheme(**kind.config["config_groups"]["group_0"])
    library = BaseCompressor.get_value_from_registry(kind.config["format"])
    theirs = library.decompress(dict(tensors), scheme)["weight"]
    quantization = read_quantization({"quantization_config": kind.config})
    assert quantization is not None
    ours = quantization.scheme("model.layers.0.mlp.up_proj")
    assert ours is not None and quantization.scheme("lm_head") is None
    nowhere = Path()
    found = {
        key: StoredTensor(nowhere, key, STORED[each.dtype], None, tuple(each.shape), 0, 0)
        for key, each in tensors.items()
    }
    parts = ours.parts("weight", shape, found)
    format = format_named(parts.format)
    planes = [
        tensors[plane.name].view(dtype).view(wanted)
        for plane, (dtype, wanted) in zip(parts.planes, format.planes(*shape), strict=True)
    ]
    matrix = Matrix(format, shape, tuple(planes))
    assert torch.equal(matrix.widened(theirs.dtype), theirs)
    assert torch.equal(matrix.widened(torch.float32), meant)
