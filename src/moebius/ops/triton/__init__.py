"""Operations by kernels in Triton, for CUDA devices; what they lack, plain PyTorch computes there.

No card has proven them yet: until one has, `select_ops` takes plain PyTorch on CUDA devices.
"""

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
        ours = use.operation in OWN and use.dtype in DTYPES
        by = self.name if ours else ReferenceOps.name
        return Capability(by, batch_invariant=False, recorded=False)
