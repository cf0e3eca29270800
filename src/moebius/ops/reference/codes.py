"""Rows as codes of 8 bits with one scale each: how an int8 cache holds keys and values.

Of a row x in float32:

    scale = float16(max |x| / 127)
    codes = x * (1 / float32(scale)), rounded to the nearest, ties to even, within -127 .. 127
    x is about codes * float32(scale)

The scale is rounded before there are codes, so that these make up for it: a value is off by half a
scale at most. (Codes of the unrounded scale are off by up to 1/16 of a scale more at both ends.)

A row of zeros has scale 0. A row with a value that is not finite, or with one beyond what a scale
in float16 reaches, 8.3 million, has codes 0 and scale NaN: whoever reads it gets NaN, not a wrong
number.

Each step is one correctly rounded operation, so that every backend makes the same bits.
"""

import torch
from torch import Tensor

MOST = 127


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., N) int8 and scales (...) float16 of rows (..., N)."""
    wide = x.float()
    scale = (wide.abs().amax(-1) / MOST).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0).unsqueeze(-1)
    codes = (wide * inverse).round().clamp(-MOST, MOST)
    held = wide.isfinite().all(-1) & scale.isfinite()
    codes = torch.where(held.unsqueeze(-1), codes, 0).to(torch.int8)
    return codes, torch.where(held, scale, torch.nan)


def widened(codes: Tensor, scale: Tensor) -> Tensor:
    """The rows (..., N) in float32 that codes (..., N) and scales (...) stand for."""
    return codes.float() * scale.float().unsqueeze(-1)
