"""A rank's engine as a member of its group: what its front tells it, and hears of it."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moebius.engine import wire
from moebius.engine.rank import RankEngine
from moebius.errors import ChannelError, ConfigError, MoebiusError, PeerError
from moebius.moe.placement import Placement
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.key import ClusterKey

if TYPE_CHECKING:
    from moebius.parallel.sockets import Meeting

Say = Callable[[wire.FromEngine], None]

TCP = "tcp://"
"""What a place begins with where ranks share no memory; this host's address follows."""
FILE = "file://"
"""What it begins with where each has a device of its own; a file's path follows."""
_PATIENCE_SECONDS = 20.0


class Member:
    """Joins epochs. `expect`, `hear_address` and `give_up` belong to the thread that reads what the
    front says, all else to the engine's.

    key       the cluster's, which ranks on several hosts prove to each other
    crowded   the ranks of this host share processors
    device    that this rank's rows lie on
    """

    def __init__(
        self,
        engine: RankEngine,
        spec: ExchangeSpec,
        say: Say,
        *,
        key: ClusterKey | None = None,
        crowded: bool = False,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - it cannot be changed
    ) -> None:
        assert engine.moves is not None, "the front tells a rank which experts it holds"
        self._engine = engine
        self._moves = engine.moves
        self._spec = spec
        self._say = say
        self._key = key
        self._crowded = crowded
        self._device = device
        self._epoch = 0
        self._lock = threading.Lock()
        self._meeting: Meeting | None = None
        self._exchange: Exchange | None = None
        engine.on_parted = self._parted
        self._moves.moved = lambda number: self._tell(wire.Moved(number))
        self._moves.failed = lambda number, error: self._tell(wire.Unmoved(number, error))

    @property
    def rows(self) -> wire.Rows:
        """What the group exchanges, which its front makes room for."""
        spec = self._spec
        dtype = str(spec.dtype).removeprefix("torch.")
        sizes = (spec.size, spec.tokens, spec.hidden, spec.top_k)
        return wire.Rows(*sizes, dtype, spec.gathered, spec.width, self._device.type)

    def expect(self, asked: wire.Join) -> None:
        """This epoch will be joined once the engine comes to it: whatever that still waits for in
        an earlier one, it waits no longer."""
        if asked.place.startswith(FILE) and self._exchange is not None:
            self._end(self._exchange.epoch.number, range(self._spec.size))
        if not asked.place.startswith(TCP):
            return
        from moebius.parallel.sockets import Meeting  # which needs the compiled kernels

        with self._lock:
            earlier = self._meeting
            self._meeting = Meeting(
                _epoch_of(asked),
                lambda address: self._tell(wire.Listening(asked.epoch, asked.rank, address)),
            )
        if earlier is not None:
            earlier.give_up(range(self._spec.size))
            self._end(earlier.epoch.number, range(self._spec.size))

    def hear_address(self, told: wire.Listening) -> None:
        meeting = self._meeting
        if meeting is not None and meeting.epoch.number == told.epoch:
            meeting.hear(told.rank, told.address)

    def give_up(self, told: wire.GiveUp) -> None:
        """The epoch is over: what the engine waits for in it will not come."""
        meeting = self._meeting
        if meeting is not None and meeting.epoch.number == told.epoch:
            meeting.give_up(told.ranks)
        self._end(told.epoch, told.ranks)

    def take(self, message: wire.Hear | wire.Join | wire.Move) -> None:
        match message:
            case wire.Hear(number):
                self._engine.hear(number)
            case wire.Move(number, held):
                self._moves.ask(number, held)
            case wire.Join():
                self._join(message)

    def _join(self, asked: wire.Join) -> None:
        """Leave the epoch that it is in, and compute in this one."""
        self._engine.leave()
        self._epoch = asked.epoch
        try:
            placement = Placement.of(asked.held)
            self._moves.set(asked.number, placement, asked.rank)
            exchange = self._exchange_of(asked, replace(self._spec, size=placement.ranks))
        except MoebiusError as error:
            self._tell(wire.Parted(self._epoch, error, steps=0))
            return
        self._engine.join(exchange, asked.heard)
        self._tell(wire.Joined(asked.epoch))

    def _exchange_of(self, asked: wire.Join, spec: ExchangeSpec) -> Exchange:
        epoch = _epoch_of(asked)
        if asked.place.startswith(FILE):
            return self._with_devices(asked, spec)
        if not asked.place.startswith(TCP):
            from moebius.parallel.shared_memory import SharedMemoryExchange  # needs the kernels

            return SharedMemoryExchange(asked.place, spec, asked.rank, epoch, timeout=asked.timeout)
        meeting = self._meeting
        assert meeting is not None, "an epoch over several hosts is expected before it is joined"
        if meeting.epoch != epoch:
            raise PeerError(f"{epoch} was over before it was joined", ranks=())
        exchange = self._connected(meeting, spec, asked)
        with self._lock:
            self._exchange = exchange
        if meeting.over is not None:
            exchange.close()
            raise meeting.over
        return exchange

    def _connected(self, meeting: "Meeting", spec: ExchangeSpec, asked: wire.Join) -> Exchange:
        from moebius.parallel.sockets import join_epoch

        if self._key is None:
            raise ConfigError(f"rank {asked.rank} does not have the cluster's key")
        return join_epoch(
            meeting,
            spec,
            asked.rank,
            asked.place.removeprefix(TCP),
            self._key,
            timeout=asked.timeout,
            patience=_PATIENCE_SECONDS,
            crowded=self._crowded,
            near=asked.near,
        )

    def _with_devices(self, asked: wire.Join, spec: ExchangeSpec) -> Exchange:
        from moebius.parallel.process_group import join_process_group

        exchange = join_process_group(
            Path(asked.place.removeprefix(FILE)),
            spec,
            asked.rank,
            _epoch_of(asked),
            timeout=asked.timeout,
            device=self._device,
        )
        with self._lock:
            self._exchange = exchange
        return exchange

    def _end(self, epoch: int, ranks: Sequence[int]) -> None:
        with self._lock:
            exchange = self._exchange
        if exchange is not None and exchange.epoch.number == epoch:
            # An epoch may have had fewer ranks than the group has.
            exchange.give_up([rank for rank in ranks if rank < exchange.size])

    def _parted(self, error: PeerError) -> None:
        self._tell(wire.Parted(self._epoch, error, self._engine.epoch_steps))

    def _tell(self, message: wire.FromEngine) -> None:
        with suppress(ChannelError):  # the front is gone, which the reading thread sees, too
            self._say(message)


def _epoch_of(asked: wire.Join) -> Epoch:
    return Epoch(asked.group, asked.epoch, asked.names)
