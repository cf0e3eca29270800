"""Where an engine computes, and how much memory is left there."""

import torch

from moebius import machine
from moebius.engine.plan_words import human_bytes
from moebius.errors import ConfigError, in_one_line


def choose_device(wish: str, *, ranked: bool) -> torch.device:
    """The device that `--device` asks for. Raises ConfigError where it cannot be had.

    ranked: several ranks share the experts.
    """
    has_cuda = torch.cuda.is_available()
    if wish == "cuda" and not has_cuda:
        raise ConfigError(
            f"--device cuda: torch finds no CUDA device ({_why_no_cuda()}); use --device cpu, or "
            "mend what torch names"
        )
    device = torch.device("cuda" if wish == "cuda" or (wish == "auto" and has_cuda) else "cpu")
    if ranked and device.type != "cpu":
        raise ConfigError("ranks share experts on CPUs only; use --device cpu, or --ranks 1")
    return device


def _why_no_cuda() -> str:
    """In torch's own words: a driver that is too old, or a build without CUDA."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return in_one_line(error)
    return "it counts none"


def available(device: torch.device) -> tuple[int, str]:
    """Bytes that are left where the engine will be, and of what."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, f"the device's {human_bytes(total)}"
    memory = machine.memory()
    return memory.available, f"the {memory.owner}'s {human_bytes(memory.limit)}"
