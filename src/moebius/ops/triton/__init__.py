"""Operations by kernels in Triton, for CUDA devices; what they lack, plain PyTorch computes there.

No card has proven them yet: until one has, `select_ops` takes plain PyTorch on CUDA devices.
"""

from moebius.ops.capability import Capability, Use
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import attention, pointwise
from moebius.ops.triton.attention import DTYPES, AttentionOps
from moebius.ops.triton.pointwise import PointwiseOps

__all__ = ["TritonOps"]

# What has kernels of ours.
OWN = attention.OPERATIONS | pointwise.OPERATIONS


class TritonOps(AttentionOps, PointwiseOps, ReferenceOps):
    """Our kernels where there are some.

    They are made so that a row's bits depend on the row alone, but that is declared only once a
    card has shown it: the interpreter can't.
    """

    name = "triton"

    def capability(self, use: Use) -> Capability | None:
        known = super().capability(use)
        if known is None:
            return None
        ours = use.operation in OWN and use.dtype in DTYPES
        by = self.name if ours else ReferenceOps.name
        return Capability(by, batch_invariant=False, recorded=False)
