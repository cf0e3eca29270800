"""Data parallel training: torchrun's processes share out a step's micro-batches."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from moebius.errors import ConfigError

# Rank 0 prepares the data and measures held-out text while the others wait.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `count` of them; alone, nothing is exchanged."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: torch.device) -> "Ranks":
        """The group that torchrun's environment describes: gloo on CPUs, NCCL on GPUs."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        return cls(torch.distributed.get_rank(), count)

    def share(self, micro_batches: int) -> range:
        """Which micro-batches of a step are this rank's."""
        if micro_batches % self.count:
            raise ConfigError(
                f"training.accumulation = {micro_batches} micro-batches cannot be shared by "
                f"{self.count} ranks evenly; make it a multiple of {self.count}"
            )
        return range(self.rank, micro_batches, self.count)

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by the sum over all ranks, the same bits on each."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        if self.count > 1:
            torch.distributed.destroy_process_group()
