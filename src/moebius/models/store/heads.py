"""Matrices of heads in a tensor that has more of each: see moebius.models.layout.OfHeads."""

from torch import Tensor

from moebius.models.layout import Source


def of_heads(whole: Tensor, source: Source) -> Tensor:
    """A view of the source's rows in its tensor's numbers: (heads, rows of each, columns)."""
    rows, columns = source.shape
    count = columns if source.transposed else rows // source.heads
    parts = whole.view(source.heads, -1, whole.shape[-1])[:, source.start : source.start + count]
    return parts.transpose(1, 2) if source.transposed else parts
