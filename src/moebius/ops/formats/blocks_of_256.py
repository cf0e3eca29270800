"""Block formats of 256 numbers: sub-blocks of 16 or 32 have small integer scales, and some minima,
in units of what the whole block has."""

import torch
from torch import Tensor

from moebius.ops.formats.blocks import BlockFormat, Unpacked, fields, halves, looked_up, nibbles
from moebius.ops.formats.blocks_of_32 import IQ4_VALUES


def _q2_k(blocks_NY: Tensor) -> Unpacked:
    n = len(blocks_NY)
    scales = blocks_NY[:, :16]
    codes_NSP = fields(blocks_NY[:, 16:80], 32, 2).reshape(n, 16, 16).float()
    d = halves(blocks_NY, 80)
    least = halves(blocks_NY, 82)
    return Unpacked(d * (scales & 15).float(), codes_NSP, -(least * (scales >> 4).float()))


def _q3_k(blocks_NY: Tensor) -> Unpacked:
    n = len(blocks_NY)
    low = fields(blocks_NY[:, 32:96], 32, 2).view(n, 16, 16)
    # A third bit that is not set takes four off.
    third = fields(blocks_NY[:, :32], 32, 1).view(n, 16, 16)
    packed = blocks_NY[:, 96:108]
    six_bits = nibbles(packed[:, :8], 8) | (fields(packed[:, 8:], 4, 2) << 4)
    scales_NS = six_bits.view(n, 16).float() - 32
    return Unpacked(halves(blocks_NY, 108) * scales_NS, (low + third * 4).float() - 4)


def _scales_and_minima(blocks_NY: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and as many minima of six bits each, in bytes 4 to 15: float32 (N, 8) each."""
    first = blocks_NY[:, 4:8]
    second = blocks_NY[:, 8:12]
    rest = blocks_NY[:, 12:16]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float(), minima.float()


def _with_minima(blocks_NY: Tensor, codes_NSP: Tensor) -> Unpacked:
    scales_NS, minima_NS = _scales_and_minima(blocks_NY)
    added_NS = -(halves(blocks_NY, 2) * minima_NS)
    return Unpacked(halves(blocks_NY, 0) * scales_NS, codes_NSP.float(), added_NS)


def _q4_k(blocks_NY: Tensor) -> Unpacked:
    return _with_minima(blocks_NY, nibbles(blocks_NY[:, 16:], 32).view(-1, 8, 32))


def _q5_k(blocks_NY: Tensor) -> Unpacked:
    fifth = fields(blocks_NY[:, 16:48], 32, 1).view(-1, 8, 32)
    low = nibbles(blocks_NY[:, 48:], 32).view(-1, 8, 32)
    return _with_minima(blocks_NY, low | (fifth << 4))


def _q6_k(blocks_NY: Tensor) -> Unpacked:
    n = len(blocks_NY)
    low = nibbles(blocks_NY[:, :128], 64).reshape(n, 16, 16)
    high = fields(blocks_NY[:, 128:192], 32, 2).reshape(n, 16, 16)
    scales_NS = blocks_NY[:, 192:208].view(torch.int8).float()
    return Unpacked(halves(blocks_NY, 208) * scales_NS, (low | (high << 4)).float() - 32)


def _iq4_xs(blocks_NY: Tensor) -> Unpacked:
    n = len(blocks_NY)
    high = fields(blocks_NY[:, 2:4], 1, 2).reshape(n, 8)
    low = nibbles(blocks_NY[:, 4:8], 1).reshape(n, 8)
    scales_NS = (low | (high << 4)).float() - 32
    codes_NSP = looked_up(nibbles(blocks_NY[:, 8:], 16), IQ4_VALUES)
    return Unpacked(halves(blocks_NY, 0) * scales_NS, codes_NSP)


BLOCKS_OF_256 = (
    BlockFormat("q2_k", 256, 84, _q2_k, exact=None),
    BlockFormat("q3_k", 256, 110, _q3_k),
    BlockFormat("q4_k", 256, 144, _q4_k, exact=None),
    BlockFormat("q5_k", 256, 176, _q5_k, exact=None),
    BlockFormat("q6_k", 256, 210, _q6_k),
    BlockFormat("iq4_xs", 256, 136, _iq4_xs),
)
