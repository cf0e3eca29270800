"""Every operation in plain PyTorch: the specification of the other backends, the fallback, and what
training uses.

Everything but the KV cache is differentiable. Nothing loops over tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moebius.ops.capability import Capability, Use
from moebius.ops.program import Given, Program, Source, Trace, Unrecorded, Wanted
from moebius.ops.reference.attention import TILE, AttentionOps, visible
from moebius.ops.reference.experts import ExpertOps, activate, combine
from moebius.ops.reference.linear import LOGITS_ROWS, LinearOps
from moebius.ops.reference.pointwise import PointwiseOps
from moebius.ops.reference.sampling import SamplingOps

__all__ = ["LOGITS_ROWS", "TILE", "ReferenceOps", "activate", "combine", "visible"]


class ReferenceOps(LinearOps, PointwiseOps, AttentionOps, ExpertOps, SamplingOps):
    """Plain PyTorch on any device, held to a tolerance, not to bits: torch picks its kernels by
    shape."""

    name = "reference"

    def capability(self, use: Use) -> Capability | None:
        return Capability(self.name, batch_invariant=False, recorded=False)

    def trace(self, compute: Callable[[Wanted], Tensor], source: Source[Given, Wanted]) -> Trace:
        return Trace(0, 1, frozenset(), "plain PyTorch is not recorded")

    def record(
        self,
        compute: Callable[[Wanted], Tensor],
        source: Source[Given, Wanted],
        device: torch.device | str,
        planned: Trace | None = None,
    ) -> Program[Given]:
        return Unrecorded(compute, source, device, planned or self.trace(compute, source))
