"""Sizes of products' tiles by generation of cards: which a row is computed with is a matter of the
card alone, as the order of its sums, and with it its bits, may depend on them.

Chosen by what a block of threads may have of shared memory (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"), with registers for two sums of 64 x 64 beside a tile of
widened codes. No card has measured them yet; this does, with what else a card could take:

    python benchmarks/gpu.py tiles --out FOLDER
"""

from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A tile of a product: rows and columns of the result, and how much of the sum goes into a
    step; warps, and steps whose loads are on their way at a time."""

    rows: int = 64
    columns: int = 64
    depth: int = 64
    warps: int = 4
    stages: int = 4


# By the least compute capability, as 10 * major + minor. Of 8.6, 8.9 and 12.x a block of threads
# has 99 KiB, of 8.0 163 KiB, of 9.0 and 10.x 227 KiB.
TILES: dict[int, Tile] = {
    80: Tile(),
    86: Tile(stages=3),
    90: Tile(),
    100: Tile(),
    120: Tile(stages=3),
}


def tile_for(device: torch.device) -> Tile:
    """Of this device; in the interpreter, of the oldest."""
    return TILES[generation(*_capability(device))]


def generation(major: int, minor: int) -> int:
    """The entry of TILES for such a compute capability: the newest that is no newer."""
    known = 10 * major + minor
    return max((each for each in TILES if each <= known), default=min(TILES))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 8, 0
    return torch.cuda.get_device_capability(device)
