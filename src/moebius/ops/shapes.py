"""What torch can be asked of a tensor without its values."""

from torch import Tensor

SHAPES = frozenset(
    (
        Tensor.__len__,
        Tensor.detach,
        Tensor.dim,
        Tensor.element_size,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.numel,
        Tensor.size,
        Tensor.storage_offset,
        Tensor.stride,
        Tensor.untyped_storage,
    )
)
"""Functions that say something of its shape, and nothing of its values."""
