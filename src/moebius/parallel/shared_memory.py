"""The exchange between CPU ranks of one host: memory that all have mapped, and a barrier in it.

The group's starter makes a `Segment` and tells the ranks its `place`. It has no name in a file
system, so that nothing is left of it when its processes have ended, however they did. A rank that
is bound to a node of memory has its part of the segment there.

Importing this needs the compiled kernels.
"""

import os
from collections.abc import Sequence
from typing import Self

from torch import Tensor

from moebius import _cpu, machine
from moebius.errors import ConfigError, PeerError
from moebius.parallel import mapped
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.mapped import Mapped, too_little_memory
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
        self._file, memory = mapped.make(f"moebius-{epoch.group}-{epoch.number}", layout.nbytes)
        layout.write(memory.address, machine.threads() if cores is None else cores)
        self._memory: Mapped | None = memory
        self.spec = spec
        self.epoch = epoch
        self.place = mapped.place_of(os.getpid(), self._file)

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

    gathers = True

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
            raise too_little_memory(memory.nbytes) from None

    def _gather(self, x_GD: Tensor, rows_RD: Tensor) -> int:
        native = self._open()
        try:
            return native.gather(x_GD.data_ptr(), x_GD.shape[0], rows_RD.data_ptr())
        except _cpu.PeersLost as lost:
            raise self._peer_error(lost) from None

    def _scatter(self, parts_RW: Tensor, back_GV: Tensor) -> None:
        native = self._open()
        try:
            native.scatter(parts_RW.data_ptr(), back_GV.data_ptr())
        except _cpu.PeersLost as lost:
            raise self._peer_error(lost) from None

    def _open(self) -> _cpu.SharedExchange:
        native = super()._open()
        assert isinstance(native, _cpu.SharedExchange)
        return native


def _open(place: str, epoch: Epoch) -> Mapped:
    try:
        return mapped.open_at(place)
    except OSError as error:
        reason = error.strerror
        raise PeerError(
            f"{epoch}: its segment {place} cannot be opened ({reason}); the process that made it "
            "has closed it or ended",
            ranks=(),
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{epoch}: {error}") from None


def _layout(spec: ExchangeSpec, epoch: Epoch) -> _cpu.ExchangeLayout:
    try:
        return _cpu.ExchangeLayout(
            ranks=spec.size,
            tokens=spec.tokens,
            top_k=spec.top_k,
            gathered=spec.gathered,
            width=spec.width,
            row_bytes=spec.row_bytes,
            group=epoch.group,
            epoch=epoch.number,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
