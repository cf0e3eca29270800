"""What is said where torch finds no CUDA device, in serving and in training."""

import torch

from moebius.errors import ConfigError


def no_cuda() -> ConfigError:
    """Why `--device cuda` cannot be had, in torch's own words: a driver that is too old, or a build
    without CUDA."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        why = "it counts none"
    except Exception as error:  # of several kinds, whose first sentence says what is wrong
        why = " ".join(str(error).split()).partition(". ")[0]
    return ConfigError(
        f"--device cuda: torch finds no CUDA device ({why}); use --device cpu, or mend what torch "
        "names"
    )
