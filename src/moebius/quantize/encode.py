"""Rows of numbers into bytes of a block format, a piece at a time."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from moebius.errors import WeightsError
from moebius.ops.formats import FORMATS, BlockFormat
from moebius.quantize import blocks_of_32, blocks_of_256

VERSION = 1
"""A new one whenever any of these functions gives other bytes."""

Encode = Callable[[Tensor], Tensor]
"""Blocks (N, elements) float32 into their bytes (N, nbytes) uint8."""

ENCODERS: Mapping[str, Encode] = MappingProxyType(
    {
        "q4_0": blocks_of_32.q4_0,
        "q4_1": blocks_of_32.q4_1,
        "q5_0": blocks_of_32.q5_0,
        "q5_1": blocks_of_32.q5_1,
        "q8_0": blocks_of_32.q8_0,
        "iq4_nl": blocks_of_32.iq4_nl,
        "mxfp4": blocks_of_32.mxfp4,
        "q2_k": blocks_of_256.q2_k,
        "q3_k": blocks_of_256.q3_k,
        "q4_k": blocks_of_256.q4_k,
        "q5_k": blocks_of_256.q5_k,
        "q6_k": blocks_of_256.q6_k,
        "iq4_xs": blocks_of_256.iq4_xs,
    }
)

# Numbers that are worked on at a time: what is made of them stays in a core's cache.
_PIECE = 2**17


def block_format(name: str) -> BlockFormat:
    """The format of this name, which ENCODERS has."""
    found = FORMATS[name]
    assert name in ENCODERS and isinstance(found, BlockFormat), f"nothing makes {name}"
    return found


def encoded(x_RK: Tensor, name: str) -> Tensor:
    """Rows of numbers, of any floating-point dtype, in a format: (R, bytes of a row) uint8.

    The same numbers give the same bytes on every processor. Raises ValueError for rows that are no
    whole blocks, WeightsError for numbers that are not finite, or beyond what float16 scales hold.
    """
    format = block_format(name)
    rows, columns = x_RK.shape
    ((_, shape),) = format.planes(rows, columns)
    out_NY = torch.empty((rows * columns // format.elements, format.nbytes), dtype=torch.uint8)
    x_NE = x_RK.reshape(-1, format.elements)
    encode = ENCODERS[name]
    at_once = _PIECE // format.elements
    for start in range(0, len(x_NE), at_once):
        piece_NE = x_NE[start : start + at_once].float()
        _check_finite(piece_NE, name)
        out_NY[start : start + at_once] = encode(piece_NE)
    return out_NY.view(shape)


def _check_finite(x_NE: Tensor, name: str) -> None:
    """Scales are at most the largest number itself."""
    largest = float(x_NE.abs().amax())
    if not largest <= torch.finfo(torch.float16).max:
        raise WeightsError(
            f"it holds the number {largest:g}, which {name} has no scale for; numbers up to "
            f"{torch.finfo(torch.float16).max:g} can be quantised"
        )
