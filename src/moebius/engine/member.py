"""A rank's engine as a member of its group: what its front tells it, and hears of it."""

from collections.abc import Callable
from contextlib import suppress

from moebius.engine import wire
from moebius.engine.rank import RankEngine
from moebius.errors import ChannelError, MoebiusError
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.shared_memory import SharedMemoryExchange

Say = Callable[[wire.FromEngine], None]


class Member:
    """Joins epochs, on the engine's thread."""

    def __init__(self, engine: RankEngine, spec: ExchangeSpec, rank: int, say: Say) -> None:
        self._engine = engine
        self._spec = spec
        self._rank = rank
        self._say = say
        self._epoch = 0
        engine.on_parted = self._parted

    @property
    def rows(self) -> wire.Rows:
        """What the group exchanges, which its front makes room for."""
        spec = self._spec
        dtype = str(spec.dtype).removeprefix("torch.")
        return wire.Rows(spec.size, spec.tokens, spec.hidden, spec.top_k, dtype)

    def join(self, asked: wire.Join) -> None:
        """Leave the epoch that it is in, and compute in this one."""
        self._engine.leave()
        self._epoch = asked.epoch
        try:
            exchange = SharedMemoryExchange(
                asked.place,
                self._spec,
                self._rank,
                Epoch(asked.group, asked.epoch),
                timeout=asked.timeout,
            )
        except MoebiusError as error:
            self._parted(error)
            return
        self._engine.join(exchange, asked.heard)
        self._tell(wire.Joined(asked.epoch))

    def hear(self, number: int) -> None:
        self._engine.hear(number)

    def _parted(self, error: MoebiusError) -> None:
        self._tell(wire.Parted(self._epoch, error))

    def _tell(self, message: wire.FromEngine) -> None:
        with suppress(ChannelError):  # the front is gone, which the reading thread sees, too
            self._say(message)
