"""No rows at all are rows of every format."""

from __future__ import annotations

import pytest
import torch

from moebius.ops.formats import BLOCKS_OF_32, BLOCKS_OF_256, BlockFormat


@pytest.mark.parametrize("format", [*BLOCKS_OF_32, *BLOCKS_OF_256], ids=lambda each: each.name)
def test_no_rows_widen_to_no_rows(format: BlockFormat) -> None:
    planes = (torch.zeros((0, 2 * format.nbytes), dtype=torch.uint8),)
    assert format.widened(planes, torch.float32).shape == (0, 2 * format.elements)
