"""Operations by kernels in Triton, for CUDA devices; what they lack, plain PyTorch computes there.

Each card proves them at a start (moebius.engine.proof): what fails there is plain PyTorch's.
"""

import torch

from moebius.ops.capability import Capability, Operation, Use
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import (
    attention,
    experts,
    latent,
    linear,
    pointwise,
    recurrent,
    routing,
    sampling,
)
from moebius.ops.triton.attention import AttentionOps
from moebius.ops.triton.experts import ExpertOps
from moebius.ops.triton.latent import LatentOps
from moebius.ops.triton.linear import LinearOps
from moebius.ops.triton.pointwise import PointwiseOps
from moebius.ops.triton.recurrent import RecurrentOps
from moebius.ops.triton.routing import RoutingOps
from moebius.ops.triton.sampling import SamplingOps
from moebius.ops.triton.weights import DTYPES

__all__ = ["TritonOps"]

# What has kernels of ours.
OWN = frozenset[Operation]().union(
    attention.OPERATIONS,
    experts.OPERATIONS,
    latent.OPERATIONS,
    linear.OPERATIONS,
    pointwise.OPERATIONS,
    recurrent.OPERATIONS,
    routing.OPERATIONS,
    sampling.OPERATIONS,
)
# What is float32 in any model, and has kernels for that alone.
OF_FLOAT32 = frozenset(
    {
        Operation.DIVIDE,
        Operation.ROTATION,
        Operation.ROUTE,
        Operation.SAMPLING,
        Operation.SOFTCAP,
        Operation.WITHIN_CAPACITY,
    }
)


def has_kernels(operation: Operation, dtype: torch.dtype) -> bool:
    """Whether rows of `dtype` are ours to compute; in all else plain PyTorch takes our place."""
    dtypes = (torch.float32,) if operation in OF_FLOAT32 else DTYPES
    return operation in OWN and dtype in dtypes


class TritonOps(
    LinearOps,
    PointwiseOps,
    AttentionOps,
    LatentOps,
    RecurrentOps,
    RoutingOps,
    ExpertOps,
    SamplingOps,
    ReferenceOps,
):
    """Our kernels where there are some.

    They are made so that a row's bits depend on the row alone, but that is declared only once a
    card has shown it: the interpreter can't.
    """

    name = "triton"

    def capability(self, use: Use) -> Capability | None:
        known = super().capability(use)
        if known is None:
            return None
        by = self.name if has_kernels(use.operation, use.dtype) else ReferenceOps.name
        return Capability(by, batch_invariant=False, recorded=False)
