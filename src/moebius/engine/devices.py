"""Where an engine computes, and how much memory is left there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moebius import machine
from moebius.engine.plan_words import human_bytes
from moebius.engine.rank_device import require_devices
from moebius.ops.cuda import no_cuda

if TYPE_CHECKING:
    from moebius.models.decoder import Decoder
    from moebius.models.store import PlannedWeight
    from moebius.models.store.load import Loader


def choose_device(wish: str, ranks: int) -> torch.device:
    """The device that `--device` asks for. Raises ConfigError where it cannot be had, by each of
    `ranks` that share the experts.
    """
    has_cuda = torch.cuda.is_available()
    if wish == "cuda" and not has_cuda:
        raise no_cuda()
    device = torch.device("cuda" if wish == "cuda" or (wish == "auto" and has_cuda) else "cpu")
    if ranks > 1 and device.type != "cpu":
        require_devices(ranks)
    return device


# How torch and Triton begin what they say of a failed call of CUDA.
_OF_CUDA = ("CUDA error", "Triton Error [CUDA]")


def is_lost(error: BaseException) -> bool:
    """Whether it says that a device will do nothing more for this process, as after an access to
    memory that is not there: then another process has to take its place. Too little memory is
    nothing of the kind."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and text.startswith(_OF_CUDA)
    )


def prove_on_device(
    decoder: "Decoder",
    loader: "Loader",
    weights: "Sequence[PlannedWeight]",
    block_size: int,
    kv_dtype: torch.dtype,
) -> bool:
    """Whether kernels that promise nothing by themselves hold on their device; what fails there
    falls back."""
    from moebius.engine.proof import prove  # needs triton, which only they have

    return prove(decoder, loader, weights, block_size, kv_dtype).holds


def available(device: torch.device) -> tuple[int, str]:
    """Bytes that are left where the engine will be, and of what."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Of its own each process knows no more than what torch holds for it.
        others = total - free - torch.cuda.memory_reserved(device)
        return free, f"the device's {human_bytes(total)}, of which {human_bytes(others)} are taken"
    memory = machine.memory()
    return memory.available, f"the {memory.owner}'s {human_bytes(memory.limit)}"
