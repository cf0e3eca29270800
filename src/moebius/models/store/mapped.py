"""Files mapped into memory, and tensors over them."""

import math
import mmap
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moebius.errors import WeightsError
from moebius.models.store.tensors import StoredTensor, short_name
from moebius.pages import populate


class MappedFiles:
    """Read-only maps of files, each made once. A map lives as long as a tensor over it."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def view(
        self, stored: StoredTensor, dtype: torch.dtype, skipped: int, shape: tuple[int, ...]
    ) -> Tensor:
        """Numbers of `dtype` where they lie, `skipped` of them behind the tensor's beginning.

        A copy where they are not aligned. Nothing may write to it. Raises WeightsError where the
        file has shrunk since its header was read.
        """
        region = self._region(stored.file)
        if len(region) < stored.stop:
            raise WeightsError(f"{short_name(stored.file)} shrank while it was loaded")
        start = stored.start + skipped * dtype.itemsize
        count = math.prod(shape)
        with warnings.catch_warnings():
            # torch warns that the buffer cannot be written.
            warnings.simplefilter("ignore")
            if start % dtype.itemsize == 0:
                flat = torch.frombuffer(region, dtype=dtype, count=count, offset=start)
            else:
                copied = bytearray(region[start : start + count * dtype.itemsize])
                flat = torch.frombuffer(copied, dtype=dtype, count=count)
        return flat.view(shape)

    def _region(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            region = _mapped(file)
            # What is read from now on is read ahead, and in huge pages where the kernel has them
            # for files. Not every system knows these words.
            for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
                with suppress(OSError, AttributeError):
                    region.madvise(getattr(mmap, advice))
            address = np.frombuffer(region, np.uint8).ctypes.data
            populate(address, len(region), write=False, keep=region)
            self._maps[file] = region
        return self._maps[file]


def _mapped(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as cause:
        reason = cause.strerror or cause
        raise WeightsError(f"{short_name(file)} cannot be mapped: {reason}") from None
    except ValueError:  # of an empty file
        raise WeightsError(f"{short_name(file)} shrank while it was loaded") from None
