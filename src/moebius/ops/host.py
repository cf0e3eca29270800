"""What a program calls on the host, between two segments of its own calls (`Ops.host`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.ops.program import Rows

# Given (inputs, outputs) it writes the outputs, and returns the counts that it decides.
HostFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], Mapping[str, int]]


class HostResult(NamedTuple):
    """What a call to the host writes: rows of shape `row`.

    rows   a tensor that has as many, or a count that the call decides and returns by name; then it
           is handed all `most` rows to write to
    """

    rows: Tensor | Rows
    row: tuple[int, ...]
    dtype: torch.dtype


def counted(counts: Mapping[str, int], rows: Rows) -> int:
    """What a call to the host says of a count that it decides. Raises ValueError."""
    found = counts.get(rows.name)
    if found is None or not 0 <= found <= rows.most:
        raise ValueError(
            f"a call to the host decided that there are {found} {rows.name}; it must return "
            f"between 0 and {rows.most} under that name"
        )
    return found
