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

__all__ = [
    "BLOCK_FORMATS",
    "FORMATS",
    "BlockFormat",
    "Dense",
    "Format",
    "PlaneShape",
    "Planes",
    "dense",
    "dtype_name",
]

BLOCK_FORMATS = (*BLOCKS_OF_32, *BLOCKS_OF_256)
_DENSE = tuple(map(dense, (torch.bfloat16, torch.float16, torch.float32)))
# By name.
FORMATS: dict[str, Format] = {each.name: each for each in (*_DENSE, *BLOCK_FORMATS)}
