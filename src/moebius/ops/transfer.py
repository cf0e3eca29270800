"""Between the host and a device, without waiting for what the device still has to do.

A copy from or to memory that is not pinned waits until the device has come to it. These do not.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def send(host: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor of the host on the device, in its turn among what the device has to do."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def send_numbers(
    values: Sequence[float] | Sequence[Sequence[float]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Numbers of the host as a tensor on the device."""
    return send(torch.tensor(values, dtype=dtype), device)


def fetch(x_R: Tensor) -> Callable[[], list[int]]:
    """Begin to bring integers to the host; what is returned waits for them, and for them alone."""
    if x_R.device.type != "cuda":
        return x_R.tolist
    host_R = torch.empty(x_R.shape, dtype=x_R.dtype, pin_memory=True)
    host_R.copy_(x_R, non_blocking=True)
    there = torch.cuda.Event()  # type: ignore[no-untyped-call]
    there.record()

    def wait() -> list[int]:
        there.synchronize()
        return host_R.tolist()

    return wait
