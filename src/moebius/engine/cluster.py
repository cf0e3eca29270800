"""Frames between the front of a model that is served over several hosts and those hosts.

What `moebius serve` says on a host other than the front's, and hears. It connects to the front,
says who it is, and starts processes for the front, one a rank. Each of those connects to the front
by itself, shows the ticket that it was started with, and is from then on an engine as any
(engine/wire.py). Frames look as there: a byte, the version, and a message in MessagePack.
"""

import msgspec
from msgspec import Struct

from moebius.engine import wire
from moebius.engine.config import EngineConfig
from moebius.errors import MoebiusError

BEAT_SECONDS = 0.5
"""Front and hosts hear of each other this often."""
SILENCE_SECONDS = 4.0
"""Who was not heard of for so long is gone."""


class _Record(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class HostHello(_Record, frozen=True, tag="host"):
    """A host to the front, first of all: what it is, and what it was asked to serve.

    release      of Moebius
    node         its number among `nodes`
    name         what the host calls itself
    address      where its ranks are to listen for those of others
    directory    the model's, there
    weights      the fingerprint of that model's files
    config       the engine's options as they were given there
    isas         the instruction sets that its kernels have, the lowest first
    called       what it is called beside its name; "": by its number
    tokenizer    where the one is there that is used instead of the model's; empty: its own
    vocabulary   the fingerprint of the tokenizer that is used, which grammars are followed with
    machine      what processes that can share memory with it have in common; "": not known
    """

    release: str
    node: int
    nodes: int
    name: str
    address: str
    directory: str
    weights: str
    config: EngineConfig
    isas: tuple[str, ...]
    called: str = ""
    machine: str = ""
    tokenizer: str = ""
    vocabulary: str = ""

    @property
    def title(self) -> str:
        """It, for a person."""
        return f"{self.called or f'node {self.node}'} ({self.name})"


class RankHello(_Record, frozen=True, tag="rank"):
    """A rank's process to the front, first of all: the ticket that it was started with."""

    ticket: str


class Beat(_Record, frozen=True, tag="beat"):
    """Both ways, all the time: the host, or the front, is there."""


class Ended(_Record, frozen=True, tag="ended"):
    """A host to the front: the process with this ticket has ended, or could not be started."""

    ticket: str
    how: str


class Start(_Record, frozen=True, tag="start"):
    """Front to a host: start a process with this ticket."""

    ticket: str


class End(_Record, frozen=True, tag="end"):
    """Front to a host: kill the process with this ticket."""

    ticket: str


class Dismissed(_Record, frozen=True, tag="dismissed"):
    """Front to a host, last of all: it is not wanted, or no longer; with the reason where one is
    to be told."""

    error: MoebiusError | None = None


Hello = HostHello | RankHello
FromHost = Beat | Ended
ToHost = Beat | Start | End | Dismissed

_HELLO: msgspec.msgpack.Decoder[Hello] = msgspec.msgpack.Decoder(Hello, dec_hook=wire.from_wire)
_FROM_HOST: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(
    FromHost, dec_hook=wire.from_wire
)
_TO_HOST: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost, dec_hook=wire.from_wire)


def encode_hello(message: Hello) -> bytes:
    return wire.framed(message)


def encode(message: FromHost | ToHost) -> bytes:
    return wire.framed(message)


def decode_hello(frame: bytes) -> Hello:
    """What connects says first. WireError where it is something else, or of another version."""
    return wire.unframed(frame, _HELLO)


def decode_from_host(frame: bytes) -> FromHost:
    return wire.unframed(frame, _FROM_HOST)


def decode_to_host(frame: bytes) -> ToHost:
    return wire.unframed(frame, _TO_HOST)
