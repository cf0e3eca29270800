"""What a checkpoint's matrices may be stored in.

A new format is one `Format`, registered in FORMATS, and the kernels that read it. Plain PyTorch
computes with any of them by widening it.
"""

import torch

from moebius.ops.formats.blocks import BlockFormat
from moebius.ops.formats.blocks_of_32 import BLOCKS_OF_32
from moebius.ops.formats.blocks_of_256 import BLOCKS_OF_256
from moebius.ops.formats.dense import Dense, dense, dtype_name
from moebius.ops.formats.format import Format, Planes, PlaneShape
from moebius.ops.formats.fp4 import FP4, MX_GROUP, Mxfp4Planes, planes_of_blocks
from moebius.ops.formats.fp8 import Fp8
from moebius.ops.formats.integers import Affine, Integers
from moebius.ops.formats.named import PARAMETRIC, made
from moebius.ops.formats.repacked import Repacked

__all__ = [
    "BLOCK_FORMATS",
    "FORMATS",
    "MX_GROUP",
    "PLANE_FORMATS",
    "Affine",
    "BlockFormat",
    "Dense",
    "Format",
    "Fp8",
    "Integers",
    "Mxfp4Planes",
    "PlaneShape",
    "Planes",
    "Repacked",
    "dense",
    "dtype_name",
    "format_named",
    "planes_of_blocks",
]

BLOCK_FORMATS = (*BLOCKS_OF_32, *BLOCKS_OF_256)
_DENSE = tuple(map(dense, (torch.bfloat16, torch.float16, torch.float32)))
# By name.
FORMATS: dict[str, Format] = {each.name: each for each in (*_DENSE, *BLOCK_FORMATS, *FP4)}
PLANE_FORMATS = PARAMETRIC | {each.name for each in FP4}
"""Formats of several planes, by their names without parameters."""


def format_named(name: str) -> Format:
    """The format of a name, which may have parameters in brackets. Raises KeyError for none."""
    return FORMATS[name] if name in FORMATS else made(name)
