"""Ranks that share a model's experts: their processes, and the epochs in which they compute.

An epoch is a membership: all ranks, with a place of its own for their rows. When a rank is lost,
its epoch is over for all of them at once; the others keep process, cache and weights, and wait with
what they have. When the lost rank is loaded again, all join the next epoch.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from moebius.engine import wire
from moebius.engine.client import EngineInfo, EngineStats
from moebius.engine.faults import say
from moebius.engine.remote import RemoteClient
from moebius.engine.supervisor import WatchedProcess
from moebius.errors import ConfigError, MoebiusError, UsageError
from moebius.front.alike import check_engines_alike
from moebius.front.fleet import Lost
from moebius.front.hosts import EpochPlace, Hosts, OneHost
from moebius.front.launched import LaunchedEngine
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.request.engine_request import EngineRequest

log = logging.getLogger(__name__)

_JOIN_SECONDS = 30.0
_PAUSE_SECONDS = 0.2


class RankGroup:
    """The engines that ReplayClient is given, one a rank.

    message   what each is launched with; its rank is filled in here
    hosts     where the ranks are; None: all on this one
    """

    def __init__(self, message: wire.Launch, hosts: Hosts | None = None) -> None:
        self._message = message
        self._hosts = hosts or OneHost(message.config.ranks, message.config.threads)
        self._name = secrets.token_hex(4)
        self._lock = threading.RLock()
        self._clients: list[RankClient | None] = [None] * message.config.ranks
        self._info: EngineInfo | None = None
        self._epoch = 0
        self._place: EpochPlace | None = None
        self._joined: set[int] = set()
        # Since when all ranks are there, and not all in one epoch.
        self._apart_since: float | None = None
        self._given = 0

    @property
    def size(self) -> int:
        return len(self._clients)

    def launch(
        self,
        rank: int,
        lost: Lost,
        planned: Callable[[wire.Planned], None],
        process: WatchedProcess,
    ) -> "RankClient":
        """Have a rank's process load, and return once it has; as LaunchedEngine."""
        try:
            client = RankClient(self, rank, self._launch_of(rank), lost, planned, process)
        except UsageError as error:
            if isinstance(self._hosts, OneHost):
                raise
            raise ConfigError(f"{self._hosts.name(rank)}: {error}") from error
        try:
            self._check(client)
            with self._lock:
                if not client.gone:
                    self._clients[rank] = client
                    if all(self._clients):
                        self._form()
        except BaseException:
            client.close(0.0)
            raise
        return client

    def _launch_of(self, rank: int) -> wire.Launch:
        with self._lock:
            loaded = [other for other, client in enumerate(self._clients) if client is not None]
        return self._hosts.launch(self._message, rank, loaded)

    def _check(self, client: "RankClient") -> None:
        """ConfigError where it is not like those that were loaded before."""
        with self._lock:
            self._info = self._info or client.info
            check_engines_alike(self._info, client.info, self._hosts.name(client.rank))

    @property
    def formed(self) -> bool:
        """Whether all ranks are in the present epoch."""
        return self._place is not None and len(self._joined) == self.size

    def submit(self, rank: int, remote: RemoteClient, request: EngineRequest) -> None:
        """Give a request to one rank, and its number to all."""
        with self._lock:
            self._given += 1
            remote.submit(request, self._given)
            for client in self._clients:
                if client is not None and client.rank != rank:
                    client.remote.tell(wire.Hear(self._given))

    def hear(self, client: "RankClient", message: wire.OfGroup) -> None:
        """What a rank says of its group."""
        with self._lock:
            if message.epoch != self._epoch or self._clients[client.rank] is not client:
                return
            if isinstance(message, wire.Joined):
                self._joined.add(client.rank)
                if self.formed:
                    self._apart_since = None
                return
            if isinstance(message, wire.Put):
                if self._place is not None:
                    self._place.carry(message, client.rank)
                return
            say(log.warning, "rank %d: %s", client.rank, message.error)
            self._give_up((client.rank,))
            again = all(self._clients)
            epoch = self._epoch
        if again:
            self._later(_PAUSE_SECONDS, partial(self._form_again, epoch))

    def lose(self, client: "RankClient") -> None:
        """A rank's process is gone: nobody shall wait for it."""
        with self._lock:
            client.gone = True
            if self._clients[client.rank] is client:
                self._clients[client.rank] = None
                self._apart_since = None
                self._give_up((client.rank,))

    def absent_for(self, client: "RankClient") -> float:
        """Seconds that the others, which are all there, have waited for this rank to join them."""
        with self._lock:
            if self._apart_since is None or client.rank in self._joined:
                return 0.0
            return time.monotonic() - self._apart_since

    def _give_up(self, ranks: Sequence[int]) -> None:
        """This epoch is over: whoever waits in it for these ranks waits no longer."""
        if self._place is not None:
            self._place.give_up(ranks)
            self._place = None

    def _form_again(self, epoch: int) -> None:
        with self._lock:
            clients = [client for client in self._clients if client is not None]
            if self._epoch != epoch or len(clients) < self.size:
                return
            try:
                self._form()
            except (MoebiusError, OSError) as error:
                # Started again, this rank asks for the same once more, as often as that is allowed.
                say(log.error, "epoch %d cannot begin: %s", self._epoch, error)
                clients[0].end()

    def _form(self) -> None:
        """Begin the next epoch, with all ranks."""
        self._give_up(range(self.size))
        self._epoch += 1
        epoch = Epoch(self._name, self._epoch)
        clients = [client for client in self._clients if client is not None]
        remotes = [client.remote for client in clients]
        place = self._hosts.place(_spec(clients[0].rows), epoch, remotes)
        self._place = place
        self._joined = set()
        if self._apart_since is None:
            self._apart_since = time.monotonic()
        for client in clients:
            join = wire.Join(
                group=self._name,
                epoch=self._epoch,
                place=place.of(client.rank),
                # Half of it: who waits for a stuck one comes back before it seems stuck itself.
                timeout=self._message.config.step_deadline / 2,
                heard=self._given,
            )
            client.remote.tell(join)
        log.info("%s begins, with %d ranks", epoch, self.size)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, work)
        timer.daemon = True
        timer.start()


class RankClient(LaunchedEngine):
    """One rank: an engine of its own, which computes in its group."""

    def __init__(
        self,
        group: RankGroup,
        rank: int,
        message: wire.Launch,
        lost: Lost,
        planned: Callable[[wire.Planned], None],
        process: WatchedProcess,
    ) -> None:
        self.rank = rank
        self.gone = False
        self._group = group
        super().__init__(message, lost, planned, process)
        self.remote.heard = partial(group.hear, self)

    def submit(self, request: EngineRequest) -> None:
        self._group.submit(self.rank, self.remote, request)

    def stats(self) -> EngineStats:
        stats = super().stats()
        return replace(stats, ready=stats.ready and self._group.formed)

    def close(self, timeout: float) -> None:
        self._group.lose(self)
        super().close(timeout)

    def _trouble(self) -> str | None:
        seconds = self._group.absent_for(self)
        if seconds > _JOIN_SECONDS:
            return f"it did not join the other ranks for {seconds:.0f} s"
        return super()._trouble()

    def _died(self, process: WatchedProcess) -> None:
        self._group.lose(self)
        super()._died(process)


def _spec(rows: wire.Rows | None) -> ExchangeSpec:
    assert rows is not None, "a rank says what it exchanges"
    return ExchangeSpec(rows.size, rows.tokens, rows.hidden, rows.top_k, getattr(torch, rows.dtype))
