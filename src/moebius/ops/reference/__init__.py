"""Every operation in plain PyTorch: the specification of the other backends, the fallback, and what
training uses.

Everything but the KV cache is differentiable. Nothing loops over tokens.
"""

import torch

from moebius.ops.capability import Capability, Feature, Use
from moebius.ops.reference.attention import TILE, AttentionOps, visible
from moebius.ops.reference.experts import ExpertOps, activate, combine
from moebius.ops.reference.linear import LOGITS_ROWS, LinearOps
from moebius.ops.reference.pointwise import PointwiseOps
from moebius.ops.reference.sampling import SamplingOps
from moebius.ops.steps import Captured, Compute, Logits, StepInputs

__all__ = ["LOGITS_ROWS", "TILE", "ReferenceOps", "activate", "combine", "visible"]


class ReferenceOps(LinearOps, PointwiseOps, AttentionOps, ExpertOps, SamplingOps):
    """Plain PyTorch on any device, held to a tolerance, not to bits: torch picks its kernels by
    shape."""

    name = "reference"

    def capability(self, use: Use) -> Capability | None:
        if Feature.VALUE_SIZE in use.features:
            return None
        return Capability(self.name, batch_invariant=False, recorded=False)

    def capture(
        self, compute: Compute, logits: Logits, example: StepInputs, max_tokens: int
    ) -> Captured:
        return compute, lambda x_TD, rows: logits(
            x_TD, torch.tensor(rows, dtype=torch.int64, device=x_TD.device)
        )
