"""Random blocks of the types of GGUF files, for whoever tests what reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.ops import FORMATS, Matrix
from moebius.ops.formats import BlockFormat

BLOCKS: dict[str, BlockFormat] = {
    name: format for name, format in FORMATS.items() if isinstance(format, BlockFormat)
}
# Where a block has its float16 numbers; MXFP4 has one byte, an exponent, instead.
HALVES_AT: dict[str, tuple[int, ...]] = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "iq4_nl": (0,),
    "mxfp4": (),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_xs": (0,),
}


def random_blocks(name: str, count: int) -> Tensor:
    """Any bytes, scales among them that are no numbers: (count, bytes of a block)."""
    return torch.randint(0, 256, (count, BLOCKS[name].nbytes), dtype=torch.uint8)


def with_halves(name: str, blocks_NY: Tensor, halves: Sequence[Tensor] | Tensor) -> Tensor:
    """The blocks with their float16 numbers replaced, in turn, by rows of `halves`."""
    for at, values_N in zip(HALVES_AT[name], halves, strict=False):
        blocks_NY[:, at : at + 2] = values_N.to(torch.float16).view(-1, 1).view(torch.uint8)
    return blocks_NY


def random_matrix(name: str, rows: int, columns: int, spread: float = 0.02) -> Matrix:
    """Any codes, under scales as large as those of trained weights, some of them negative."""
    format = BLOCKS[name]
    count = rows * columns // format.elements
    blocks_NY = random_blocks(name, count)
    with_halves(name, blocks_NY, torch.randn(2, count) * spread)
    if name == "mxfp4":
        blocks_NY[:, 0] = torch.randint(115, 125, (count,), dtype=torch.uint8)
    return Matrix(format, (rows, columns), (blocks_NY.view(rows, -1),))
