"""What is said where torch finds no CUDA device or too little memory, in serving and training; and
the device of other threads."""

from collections.abc import Callable
from functools import partial

import torch

from moebius.errors import ConfigError


def no_cuda() -> ConfigError:
    """Why `--device cuda` cannot be had, in torch's own words: a driver that is too old, or a build
    without CUDA."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        why = "it counts none"
    except Exception as error:  # of several kinds, whose first sentence says what is wrong
        why = _first_sentence(error)
    return ConfigError(
        f"--device cuda: torch finds no CUDA device ({why}); use --device cpu, or mend what torch "
        "names"
    )


def device_for_threads() -> Callable[[], None]:
    """For another thread to call before anything else: from then on `cuda` means the same device
    there as it does here. To a thread that is new it means the first one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return _as_it_is
    return partial(torch.cuda.set_device, torch.cuda.current_device())


def told_by_device(
    error: torch.OutOfMemoryError, device: torch.device, words: Callable[[int], str]
) -> str:
    """What was too much, and how much is free, on a CUDA device. words: a number of bytes' own."""
    said = _first_sentence(error)
    if device.type != "cuda":
        return said
    left, total = torch.cuda.mem_get_info(device)
    return f"{said}; {words(left)} of {words(total)} are free"


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]


def _as_it_is() -> None:
    """There is no device yet, if any."""
