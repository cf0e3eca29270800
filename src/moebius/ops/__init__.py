"""The operations that a decoder is made of: one name each, and which backend serves which device.

`reference` (plain PyTorch) is the specification and base of all others, the fallback on every
device, and what training uses; `cpu` is csrc's kernels. A backend is chosen when a decoder is built
and handed to its modules; no global names it.

Legend of shape suffixes, used in all of the numerical code:
    T tokens of a step   B sequences   L rows whose logits are wanted   D model width   V vocabulary
    H query heads   G key/value heads   N head size   E experts   K experts a token   F expert width
"""

import logging
import os

import torch

from moebius.ops.reference import ReferenceOps as Ops
from moebius.ops.sampling import LOWEST, Shaping
from moebius.ops.steps import Compute, ExpertWeights, Pair, RouterTally

__all__ = [
    "LOWEST",
    "Compute",
    "ExpertWeights",
    "Ops",
    "Pair",
    "RouterTally",
    "Shaping",
    "select_ops",
]

log = logging.getLogger(__name__)


def select_ops(device: torch.device | str, dtype: torch.dtype, threads: int | None = None) -> Ops:
    """The fastest backend for weights of `dtype` on `device`; `threads` of a CPU's, None for all
    that we may use.

    MOEBIUS_CPU_ISA=reference asks for plain PyTorch. Raises ConfigError for an instruction set that
    is not there.
    """
    if torch.device(device).type != "cpu" or os.environ.get("MOEBIUS_CPU_ISA") == "reference":
        return Ops()
    try:
        from moebius.ops.cpu import CpuOps
    except ImportError:
        log.warning(
            "the compiled kernels are missing: plain PyTorch serves, several times slower and "
            "without one answer in every batch; install a C++17 compiler (Debian: apt install g++) "
            "and install moebius again"
        )
        return Ops()
    return CpuOps(threads)
