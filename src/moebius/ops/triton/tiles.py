"""Sizes of products' tiles by generation of cards.

A card has two of them, for few rows and for many. Larger tiles multiply each number that is read
with more others, without which a card's matrix units wait for its cache; but few rows leave most of
one empty. So which one computes a row is a matter of the number of rows, and promise P1 holds where
both give a row the same bits: both go through a sum in the same steps, by the same instructions, in
a layout of threads that grows with the tile. Whether that is enough each card shows at a start
(moebius.engine.proof), or it does without the tiles for many rows.

Chosen by what a block of threads may have of shared memory (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"), with registers for two sums of 64 x 64 beside a tile of
widened codes. No card has measured them yet; this does, with what else a card could take:

    python benchmarks/gpu.py tiles --out FOLDER
"""

from enum import Enum
from functools import cache
from typing import NamedTuple

import torch

from moebius.ops.capability import Operation
from moebius.ops.triton.looking import LookingOps


class ManyRows(Enum):
    """When tiles for many rows compute: where there are enough rows for a whole card of them, or,
    to find out whether a row's bits are the same by both, whatever the number of rows."""

    NEVER = "never"
    WHERE_ENOUGH = "where enough"
    ALWAYS = "always"


class Tile(NamedTuple):
    """A tile of a product: rows and columns of the result, and how much of the sum goes into a
    step; warps, and steps whose loads are on their way at a time."""

    rows: int = 64
    columns: int = 64
    depth: int = 64
    warps: int = 4
    stages: int = 4


class Tiles(NamedTuple):
    """What a card's products are computed with.

    few            whatever the number of rows
    many           many rows of numbers of 16 bits
    code_columns   the most columns of weights that are codes, which take registers to be widened
                   in: fewer where each warp widens all of them for itself, as before 9.0
    """

    few: Tile
    many: Tile
    code_columns: int

    def sized(self, *, many: bool, codes: bool, sums: int = 1) -> Tile:
        """That for many rows or for few, by what its weights are and how many sums it keeps."""
        tile = self.many if many else self.few
        most = (self.code_columns if codes else self.many.columns) // sums
        return tile._replace(columns=min(tile.columns, most))


# By the least compute capability, as 10 * major + minor. Of 8.6, 8.9 and 12.x a block of threads
# has 99 KiB, of 8.0 163 KiB, of 9.0 and 10.x 227 KiB.
TILES: dict[int, Tiles] = {
    80: Tiles(Tile(), Tile(128, 128, 64, 8, 4), 64),
    86: Tiles(Tile(stages=3), Tile(128, 128, 64, 8, 3), 64),
    90: Tiles(Tile(), Tile(128, 256, 64, 8, 4), 128),
    100: Tiles(Tile(), Tile(128, 256, 64, 8, 4), 128),
    120: Tiles(Tile(stages=3), Tile(128, 128, 64, 8, 3), 64),
}
# What has tiles for many rows.
SIZED = frozenset(
    {
        Operation.LINEAR,
        Operation.LOGITS,
        Operation.PAGED_ATTENTION,
        Operation.EXPERTS,
        Operation.EXPERT_ROWS,
    }
)


def tiles_for(device: torch.device) -> Tiles:
    """Of this device; in the interpreter, of the oldest."""
    return TILES[generation(*_capability(device))]


def generation(major: int, minor: int) -> int:
    """The entry of TILES for such a compute capability: the newest that is no newer."""
    known = 10 * major + minor
    return max((each for each in TILES if each <= known), default=min(TILES))


def enough(tiles: int, filled: float, device: torch.device, when: ManyRows) -> bool:
    """Whether tiles for many rows are to compute, of which there are so many.

    filled: how much of one the rows fill. A quarter of it, and of a card, may be left idle.
    """
    if when is not ManyRows.WHERE_ENOUGH:
        return when is ManyRows.ALWAYS
    return tiles >= 0.75 * processors(device) and filled >= 0.75


@cache
def processors(device: torch.device) -> int:
    """How many blocks of threads a card computes at a time, if each takes all of a processor."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return 8, 0
    return torch.cuda.get_device_capability(device)


class SizedOps(LookingOps):
    """Operations with tiles for few rows and for many."""

    many_rows = ManyRows.NEVER
    """Whether those for many may be used: NEVER but on a card that has shown that they may."""
