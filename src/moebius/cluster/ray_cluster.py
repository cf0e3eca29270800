"""The front's side of a Ray cluster: a connection, a placement group, and an actor a rank in it.

Ray says where ranks are, and starts an actor again that has ended, on another node where its own is
gone. What actors and front say to each other, and all that ranks trade, goes by our own frames.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from moebius.cluster.ray_actor import RankActor
from moebius.cluster.ray_authentication import check_authenticated
from moebius.engine.cluster import Dismissed, decode_to_host
from moebius.engine.faults import say
from moebius.errors import ConfigError, EngineError, MoebiusError, frames, in_one_line
from moebius.parallel.endpoint import parse_endpoint

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_CONNECT_SECONDS = 40.0
_LOOK_SECONDS = 0.5
_PAUSE_SECONDS = 2.0
_SAY_SECONDS = 3.0


def _library() -> Any:
    """Ray. ConfigError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--ray needs Ray, which cannot be imported here ({error}): pip install 'moebius[ray]'"
        ) from error
    return ray


class RayCluster:
    """A connection to the cluster that this host is a node of, or that RAY_ADDRESS names.

    Only one can be open in a process. ConfigError where there is none, where it refuses this host,
    and, unless `allow_unauthenticated`, where it refuses nobody.
    """

    def __init__(self, *, allow_unauthenticated: bool = False) -> None:
        self._ray: Any = _library()
        self._group: Any = None
        self._bundle: dict[str, float] = {}
        self._actors: list[Any] = []
        self._last_words: dict[int, str] = {}
        self._closed = threading.Event()
        _check_address()
        self._connect()
        try:
            check_authenticated(self.address, allow_unauthenticated)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """HOST:PORT of what Ray calls its GCS."""
        return str(self._ray.get_runtime_context().gcs_address)

    @property
    def own_address(self) -> str:
        """This node's, as other nodes know it."""
        return str(self._ray.util.get_node_ip_address())

    @property
    def own_name(self) -> str:
        return f"Ray node {self._ray.get_runtime_context().get_node_id()[:8]}"

    def cpus(self) -> list[int]:
        """How many each node has, in Ray's books."""
        return [int(node["Resources"].get("CPU", 0)) for node in self._nodes()]

    def place(self, ranks: int, threads: int, gpus: int, patience: float) -> None:
        """Have room set aside for each rank: a bundle of so many CPUs and GPUs. ConfigError where
        the cluster has not got that within `patience` seconds."""
        from ray.util.placement_group import placement_group

        self._bundle = {"CPU": threads}
        if gpus:
            self._bundle["GPU"] = gpus
        self._group = placement_group([self._bundle] * ranks, strategy="PACK")
        if self._group.wait(min(_SAY_SECONDS, patience)):
            return
        log.warning("waiting for %s", self._wanted)
        if not self._group.wait(max(0.0, patience - _SAY_SECONDS)):
            raise ConfigError(
                f"the Ray cluster has no room for {self._wanted} (--ranks, --threads) within "
                f"{patience:g} s (--rdzv-timeout); its nodes have {self._possessions}"
            )

    def start(
        self,
        invitations: Sequence[bytes],
        key: str,
        failed: Callable[[MoebiusError], None],
    ) -> None:
        """Make the ranks' actors, each with its invitation.

        failed: called, on a thread, with what ends an actor's work before it is dismissed.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        made = self._ray.remote(RankActor)
        for rank, invitation in enumerate(invitations):
            options = made.options(
                num_cpus=self._bundle["CPU"],
                num_gpus=self._bundle.get("GPU", 0),
                max_restarts=-1,
                max_task_retries=-1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, rank),
            )
            self._actors.append(options.remote(invitation, key))
        threading.Thread(target=self._watch, args=(failed,), name="ray actors", daemon=True).start()

    def why_absent(self, rank: int) -> str:
        """What is known of a rank's actor that is not there."""
        from ray.util.placement_group import placement_group_table

        if rank in self._last_words:
            return self._last_words[rank]
        state = ""
        with suppress(self._ray.exceptions.RayError):
            state = str(placement_group_table(self._group).get("state"))
        if state == "CREATED":
            return (
                "Ray keeps a place for it; either its node is gone, which Ray has yet to notice, "
                "or the actor's log says more"
            )
        return f"Ray finds no room for {self._wanted}; its nodes have {self._possessions}"

    def close(self) -> None:
        """Give all back to Ray: no actor is left, and no placement group."""
        from ray.util.placement_group import remove_placement_group

        if self._closed.is_set():
            return
        self._closed.set()
        if self._group is not None:
            with suppress(self._ray.exceptions.RayError):
                remove_placement_group(self._group)
        self._ray.shutdown()

    def _connect(self) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        # Ray looks for a cluster for minutes. On a thread it also leaves SIGTERM as it is: it would
        # end this process with a failure's exit status, and drain nothing.
        connecting: Future[None] = Future()
        threading.Thread(target=self._init, args=(connecting,), name="ray", daemon=True).start()
        try:
            connecting.result(_CONNECT_SECONDS)
        except TimeoutError as error:
            raise ConfigError(
                "the Ray cluster that RAY_ADDRESS names, or that this host was a node of, does not "
                f"answer within {_CONNECT_SECONDS:g} s"
            ) from error
        except (ConnectionError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            if any(_wants_token(each) for each in _causes(error)):
                raise ConfigError(
                    "the Ray cluster lets in who has its token, and this process has none or "
                    "another: give it the RAY_AUTH_MODE and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
                    "of the nodes"
                ) from error
            raise ConfigError(
                f"--ray finds no Ray cluster that this host is a node of: {_first_words(error)}; "
                "run `ray start` here, or set RAY_ADDRESS"
            ) from error

    def _init(self, done: "Future[None]") -> None:
        try:
            self._ray.init(address="auto", configure_logging=False)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    @property
    def _wanted(self) -> str:
        count = self._group.bundle_count
        each = " and ".join(_count(amount, kind) for kind, amount in self._bundle.items())
        return f"{_count(count, 'rank')} of {each}"

    @property
    def _possessions(self) -> str:
        return ", ".join(
            f"{_count(node['Resources'].get('CPU', 0), 'CPU')} at {node['NodeManagerAddress']}"
            for node in self._nodes()
        )

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _watch(self, failed: Callable[[MoebiusError], None]) -> None:
        """Hear how actors end, until this is closed."""
        waiting = {actor.outcome.remote(): rank for rank, actor in enumerate(self._actors)}
        while waiting and not self._closed.is_set():
            try:
                over, _ = self._ray.wait(list(waiting), timeout=_LOOK_SECONDS)
                for reference in over:
                    rank = waiting.pop(reference)
                    error = self._error_of(reference)
                    if error is None or self._closed.is_set():
                        continue  # the front has dismissed it
                    self._last_words[rank] = str(error)
                    say(log.error, "the actor of rank %d has ended: %s", rank, error)
                    failed(error)
                    if not isinstance(error, _DeadActorError):
                        waiting[self._again(rank)] = rank
            except Exception as error:
                if not self._closed.is_set():
                    say(log.error, "Ray does not say how actors are: %s", frames(error))
                return

    def _error_of(self, reference: Any) -> MoebiusError | None:
        """What ended an actor's work; None where the front has dismissed it."""
        try:
            told = decode_to_host(self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            return _DeadActorError(f"Ray cannot start it again: {_first_words(error)}")
        except MoebiusError as error:
            return error
        return told.error if isinstance(told, Dismissed) else None

    def _again(self, rank: int) -> Any:
        """Have Ray start an actor anew, in a while; a reference to how that one ends."""
        self._closed.wait(_PAUSE_SECONDS)
        self._ray.kill(self._actors[rank], no_restart=False)
        return self._actors[rank].outcome.remote()


class _DeadActorError(ConfigError):
    """An actor that Ray will not start again."""


def threads_each(cpus: Sequence[int], ranks: int) -> int:
    """The most CPUs that so many ranks can have, each on one node and all the same number; at
    least 1. cpus: those of each node."""
    for threads in range(max(cpus, default=1), 1, -1):
        if sum(count // threads for count in cpus) >= ranks:
            return threads
    return 1


def _check_address() -> None:
    """ConfigError where RAY_ADDRESS leads to no cluster that this host can be a node of.

    Ray would try for long, or start one of its own.
    """
    told = os.environ.get("RAY_ADDRESS", "auto")
    if told in ("", "auto"):
        return
    if "://" in told:
        raise ConfigError(
            f"RAY_ADDRESS is {told!r}, for clients from elsewhere; the front has to be on a node "
            "of the cluster: give HOST:PORT, or leave it out"
        )
    address = parse_endpoint(told, "RAY_ADDRESS")
    try:
        socket.create_connection(address, _ANSWER_SECONDS).close()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"no Ray cluster is at RAY_ADDRESS, {told}: {why}") from error


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"


def _wants_token(error: BaseException) -> bool:
    """Whether it is, or tells of, Ray's AuthenticationError."""
    return "AuthenticationError" in f"{type(error).__name__} {error}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what led to it."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _first_words(error: BaseException) -> str:
    """What a person is told of an error of Ray's, whose texts may have pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:6]).removesuffix(".")
    return in_one_line(EngineError(told)) if told else type(error).__name__
