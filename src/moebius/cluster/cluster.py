"""The front's view of the hosts that its ranks are on: who is there, and processes on them.

Hosts and the ranks' processes connect to one address. The first frame says which a connection is
from: a host is checked and kept, a rank's process is handed to whoever had it started.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from moebius.cluster.alike import check_alike
from moebius.engine import cluster, wire
from moebius.engine.faults import say
from moebius.engine.supervisor import CONNECT_SECONDS, WatchedProcess
from moebius.errors import (
    ChannelError,
    ConfigError,
    DeadlineError,
    EngineError,
    MoebiusError,
    WireError,
)
from moebius.parallel.channel import Channel
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener, name_of

log = logging.getLogger(__name__)

_ACCEPT_SECONDS = 0.25
_HELLO_SECONDS = 10.0
_LOOK_SECONDS = 0.25


class HostedProcess(WatchedProcess):
    """A rank's process on another host, which that host starts and kills for us."""

    far = True

    def __init__(self, host: "Host", name: str) -> None:
        super().__init__()
        self.ticket = secrets.token_hex(16)
        self._host = host
        self._name = name
        self._how = "runs"
        self._exited = threading.Event()
        self._arrived = threading.Event()
        self._channel: Channel | None = None

    @property
    def state(self) -> str:
        return f"{self._name}: {self._how}"

    def arrived(self, channel: Channel) -> None:
        """The process has connected."""
        self._channel = channel
        self._arrived.set()
        if self._exited.is_set():
            channel.close()

    def ended(self, how: str) -> None:
        """The process has ended, or its host is gone."""
        self._how = how
        self._exited.set()
        self._arrived.set()
        self._hang_up()

    def end(self) -> None:
        self._host.end(self.ticket)
        self._hang_up()  # the host may be as silent as its rank

    def _connected(self) -> Channel:
        self._arrived.wait(CONNECT_SECONDS)
        if self._channel is not None:
            return self._channel
        if self._exited.is_set():
            raise ChannelError("it ended before it connected")
        raise EngineError(f"{self._name} did not connect within {CONNECT_SECONDS} s")

    def _wait(self, timeout: float) -> bool:
        return self._exited.wait(timeout)

    def _kill(self) -> None:
        self._host.end(self.ticket)
        self._exited.wait(_LOOK_SECONDS)
        self._hang_up()
        self._host.forget(self.ticket)

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()


class Host:
    """A host that has come, until it is silent or hangs up; all its processes are gone then."""

    def __init__(
        self, hello: cluster.HostHello, channel: Channel, gone: Callable[["Host"], None]
    ) -> None:
        self.hello = hello
        self.lost = False
        self._channel = channel
        self._gone = gone
        self._lock = threading.Lock()
        self._processes: dict[str, HostedProcess] = {}
        threading.Thread(target=self._listen, name=f"host {hello.node}", daemon=True).start()

    @property
    def name(self) -> str:
        return self.hello.title

    def start(self, rank: int) -> HostedProcess:
        """Have it start a process."""
        process = HostedProcess(self, f"rank {rank} on {self.name}")
        with self._lock:
            if self.lost:
                raise EngineError(f"{self.name} is gone")
            self._processes[process.ticket] = process
        self._tell(cluster.Start(process.ticket))
        return process

    def end(self, ticket: str) -> None:
        self._tell(cluster.End(ticket))

    def forget(self, ticket: str) -> None:
        with self._lock:
            self._processes.pop(ticket, None)

    def process(self, ticket: str) -> HostedProcess | None:
        """The one that was started with this ticket."""
        with self._lock:
            return self._processes.get(ticket)

    def dismiss(self, error: MoebiusError | None) -> None:
        """It is not wanted any more."""
        with suppress(MoebiusError):
            self._channel.send(cluster.encode(cluster.Dismissed(error)), wire.SEND_SECONDS)
        self._channel.close()

    def _tell(self, message: cluster.ToHost) -> None:
        with suppress(MoebiusError):  # the thread that listens sees that it is gone
            self._channel.post(cluster.encode(message))

    def _listen(self) -> None:
        why = "it hung up"
        try:
            self._hear_all()
        except MoebiusError as error:
            why = str(error)
        with self._lock:
            self.lost = True
            left = list(self._processes.values())
            self._processes.clear()
        self._channel.close()
        self._gone(self)
        for process in left:
            process.ended(f"its host is lost: {why}")

    def _hear_all(self) -> None:
        heard = time.monotonic()
        told = 0.0
        while True:
            now = time.monotonic()
            if now - told >= cluster.BEAT_SECONDS:
                self._channel.post(cluster.encode(cluster.Beat()))
                told = now
            if now - heard > cluster.SILENCE_SECONDS:
                raise ChannelError(f"it was silent for {now - heard:.1f} s")
            try:
                frame = self._channel.receive(_LOOK_SECONDS)
            except DeadlineError:
                continue
            heard = time.monotonic()
            message = cluster.decode_from_host(frame)
            if isinstance(message, cluster.Ended):
                with self._lock:
                    process = self._processes.pop(message.ticket, None)
                if process is not None:
                    process.ended(message.how)


