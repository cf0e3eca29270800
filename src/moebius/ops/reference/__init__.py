"""Every operation in plain PyTorch: the specification of the other backends, the fallback, and what
training uses.

Everything but the KV cache and kept states is differentiable. Nothing but the recurrence itself
loops over tokens.
"""

from moebius.ops.capability import Capability, Feature, Use
from moebius.ops.reference.attention import TILE, AttentionOps, visible
from moebius.ops.reference.experts import ExpertOps, activate
from moebius.ops.reference.latent import LatentOps, latent_keys, turned_queries
from moebius.ops.reference.linear import LOGITS_ROWS, LinearOps
from moebius.ops.reference.pointwise import PointwiseOps
from moebius.ops.reference.program import ProgramOps
from moebius.ops.reference.recurrent import RecurrentOps
from moebius.ops.reference.sampling import SamplingOps

__all__ = [
    "LOGITS_ROWS",
    "TILE",
    "ReferenceOps",
    "activate",
    "latent_keys",
    "turned_queries",
    "visible",
]


class ReferenceOps(
    ProgramOps,
    LinearOps,
    PointwiseOps,
    AttentionOps,
    LatentOps,
    RecurrentOps,
    ExpertOps,
    SamplingOps,
):
    """Plain PyTorch on any device, held to a tolerance, not to bits: torch picks its kernels by
    shape."""

    name = "reference"

    def capability(self, use: Use) -> Capability | None:
        if {Feature.LATENT, Feature.INT8_CACHE} <= use.features:
            return None
        return Capability(self.name, batch_invariant=False, recorded=False)
