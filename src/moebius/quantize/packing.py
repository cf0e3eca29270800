"""Codes and scales into a block's bytes. Suffixes: N blocks, E codes of a block, Y bytes."""

import torch
from torch import Tensor


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent exactly, float32, for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def half_bytes(numbers_N1: Tensor) -> Tensor:
    """Numbers rounded to float16, as bytes (N, 2)."""
    return numbers_N1.half().contiguous().view(torch.uint8)


def fields(codes_NE: Tensor, run: int, bits: int) -> Tensor:
    """Runs of codes side by side in the same bytes, the first in their lowest bits.

    codes_NE: uint8 of so few bits. (N, E * bits / 8), what moebius.ops.formats.blocks.fields reads.
    """
    beside = 8 // bits
    runs = codes_NE.reshape(len(codes_NE), -1, beside, run)
    packed = runs[:, :, 0].clone()
    for place in range(1, beside):
        packed |= runs[:, :, place] << (bits * place)
    return packed.flatten(1)


def nibbles(codes_NE: Tensor, run: int) -> Tensor:
    """Runs of codes of four bits, two in the same bytes."""
    return fields(codes_NE & 15, run, 4)


def five_bits(codes_NE: Tensor) -> Tensor:
    """The fifth bits of 32 codes in four bytes, then the other four bits of each: (N, 20)."""
    return torch.cat((fields(codes_NE >> 4, 1, 1), nibbles(codes_NE, 16)), dim=1)
