"""Which backend serves which device."""

import logging
import os

import torch

from moebius.ops.config import Activations
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps

log = logging.getLogger(__name__)


def select_ops(
    device: torch.device | str,
    dtype: torch.dtype,
    threads: int | None = None,
    activations: Activations = "int8",
) -> Ops:
    """The fastest backend for weights of `dtype` on `device`.

    threads: of a CPU's; None for all that we may use. activations: what they become where they meet
    quantised weights, if the backend quantises any: plain PyTorch does not. MOEBIUS_CPU_ISA=
    reference asks for it. Raises ConfigError for an instruction set that is not there.
    """
    if torch.device(device).type != "cpu" or os.environ.get("MOEBIUS_CPU_ISA") == "reference":
        return ReferenceOps()
    try:
        from moebius.ops.cpu import CpuOps
    except ImportError:
        log.warning(
            "the compiled kernels are missing: plain PyTorch serves, several times slower and not "
            "batch invariant; install a C++17 compiler (Debian: apt install g++) and install "
            "moebius again"
        )
        return ReferenceOps()
    return CpuOps(threads, activations=activations)


def kernel_levels() -> tuple[str, ...]:
    """The instruction sets whose kernels this host can run, the lowest first; MOEBIUS_CPU_ISA
    leaves one of them."""
    chosen = os.environ.get("MOEBIUS_CPU_ISA")
    if chosen:
        return (chosen,)
    try:
        from moebius import _cpu
    except ImportError:
        return ("reference",)
    return tuple(_cpu.available())
