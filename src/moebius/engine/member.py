"""A rank's engine as a member of its group: what its front tells it, and hears of it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from moebius.engine import wire
from moebius.engine.rank import RankEngine
from moebius.errors import ChannelError, MoebiusError
from moebius.moe.placement import Placement
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.shared_memory import SharedMemoryExchange

Say = Callable[[wire.FromEngine], None]


class Member:
    """Joins epochs, on the engine's thread."""

    def __init__(self, engine: RankEngine, spec: ExchangeSpec, say: Say) -> None:
        assert engine.moves is not None, "the front tells a rank which experts it holds"
        self._engine = engine
        self._moves = engine.moves
        self._spec = spec
        self._say = say
        self._epoch = 0
        engine.on_parted = self._parted
        self._moves.moved = lambda number: self._tell(wire.Moved(number))
        self._moves.failed = lambda number, error: self._tell(wire.Unmoved(number, error))

    @property
    def rows(self) -> wire.Rows:
        """What the group exchanges, which its front makes room for."""
        spec = self._spec
        dtype = str(spec.dtype).removeprefix("torch.")
        return wire.Rows(spec.size, spec.tokens, spec.hidden, spec.top_k, dtype)

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
            exchange = SharedMemoryExchange(
                asked.place,
                replace(self._spec, size=placement.ranks),
                asked.rank,
                Epoch(asked.group, asked.epoch),
                timeout=asked.timeout,
            )
        except MoebiusError as error:
            self._parted(error)
            return
        self._engine.join(exchange, asked.heard)
        self._tell(wire.Joined(asked.epoch))

    def _parted(self, error: MoebiusError) -> None:
        self._tell(wire.Parted(self._epoch, error))

    def _tell(self, message: wire.FromEngine) -> None:
        with suppress(ChannelError):  # the front is gone, which the reading thread sees, too
            self._say(message)