class Cluster:
    """All hosts but the front's own. It listens from when it is made until it is closed.

    own        what the front's host is, which the others have to be like
    patience   seconds that a host gets to come, at first or again
    """

    def __init__(self, listener: Listener, own: cluster.HostHello, patience: float) -> None:
        self._listener = listener
        self._own = own
        self._patience = patience
        self._hosts: dict[int, Host] = {}
        self._hellos: dict[int, cluster.HostHello] = {own.node: own}
        self._changed = threading.Condition()
        self._refusal: MoebiusError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="cluster", daemon=True)
        self._thread.start()

    @property
    def key(self) -> ClusterKey:
        """What all hosts and ranks hold."""
        assert self._listener.key is not None, "hosts connect over TCP"
        return self._listener.key

    def assemble(self) -> list[cluster.HostHello]:
        """What each host is, the front's first, once all are there. ConfigError where one is not
        there in time, or is not like the others."""
        nodes = range(1, self._own.nodes)
        with self._changed:
            self._changed.wait_for(
                lambda: self._refusal or all(node in self._hosts for node in nodes), self._patience
            )
            if self._refusal is not None:
                raise self._refusal
            absent = [node for node in nodes if node not in self._hosts]
            if absent:
                raise ConfigError(self._not_come(absent, name_of(self._listener.address)))
            return [self._hellos[node] for node in range(self._own.nodes)]

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        address = self._listener.address
        assert isinstance(address, tuple), "hosts come over TCP"
        return address

    def hello(self, node: int) -> cluster.HostHello:
        """What a host has last said that it is."""
        return self._hellos[node]

    def start(self, node: int, rank: int) -> HostedProcess:
        """A new process on a host, which may have to come back first. EngineError where it does
        not."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or node in self._hosts, self._patience)
            if self._closed:
                raise EngineError("the front is closing")
            host = self._hosts.get(node)
        if host is None:
            raise EngineError(self._not_back(node))
        return host.start(rank)

    def refuse(self, error: MoebiusError) -> None:
        """A host can't come, as was heard in another way: who assembles waits no longer."""
        with self._changed:
            self._refusal = self._refusal or error
            self._changed.notify_all()

    def close(self, error: MoebiusError | None = None) -> None:
        """Dismiss all hosts, with the error that they are to end with, if any."""
        with self._changed:
            self._closed = True
            hosts = list(self._hosts.values())
            self._changed.notify_all()
        self._thread.join()
        self._listener.close()
        for host in hosts:
            host.dismiss(error)

    def _accept(self) -> None:
        while not self._closed:
            try:
                channel = self._listener.accept(_ACCEPT_SECONDS)
            except DeadlineError:
                continue
            threading.Thread(target=self._greet, args=(channel,), name="greet", daemon=True).start()

    def _greet(self, channel: Channel) -> None:
        """Hear who has connected, and what for."""
        try:
            hello = cluster.decode_hello(channel.receive(_HELLO_SECONDS))
            if isinstance(hello, cluster.RankHello):
                self._take_rank(hello, channel)
            else:
                self._take_host(hello, channel)
        except ConfigError as error:
            self._refuse(channel, error)
        except WireError as error:
            self._refuse(channel, ConfigError(f"{channel.peer}: {error}"))
        except MoebiusError as error:
            log.warning("a connection was of no use: %s", error)
            channel.close()

    def _take_rank(self, hello: cluster.RankHello, channel: Channel) -> None:
        with self._changed:
            found = (host.process(hello.ticket) for host in self._hosts.values())
            process = next((each for each in found if each is not None), None)
        if process is None:
            raise ChannelError(f"{channel.peer} has a ticket that nobody waits for")
        process.arrived(channel)

    def _take_host(self, hello: cluster.HostHello, channel: Channel) -> None:
        check_alike(self._own, hello)
        with self._changed:
            self._wait_for_loss(hello.node, channel)
            if self._closed:
                raise ChannelError("a host came when the front was closing")
            other = self._hosts.get(hello.node)
            if other is not None:
                raise ConfigError(
                    f"node {hello.node} is {other.hello.name} already; {hello.name} needs another "
                    "--node-rank"
                )
            host = Host(hello, channel, self._lose)
            self._hosts[hello.node] = host
            self._hellos[hello.node] = hello
            self._changed.notify_all()
        say(log.info, "%s has come", self._name(hello))

    def _wait_for_loss(self, node: int, channel: Channel) -> None:
        """Where a host is there with this number, it may be the same one before its link was cut,
        or before it was killed: that is noticed soon. Who has come meanwhile hears of us."""
        patience = time.monotonic() + cluster.SILENCE_SECONDS + cluster.BEAT_SECONDS
        while node in self._hosts and not self._closed and time.monotonic() < patience:
            channel.post(cluster.encode(cluster.Beat()))
            self._changed.wait(cluster.BEAT_SECONDS)

    def _refuse(self, channel: Channel, error: ConfigError) -> None:
        log.error("a host was refused: %s", error)
        with suppress(MoebiusError):
            channel.send(cluster.encode(cluster.Dismissed(error)), wire.SEND_SECONDS)
        channel.close()
        self.refuse(error)

    def _not_come(self, nodes: Sequence[int], address: str) -> str:
        """That hosts did not come at first, and what would be right."""
        return (
            f"node {', '.join(map(str, nodes))} of {self._own.nodes} did not come to {address} "
            f"within {self._patience:g} s; does `moebius serve` run there, with the same "
            "--rdzv-endpoint and key?"
        )

    def _not_back(self, node: int) -> str:
        return f"node {node} has not come back within {self._patience:g} s"

    def _lose(self, host: Host) -> None:
        with self._changed:
            if self._hosts.get(host.hello.node) is host:
                del self._hosts[host.hello.node]
                self._changed.notify_all()
        if not self._closed:
            say(log.error, "%s is lost", self._name(host.hello))

    def _name(self, hello: cluster.HostHello) -> str:
        """A host, for a person."""
        return hello.title


def local_ranks(ranks: int, nodes: int, node: int) -> int:
    """How many of the ranks are on a host: the first ones have one more where it does not go
    evenly."""
    return ranks // nodes + (node < ranks % nodes)
