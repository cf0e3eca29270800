"""Memory that processes of one host share.

It has no name in a file system, so that nothing is left of it when its processes have ended,
however they did: others open it as a file of the process that made it, while that holds it open.
"""

import mmap
import os

import torch

from moebius.errors import ConfigError, MemoryPlanError


class Mapped:
    """A file's bytes in this process, and their address; whoever uses that keeps this."""

    def __init__(self, file: int, nbytes: int) -> None:
        """Raises MemoryPlanError."""
        try:
            mapped = mmap.mmap(file, nbytes)
        except OSError:
            raise too_little_memory(nbytes) from None
        self._tensor = torch.frombuffer(mapped, dtype=torch.uint8)
        self.address = self._tensor.data_ptr()
        self.nbytes = nbytes


def make(name: str, nbytes: int) -> tuple[int, Mapped]:
    """Memory of zeros, and the file that it is: the caller's to close. `name` is for a person.

    Raises ConfigError where this system has no such memory, MemoryPlanError.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("ranks share memory on Linux only")
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, nbytes)
        # Nobody can shorten it: reading mapped memory that is gone would end a process.
        import fcntl  # not on every system, as memfd_create is not

        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return file, Mapped(file, nbytes)
    except BaseException:
        os.close(file)
        raise


def place_of(process: int, file: int) -> str:
    """Where others find a file of a process, as long as that lives and holds it open."""
    return f"/proc/{process}/fd/{file}"


def open_at(place: str) -> Mapped:
    """Memory that another process has made. Raises OSError where it is gone, ConfigError where that
    is no memory, MemoryPlanError."""
    file = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    try:
        nbytes = os.fstat(file).st_size
        if nbytes == 0:
            raise ConfigError(f"{place} is empty, and no segment")
        return Mapped(file, nbytes)
    finally:
        os.close(file)


def too_little_memory(nbytes: int) -> MemoryPlanError:
    return MemoryPlanError(
        f"the {nbytes / 2**20:.1f} MiB that ranks share cannot be had; fewer tokens a step need "
        "less"
    )
