"""The operations that a decoder is made of: one name each, documented in `interface`.

`reference` (plain PyTorch) is the specification, the fallback on every device, and what training
uses; `cpu` is csrc's kernels. A backend is chosen when a decoder is built and handed to its
modules; no global names it.

Legend of shape suffixes, used in all of the numerical code:
    T tokens of a step   B sequences   L rows whose logits are wanted   D model width   V vocabulary
    H query heads   G key/value heads   N size of a query or key head   Nv size of a value head
    E experts   K experts a token   F expert width   I, O inputs and outputs of a linear layer
    R half of the rotated part of a head
"""

from moebius.ops.capability import Capability, Feature, Operation, Use
from moebius.ops.formats import FORMATS, Format
from moebius.ops.interface import Ops
from moebius.ops.prepared import (
    AttentionPlan,
    LayerCache,
    PreparedExperts,
    PreparedHeads,
    PreparedLinear,
    StatePlan,
)
from moebius.ops.sampling import LOWEST, Shaping
from moebius.ops.select import select_ops
from moebius.ops.steps import ExpertWeights, Pair, Rotation, RouterTally
from moebius.ops.weights import Matrix, Weight

__all__ = [
    "FORMATS",
    "LOWEST",
    "AttentionPlan",
    "Capability",
    "ExpertWeights",
    "Feature",
    "Format",
    "LayerCache",
    "Matrix",
    "Operation",
    "Ops",
    "Pair",
    "PreparedExperts",
    "PreparedHeads",
    "PreparedLinear",
    "Rotation",
    "RouterTally",
    "Shaping",
    "StatePlan",
    "Use",
    "Weight",
    "select_ops",
]
