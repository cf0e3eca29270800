"""The exchange between CPU ranks of one host: memory that all have mapped, and a barrier in it.

The group's starter makes a `Segment` and tells the ranks its `place`. It has no name in a file
system, so that nothing is left of it when its processes have ended, however they did. A rank that
is bound to a node of memory has its part of the segment there.

Importing this needs the compiled kernels.
"""

import mmap
import os
from collections.abc import Sequence
from typing import Self

import torch

from moebius import _cpu, machine
from moebius.errors import ConfigError, MemoryPlanError, PeerError
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.native import NativeExchange, check_ranks


def segment_bytes(spec: ExchangeSpec) -> int:
    """The memory that a group of this kind shares, all of its ranks together."""
    return _layout(spec, Epoch("none", 0)).nbytes


class Segment:
    """A group's shared memory for one epoch, at its starter.

    place   where its ranks find it, as long as the starter holds it open and lives
    cores   how many its ranks may use together; None for what this process may use. With fewer than
            ranks, who waits gives up its core soon.
    """

    def __init__(self, spec: ExchangeSpec, epoch: Epoch, *, cores: int | None = None) -> None:
        """Raises ConfigError where this system has no such memory, and for what no segment can
        be."""
        layout = _layout(spec, epoch)
        if not hasattr(os, "memfd_create"):
            raise ConfigError("ranks share memory on Linux only")
        name = f"moebius-{epoch.group}-{epoch.number}"
        self._file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._file, layout.nbytes)
            # Nobody can shorten it: reading mapped memory that is gone would end a process.
            import fcntl  # not on every system, as memfd_create is not

            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = _Memory(self._file, layout.nbytes)
        except BaseException:
            os.close(self._file)
            raise
        layout.write(memory.address, machine.threads() if cores is None else cores)
        self._memory: _Memory | None = memory
        self.spec = spec
        self.epoch = epoch
        self.place = f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def joined(self) -> tuple[int, ...]:
        """The ranks that have joined."""
        assert self._memory is not None, "a closed segment knows nothing"
        return tuple(_cpu.exchange_joined(self._memory.address))

    def give_up(self, ranks: Sequence[int]) -> None:
        """Ends the epoch: whoever waits, or begins to, gets a PeerError that names these ranks."""
        assert self._memory is not None, "a closed segment reaches nobody"
        check_ranks(ranks, self.spec)
        _cpu.exchange_give_up(self._memory.address, ranks)

    def close(self) -> None:
        """Lets go of the memory. Ranks that have joined keep it; no other one can join."""
        if self._memory is not None:
            self._memory = None
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedMemoryExchange(NativeExchange):
    """A rank's part in a segment.

    place   the segment's

    Raises PeerError where the segment is gone, and ConfigError where it is for another group, epoch
    or kind of rows, or this rank has joined already; MemoryPlanError where there is too little
    memory.
    """

    def __init__(
        self, place: str, spec: ExchangeSpec, rank: int, epoch: Epoch, *, timeout: float
    ) -> None:
        super().__init__(spec, rank, epoch, timeout)
        layout = _layout(spec, epoch)
        memory = _open(place, epoch)
        try:
            layout.check(memory.address, memory.nbytes)
            self._native = _cpu.SharedExchange(
                memory, layout, memory.address, rank=rank, timeout=timeout
            )
        except ValueError as error:
            raise ConfigError(f"{epoch}: {error}") from None
        except MemoryError:
            raise _too_little_memory(memory.nbytes) from None


class _Memory:
    """A mapped file and its address."""

    def __init__(self, file: int, nbytes: int) -> None:
        # The tensor keeps the mapping, and whoever uses the address keeps this.
        try:
            mapped = mmap.mmap(file, nbytes)
        except OSError:
            raise _too_little_memory(nbytes) from None
        self._tensor = torch.frombuffer(mapped, dtype=torch.uint8)
        self.address = self._tensor.data_ptr()
        self.nbytes = nbytes


def _too_little_memory(nbytes: int) -> MemoryPlanError:
    return MemoryPlanError(
        f"the {nbytes / 2**20:.1f} MiB that ranks share cannot be had; fewer tokens a step need "
        "less"
    )


def _open(place: str, epoch: Epoch) -> _Memory:
    try:
        file = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        reason = error.strerror
        raise PeerError(
            f"{epoch}: its segment {place} cannot be opened ({reason}); the process that made it "
            "has closed it or ended",
            ranks=(),
        ) from None
    try:
        nbytes = os.fstat(file).st_size
        if nbytes == 0:
            raise ConfigError(f"{epoch}: {place} is empty, and no segment")
        return _Memory(file, nbytes)
    finally:
        os.close(file)


def _layout(spec: ExchangeSpec, epoch: Epoch) -> _cpu.ExchangeLayout:
    try:
        return _cpu.ExchangeLayout(
            ranks=spec.size,
            tokens=spec.tokens,
            top_k=spec.top_k,
            row_bytes=spec.row_bytes,
            group=epoch.group,
            epoch=epoch.number,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
