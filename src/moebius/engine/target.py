"""The machine that an engine is planned for: this one, or one of other sizes.

So a plan for a card needs none: what is not here is said by its size.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from moebius.engine.devices import available, choose_device
from moebius.engine.plan_words import human_bytes
from moebius.errors import ConfigError
from moebius.ops.cuda import no_cuda

# What a process takes of a CUDA device before it has allocated anything: the driver's context, and
# modules of kernels. Assumed, for a device that is not here; of one that is, free memory is asked.
DEVICE_CONTEXT = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Target:
    """Bytes of memory of a device that is not here, and of the host; None: as they are here."""

    device_memory: int | None = None
    host_memory: int | None = None

    def device(self, wish: Literal["auto", "cpu", "cuda"], ranks: int = 1) -> torch.device:
        """What is computed on. Raises ConfigError for a CUDA device that there is not, for each of
        `ranks` that share the experts."""
        if self.device_memory is not None:
            if wish != "cuda":
                raise ConfigError(
                    f"--memory is how much a CUDA device has, but --device is {wish}; use --device "
                    "cuda, or --host-memory for the host's"
                )
            return torch.device("cuda")
        if wish == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"{no_cuda()}; moebius plan needs none where --memory says its size")
        return choose_device(wish, ranks)

    def available(self, device: torch.device) -> tuple[int, str]:
        """Bytes that are left where the engine will be, and of what."""
        if device.type == "cpu":
            return self.on_host()
        if self.device_memory is None:
            return available(device)
        free = max(self.device_memory - DEVICE_CONTEXT, 0)
        taken = human_bytes(DEVICE_CONTEXT)
        return free, f"a device's {human_bytes(self.device_memory)}, less {taken} for its driver"

    def on_host(self) -> tuple[int, str]:
        """Bytes that are left of the host's memory, and of what."""
        if self.host_memory is not None:
            return self.host_memory, f"a host's {human_bytes(self.host_memory)}"
        return available(torch.device("cpu"))


HERE = Target()
"""This machine."""
