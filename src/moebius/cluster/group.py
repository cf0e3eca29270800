"""Ranks that share a model's experts: their processes, and the epochs in which they compute.

An epoch is a membership, with a place of its own to trade rows at. When a rank is lost, its epoch
is over for all of them at once; the others keep process, cache and weights. Where they have every
expert between them, they go on in an epoch of their own; else they wait with what they have. When
the lost rank is loaded again, all join the next epoch.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from msgspec import structs

from moebius.cluster.alike import check_engines_alike
from moebius.cluster.hosts import EpochPlace, Hosts, OneHost
from moebius.cluster.launched import LaunchedEngine
from moebius.cluster.places import Balancer, Journey, Places, pairs_of
from moebius.engine import wire
from moebius.engine.client import (
    EngineInfo,
    EngineStats,
    ExpertLoads,
    ExpertSpread,
    LayerSpread,
    RankSpread,
)
from moebius.engine.faults import say
from moebius.engine.placing import near_nodes, start_placement
from moebius.engine.remote import RemoteClient
from moebius.engine.supervisor import WatchedProcess
from moebius.errors import (
    ConfigError,
    EngineError,
    MoebiusError,
    PeerError,
    UsageError,
    WireError,
)
from moebius.front.fleet import Lost
from moebius.front.sums import add_loads
from moebius.moe.placement import LayerPlacement, Placement
from moebius.parallel.exchange import DTYPES, Epoch, ExchangeSpec
from moebius.parallel.traffic import Traffic
from moebius.request.engine_request import EngineRequest

log = logging.getLogger(__name__)

_JOIN_SECONDS = 30.0
_PAUSE_SECONDS = 0.2
_AWAY_SECONDS = 1.0
_MOST_VAIN_EPOCHS = 5
"""Epochs in a row in which no step was made, before a rank is started again instead."""


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
        self._members: list[int] = []
        self._joined: set[int] = set()
        # Since when all ranks are there, and not all in one epoch.
        self._apart_since: float | None = None
        # What engines that are gone have exchanged, by their rank.
        self._past = [Traffic()] * message.config.ranks
        # Epochs in a row that ended without a step; and whether one was made in this one.
        self._vain_epochs = 0
        self._stepped = False
        self._may_have_stepped = False
        self._given = 0
        self._closing = False
        config = message.config
        directory = Path(message.directory)
        nodes = near_nodes(directory, self._hosts.nodes)
        first = start_placement(directory, config, nodes)
        self.places = Places(first)
        # What the present one is compared with.
        self._linear = Placement.linear(first.experts, self.size, config.spare_experts, nodes)
        self._balancer: Balancer | None = None
        if config.expert_placement == "balanced":
            self._balancer = Balancer(
                self._measured, self.places, self._move, spare=config.spare_experts, nodes=nodes
            )
            self._balancer.start()

    @property
    def size(self) -> int:
        return len(self._clients)

    def start(self, rank: int) -> WatchedProcess:
        """A process for a rank. Its host may have to come back first, and takes its time where the
        others serve without it. EngineError where none can be had."""
        while True:
            try:
                return self._hosts.start(rank)
            except EngineError as error:
                if self._closing or not self.formed:
                    raise
                say(log.warning, "rank %d is waited for: %s", rank, error)
                time.sleep(_AWAY_SECONDS)

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
            with self._lock:
                self._info = self._info or client.info
                check_engines_alike(self._info, client.info, self._hosts.name(rank))
                if not client.gone:
                    self._clients[rank] = client
                    self._form()
        except BaseException:
            client.close(0.0)
            raise
        return client

    def close(self) -> None:
        """End the epoch and form none any more: the ranks are about to be ended."""
        with self._lock:
            self._closing = True
            self._give_up(self._members)
        if self._balancer is not None:
            self._balancer.stop()

    def _launch_of(self, rank: int) -> wire.Launch:
        with self._lock:
            loaded = [other for other, client in enumerate(self._clients) if client is not None]
        message = self._hosts.launch(self._message, rank, loaded)
        return structs.replace(message, held=self.places.now.held)

    @property
    def formed(self) -> bool:
        """Whether its ranks compute: all members of the present epoch have joined it."""
        return self._place is not None and len(self._joined) == len(self._members)

    def stepped(self) -> bool:
        """Whether its ranks may have made a step since this was last asked."""
        found = self._may_have_stepped
        self._may_have_stepped = False
        return found

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
            if self._clients[client.rank] is not client:
                return
            match message:
                case wire.Joined(epoch) if epoch == self._epoch:
                    self._joined.add(client.rank)
                    if self.formed:
                        self._apart_since = None
                        self._may_have_stepped = True
                case wire.Parted(epoch, error, steps) if epoch == self._epoch:
                    say(log.warning, "%s: %s", self._hosts.name(client.rank), error)
                    self._part(client.rank, error, steps)
                case wire.Listening(epoch) if epoch == self._epoch and self._place is not None:
                    self._place.carry(message, self._members.index(client.rank))
                case wire.Moved(number):
                    self.places.moved(number, client.rank)
                case wire.Unmoved(number, error):
                    say(log.error, "rank %d keeps its experts: %s", client.rank, error)
                    instead = self.places.unmoved(number)
                    if instead is not None:
                        self._tell_all(instead)
                case _:
                    pass  # of an epoch that is over

    def spread(self) -> ExpertSpread:
        """How the ranks share the experts, and what that costs them."""
        clients = [client for client in self._clients if client is not None]
        loads = pairs_of(add_loads([client.expert_loads() for client in clients]))
        with self._lock:
            present = [client for client in self._clients if client is not None]
            now_of = {client.rank: client.stats().traffic for client in present}
            now = self.places.now
            imbalance = now.imbalance(loads)
            linear = self._linear.imbalance(loads)
            return ExpertSpread(
                self._epoch,
                self.places.moves,
                tuple(
                    RankSpread(rank, rank in self._joined, past + now_of.get(rank, Traffic()))
                    for rank, past in enumerate(self._past)
                ),
                tuple(
                    LayerSpread(layer, each.held, imbalance.get(layer, 1.0), linear.get(layer, 1.0))
                    for layer, each in now.layers.items()
                ),
            )

    def _measured(self) -> ExpertLoads | None:
        """The loads of all ranks, while all compute."""
        clients = [client for client in self._clients if client is not None]
        if not self.formed or len(clients) < self.size:
            return None
        return add_loads([client.expert_loads() for client in clients])

    def _move(self, layers: Mapping[int, LayerPlacement]) -> Journey | None:
        with self._lock:
            if not self.formed or len(self._members) < self.size:
                return None
            told, journey = self.places.begin(layers)
            self._tell_all(told)
            return journey

    def _tell_all(self, message: wire.ToEngine) -> None:
        for client in self._clients:
            if client is not None:
                client.remote.tell(message)

    def lose(self, client: "RankClient") -> None:
        """A rank's process is gone: nobody shall wait for it."""
        with self._lock:
            client.gone = True
            if self._clients[client.rank] is client:
                self._clients[client.rank] = None
                self._apart_since = None
                self._vain_epochs = 0
                self._past[client.rank] += client.stats().traffic
                self._give_up((client.rank,))
                self._form_or_end()

    def absent_for(self, client: "RankClient") -> float:
        """Seconds that the others, which are all there, have waited for this rank to join them."""
        with self._lock:
            if self._apart_since is None or client.rank in self._joined:
                return 0.0
            return time.monotonic() - self._apart_since

    def _give_up(self, ranks: Sequence[int]) -> None:
        """This epoch is over: whoever waits in it for these ranks waits no longer."""
        if self._place is not None:
            numbers = [self._members.index(rank) for rank in ranks if rank in self._members]
            self._place.give_up(numbers or list(range(len(self._members))))
            self._place = None
            self._joined = set()

    def _part(self, rank: int, error: MoebiusError, steps: int) -> None:
        """A rank cannot go on: the epoch is over for all, and another one begins after a while."""
        self._stepped = self._stepped or steps > 0
        lost = [rank]
        if isinstance(error, PeerError) and error.ranks:
            lost = [each for n, each in enumerate(self._members) if n in error.ranks]
        again = self._place is not None
        self._give_up(lost)
        if again:  # the first that says so
            pause = _PAUSE_SECONDS * 2**self._vain_epochs
            self._later(pause, partial(self._form_again, self._epoch, lost, error))

    def _form_again(self, epoch: int, lost: Sequence[int], error: MoebiusError) -> None:
        with self._lock:
            if self._epoch != epoch or self._closing:
                return
            self._vain_epochs = 0 if self._stepped else self._vain_epochs + 1
            if self._vain_epochs < _MOST_VAIN_EPOCHS:
                self._form_or_end()
                return
            self._end_one(lost, f"no step was made in {_MOST_VAIN_EPOCHS} epochs: {error}")

    def _form_or_end(self) -> None:
        """Begin the next epoch; where that cannot be, end a rank: its successor tries once more."""
        try:
            self._form()
        except (MoebiusError, OSError) as error:
            self._end_one((), f"epoch {self._epoch} cannot begin: {error}")

    def _end_one(self, ranks: Sequence[int], why: str) -> None:
        """End the first of these ranks, or of all: ranks are started anew as often as the fleet
        allows it, which so bounds what would else be tried for ever."""
        say(log.error, "%s", why)
        clients = [client for client in self._clients if client is not None]
        named = [client for client in clients if client.rank in ranks]
        for client in (named or clients)[:1]:
            client.end(PeerError(f"it was ended: {why}", ranks=(client.rank,)))

    def _form(self) -> None:
        """Begin the next epoch, if those that are there have every expert; at first, with all."""
        clients = [client for client in self._clients if client is not None]
        if self._closing or not clients or (self._epoch == 0 and len(clients) < self.size):
            return
        members = [client.rank for client in clients]
        number = self.places.join()
        placement = self.places.among(members)
        if placement is None:
            return
        self._give_up(self._members)
        self._epoch += 1
        epoch = Epoch(self._name, self._epoch, tuple(map(self._hosts.name, members)))
        remotes = {client.rank: client.remote for client in clients}
        rows = clients[0].rows
        assert rows is not None, "a rank says what it exchanges"
        place = self._hosts.place(_spec(rows, len(members)), epoch, remotes, rows.device)
        self._place = place
        self._members = members
        self._stepped = False
        if self._apart_since is None:
            self._apart_since = time.monotonic()
        for number_here, client in enumerate(clients):
            join = wire.Join(
                group=self._name,
                epoch=self._epoch,
                rank=number_here,
                held=placement.held,
                number=number,
                place=place.of(number_here),
                # Half of it: who waits for a stuck rank comes back before it seems stuck itself.
                timeout=self._message.config.step_deadline / 2,
                heard=self._given,
                names=epoch.names,
                near=place.near(number_here),
            )
            client.remote.tell(join)
        log.info("%s begins, with %d of %d ranks", epoch, len(members), self.size)

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


def _spec(rows: wire.Rows, size: int) -> ExchangeSpec:
    for dtype in DTYPES:
        if str(dtype) == f"torch.{rows.dtype}":
            return ExchangeSpec(
                size, rows.tokens, rows.hidden, rows.top_k, dtype, rows.gathered, rows.width
            )
    raise WireError(f"a rank exchanges rows of {rows.dtype!r}, of which none can be")
