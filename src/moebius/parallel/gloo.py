"""Ranks on several hosts join an epoch through gloo.

gloo's connections need a place where each rank leaves its address for the others. Here that is no
server of torch's: what a rank leaves is carried to the others by whoever formed the epoch, in
frames that the cluster's key guards. The connections themselves carry rows as they are, which is
why they belong on a network that is trusted.
"""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import ProcessGroupGloo, Store

from moebius.errors import MoebiusError, PeerError
from moebius.parallel.collective import CollectiveExchange, Group
from moebius.parallel.exchange import Epoch, ExchangeSpec

Tell = Callable[[str, bytes], None]

_LOOK_SECONDS = 0.05
_DEFAULT = timedelta(seconds=30)


class Meeting(Store):
    """Where one rank finds what the others of an epoch have left for it.

    tell   carries a key and its value to the meetings of all others, which `hear` them there
    """

    def __init__(self, epoch: Epoch, tell: Tell) -> None:
        super().__init__()
        self.epoch = epoch
        self._tell = tell
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._over: PeerError | None = None

    @property
    def over(self) -> PeerError | None:
        """Why nobody waits here any more."""
        return self._over

    def hear(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def give_up(self, ranks: Sequence[int]) -> None:
        """Whoever waits, or begins to, gets a PeerError that names these ranks."""
        with self._changed:
            self._over = self._over or self.epoch.lost(ranks)
            self._changed.notify_all()

    # What gloo calls, on threads of its own choice.

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self.hear(key, value)
        self._tell(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key], _DEFAULT)
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta = _DEFAULT) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._has(keys), timeout.total_seconds())
            if self._over is not None:
                raise self._over
            if not self._has(keys):
                raise TimeoutError("a rank has left no address")

    def _has(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


def join_epoch(
    meeting: Meeting, spec: ExchangeSpec, rank: int, address: str, timeout: float, patience: float
) -> CollectiveExchange:
    """A rank's exchange, once all ranks are connected.

    address    this host's, which gloo listens at
    timeout    the exchange's
    patience   seconds that the others get to come

    Raises PeerError, also where the meeting is given up meanwhile; ConfigError as
    CollectiveExchange does.
    """
    joining = _Joining(meeting, spec, rank, address, timeout)
    deadline = time.monotonic() + patience
    while not joining.done.wait(_LOOK_SECONDS):
        if time.monotonic() > deadline:
            meeting.give_up([other for other in range(spec.size) if other != rank])
        if meeting.over is not None:
            joining.abandon()
            raise meeting.over
    return joining.result()


class _Joining:
    """The connecting, on a thread that nobody has to wait for."""

    def __init__(
        self, meeting: Meeting, spec: ExchangeSpec, rank: int, address: str, timeout: float
    ) -> None:
        self.done = threading.Event()
        self._meeting = meeting
        self._spec = spec
        self._rank = rank
        self._address = address
        self._timeout = timeout
        self._exchange: CollectiveExchange | None = None
        self._error: MoebiusError | None = None
        self._abandoned = False
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="join", daemon=True).start()

    def result(self) -> CollectiveExchange:
        if self._error is not None:
            raise self._error
        assert self._exchange is not None
        return self._exchange

    def abandon(self) -> None:
        """Nobody takes what it comes to."""
        with self._lock:
            self._abandoned = True
            if self._exchange is not None:
                self._exchange.close()

    def _run(self) -> None:
        try:
            exchange = self._join()
            with self._lock:
                self._exchange = exchange
                if self._abandoned:
                    exchange.close()
        except MoebiusError as error:
            self._error = error
        except (RuntimeError, TimeoutError, OSError) as error:
            others = tuple(other for other in range(self._spec.size) if other != self._rank)
            why = str(error).partition("\n")[0]
            self._error = PeerError(
                f"{self._meeting.epoch}: gloo does not connect from {self._address}: {why}",
                ranks=others,
            )
        finally:
            self.done.set()

    def _join(self) -> CollectiveExchange:
        make: Any = ProcessGroupGloo  # of which torch's types lack a part
        options = make._Options()
        options._timeout = timedelta(seconds=self._timeout)
        options._devices = [make.create_device(hostname=self._address)]
        options._threads = 1
        group: Group = make(self._meeting, self._rank, self._spec.size, options)
        return CollectiveExchange(
            group, self._spec, self._rank, self._meeting.epoch, timeout=self._timeout
        )
