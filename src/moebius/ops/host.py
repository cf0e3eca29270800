"""What a program calls on the host, between two segments of its own calls (`Ops.host`)."""

from collections.abc import Callable, Mapping, Sequence
from operator import index
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


def decided_by(outputs: Sequence[HostResult]) -> tuple[Rows, ...]:
    """The counts that a call with such outputs decides, each once."""
    return tuple(dict.fromkeys(each.rows for each in outputs if isinstance(each.rows, Rows)))


def counted(counts: Mapping[str, int], decides: Sequence[Rows]) -> list[int]:
    """What a call to the host says of the counts that it decides. Raises ValueError."""
    if counts.keys() != {rows.name for rows in decides}:
        wanted = [rows.name for rows in decides]
        raise ValueError(f"a call to the host decided {list(counts)}; it must decide {wanted}")
    found = [index(counts[rows.name]) for rows in decides]
    for number, rows in zip(found, decides, strict=True):
        if not 0 <= number <= rows.most:
            raise ValueError(
                f"a call to the host decided that there are {number} {rows.name}; there must be "
                f"between 0 and {rows.most}"
            )
    return found
