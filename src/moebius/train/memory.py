"""Too little memory of a device, told in one line with its numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moebius.errors import MemoryPlanError
from moebius.ops.cuda import told_by_device


@contextmanager
def told_of_memory(device: torch.device, doing: str, taken: int, advice: str) -> Iterator[None]:
    """Within it too little memory of `device` is a MemoryPlanError.

    doing    what was begun
    taken    bytes of weights, gradients and optimiser; 0: not known
    advice   what would take less
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = told_by_device(error, device, _gib)
        weights = f"; weights, gradients and optimiser take {_gib(taken)}" if taken else ""
        raise MemoryPlanError(
            f"{doing}: the device's memory is too small ({said}){weights}; {advice}"
        ) from error


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
