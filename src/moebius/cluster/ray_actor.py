"""The actor of one rank in a Ray cluster: what `moebius serve` does on a host, for one rank.

Ray places it, notices its end, and starts it again, here or on another node. Inside, it is a Node
(engine/node.py): it connects to the front by the cluster's key, and starts the rank's process when
the front says so. Ray carries bytes that were frames before, and a text; it would unpickle
anything that its network brings.
"""

import logging
import socket
import threading

import msgspec
from msgspec import Struct

from moebius import logs
from moebius.engine import cluster, wire
from moebius.engine.config import EngineConfig
from moebius.engine.faults import say
from moebius.engine.node import Node
from moebius.errors import (
    ConfigError,
    EngineError,
    MoebiusError,
    WireError,
    frames,
    in_one_line,
)
from moebius.parallel.endpoint import interface_address
from moebius.parallel.key import ClusterKey

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


class Invitation(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an actor is made with.

    front      where the front listens
    node       the number that it has among `nodes`: the front is 0, and each rank one more than its
               number
    model      as the operator named it
    interface  that rows travel over; None: the one that Ray uses
    patience   seconds for which the front is looked for
    file       which GGUF file of the model, where one was named
    tokenizer  the one that is used instead of the model's, as the operator named it
    """

    front: tuple[str, int]
    node: int
    nodes: int
    model: str
    config: EngineConfig
    interface: str | None
    patience: float
    log_level: str
    file: str | None = None
    tokenizer: str | None = None

    def encode(self) -> bytes:
        return wire.framed(self)


_INVITATION: msgspec.msgpack.Decoder[Invitation] = msgspec.msgpack.Decoder(
    Invitation, dec_hook=wire.from_wire
)


class RankActor:
    """Ray makes one a rank, and anew where one ends."""

    def __init__(self, invitation: bytes, key: str) -> None:
        """invitation: an Invitation's frame. key: the cluster's, as text."""
        self._ended = threading.Event()
        self._error: MoebiusError | None = None
        threading.Thread(
            target=self._run, args=(invitation, ClusterKey.from_text(key)), daemon=True
        ).start()

    def outcome(self) -> bytes:
        """Waits until it is over; a frame that says whether the front has dismissed this rank, or
        what went wrong."""
        while not self._ended.wait(_LOOK_SECONDS):
            pass  # for as long as the front is there, with which Ray ends this actor
        return cluster.encode(cluster.Dismissed(self._error))

    def _run(self, frame: bytes, key: ClusterKey) -> None:
        try:
            invitation = wire.unframed(frame, _INVITATION)
            logs.to_stderr(invitation.log_level)
            Node(hello(invitation), invitation.front, key, invitation.patience).run()
        except WireError as error:
            self._error = ConfigError(f"{_here()} has another Moebius than the front: {error}")
        except MoebiusError as error:
            self._error = error
        except Exception as error:
            say(log.error, "a rank's actor has failed: %s", frames(error))
            self._error = EngineError(f"{_here()}: {in_one_line(error)}")
        finally:
            self._ended.set()


def hello(invitation: Invitation) -> cluster.HostHello:
    """What this host is. ConfigError, which names it, where it lacks what is to be served."""
    from moebius.engine.hello import host_hello
    from moebius.models.hub import find_model

    called, address = _whereabouts()
    try:
        if invitation.interface is not None:
            address = interface_address(invitation.interface)
        model = find_model(invitation.model, invitation.file, invitation.tokenizer)
        return host_hello(
            model.path,
            invitation.config,
            node=invitation.node,
            nodes=invitation.nodes,
            address=address,
            called=called,
            tokenizer=model.tokenizer,
        )
    except MoebiusError as error:
        raise ConfigError(f"{called} ({socket.gethostname()}): {error}") from error


def _whereabouts() -> tuple[str, str]:
    """What Ray calls the node that this process is on, and that node's address."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    return f"Ray node {node[:8]}", ray.util.get_node_ip_address()


def _here() -> str:
    return f"{_whereabouts()[0]} ({socket.gethostname()})"
