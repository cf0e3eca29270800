"""Which backend serves which device."""

import logging
import os

import torch

from moebius.ops.config import Activations
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton_usable import why_not

log = logging.getLogger(__name__)


def select_ops(
    device: torch.device | str,
    dtype: torch.dtype,
    threads: int | None = None,
    activations: Activations = "int8",
    *,
    ordered: bool = False,
    here: bool = True,
) -> Ops:
    """The fastest backend for weights of `dtype` on `device`.

    threads: of a CPU's; None for all that we may use. activations: what they become where they meet
    quantised weights, if the backend quantises any: plain PyTorch does not. ordered: what it
    computes has the bits of every processor as far as its operations can have them. here: the
    device is in this machine; of one that is not, a model can be planned for.
    MOEBIUS_CPU_ISA=reference asks for plain PyTorch. Raises ConfigError for an instruction set that
    is not there. Kernels on a CUDA device promise nothing before they were proven there
    (moebius.engine.proof).
    """
    device = torch.device(device)
    if os.environ.get("MOEBIUS_CPU_ISA") == "reference":
        return ReferenceOps()
    if device.type == "cuda":
        return _on_cuda(device, here)
    if device.type != "cpu":
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
    return CpuOps(threads, activations=activations, ordered=ordered)


def _on_cuda(device: torch.device, here: bool) -> Ops:
    reason = why_not(device if here else None)
    if reason:
        log.warning("plain PyTorch serves, much slower and not batch invariant: %s", reason)
        return ReferenceOps()
    from moebius.ops.triton.captured import CapturedOps

    if not here:
        return CapturedOps()
    major, minor = torch.cuda.get_device_capability(device)
    return CapturedOps(chip=f"sm_{major}{minor}")


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
