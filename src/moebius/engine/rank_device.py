"""Ranks that share experts on GPUs have one each, all of one host."""

import torch

from moebius.engine import wire
from moebius.errors import ConfigError


def require_devices(ranks: int) -> None:
    """Raises ConfigError where this host has not a GPU for each of so many ranks."""
    count = torch.cuda.device_count()
    if ranks > count:
        raise ConfigError(
            f"--ranks {ranks}: each has a GPU of its own, and this host has {count}; use --ranks "
            f"{count} or --device cpu"
        )


def take_device(launch: wire.Launch) -> None:
    """From here on `cuda` means this rank's own GPU, in this process.

    Raises ConfigError as `require_devices`, and for ranks of several hosts: NCCL's connections
    prove nothing and seal nothing.
    """
    ranks = launch.config.ranks
    if launch.config.device == "cpu" or not torch.cuda.is_available():
        return
    if launch.local_ranks < ranks:
        raise ConfigError(
            f"{launch.local_ranks} of {ranks} ranks are on this host: those of several hosts share "
            "experts on CPUs only; use --device cpu"
        )
    require_devices(ranks)
    torch.cuda.set_device(launch.local_rank)
