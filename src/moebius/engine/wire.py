"""Frames: how what crosses between a front and an engine looks when they are two processes.

A frame is one byte, the version, and one message in MessagePack, typed on both sides: what does not
decode into the very record is refused with a WireError, and nothing is ever unpickled. How frames
are told apart in a stream is the transport's. Times are seconds on the monotonic clock, which the
processes of one machine share; a frame to another machine says when it was `sent` by its sender's
clock, and who receives it moves its times (engine/clocks.py).

An error crosses as its class's code, its text and its facts (errors.py), and comes back as the same
class.

A request that came as a frame goes through `received` before an engine sees it. It makes the
prefix hashes again, at some microseconds a block: an engine that took a wrong hash for good would
let one tenant read what another has said.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TypeVar, get_type_hints

import msgspec
from msgspec import Struct

from moebius.engine.client import EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.config import EngineConfig
from moebius.errors import ERRORS_BY_CODE, Fact, MoebiusError, WireError
from moebius.request.engine_request import EngineRequest
from moebius.request.hashes import BlockHasher
from moebius.request.params import ServingLimits

VERSION = 8
"""Another one whenever a record that crosses gets or loses a field, or a field changes its type:
else a process of another release would take one thing for another (tests/engine/test_wire.py)."""
HEARTBEAT_SECONDS = 0.25
"""An engine's process is heard of this often, whatever it does."""
SEND_SECONDS = 30.0
"""What the other end gets to take a frame."""

Held = dict[int, tuple[tuple[int, ...], ...]]
"""By a layer's number, the experts that each rank holds of it."""


class _Record(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Launch(_Record, frozen=True, tag="launch"):
    """Front to engine, first of all: load this.

    directory    the model's, on the engine's own host
    prefix_key   the launch's, by which the front hashes prompts
    eos_ids      the model's end tokens
    log_level    what the engine's process logs
    rank         which of config.ranks engines it is that share the model's experts
    held         for each layer with a router, the experts that each of these holds
    neighbours   of these on its own host, itself among them: how many have not taken their memory
                 yet
    isa          the instruction set of a CPU's kernels; empty: the highest that it has
    local_rank   which of local_ranks it is, of those on its own host: these share its processors
    tokenizer    where the one is that is used instead of the model's; empty: the model's own
    """

    directory: str
    config: EngineConfig
    prefix_key: bytes
    eos_ids: frozenset[int]
    log_level: str = "info"
    rank: int = 0
    held: Held | None = None
    neighbours: int = 1
    isa: str = ""
    local_rank: int = 0
    local_ranks: int = 1
    tokenizer: str = ""


class Submit(_Record, frozen=True, tag="submit"):
    """Front to engine: compute this. number: how many requests its group has had with it."""

    request: EngineRequest
    number: int = 0
    sent: float | None = None


class Hear(_Record, frozen=True, tag="hear"):
    """Front to a rank: request `number` of its group is another rank's."""

    number: int


class Join(_Record, frozen=True, tag="join"):
    """Front to a rank: compute with the others, in this epoch of their group.

    rank      which of them it is in this epoch
    held      for each layer with a router, the experts that each of them holds, and the number of
              this placement: it is what is computed by when the epoch begins
    place     where the group's shared memory is; or tcp://ADDRESS, this rank's own, where some
              ranks are on other hosts; or file://PATH, at which ranks with a device each meet
    timeout   seconds that any wait for the others may take
    heard     how many requests the group has had
    names     of all ranks in this epoch, for a person
    near      those that are on this rank's host, where some are on others
    """

    group: str
    epoch: int
    rank: int
    held: Held
    number: int
    place: str
    timeout: float
    heard: int
    names: tuple[str, ...]
    near: tuple[int, ...] = ()


class Listening(_Record, frozen=True, tag="listening"):
    """A rank to the front, and the front to all others: where they reach it in this epoch."""

    epoch: int
    rank: int
    address: str


class GiveUp(_Record, frozen=True, tag="give_up"):
    """Front to a rank: this epoch is over, because of these ranks."""

    epoch: int
    ranks: tuple[int, ...]


class Move(_Record, frozen=True, tag="move"):
    """Front to a rank: for these layers hold what `held` says of it, beside what it holds now, and
    from the step on in which all ranks do, compute by it. It answers with Moved or Unmoved.

    A move that is not made yet is not wanted any more.
    """

    number: int
    held: Held


class Abort(_Record, frozen=True, tag="abort"):
    """Front to engine: end this request."""

    request_id: str


class ReadLoads(_Record, frozen=True, tag="read_loads"):
    """Front to engine: answer with Loads."""


class Stop(_Record, frozen=True, tag="stop"):
    """Front to engine: end what is unfinished, within so many seconds, and the process."""

    timeout: float


class Heartbeat(_Record, frozen=True, tag="heartbeat"):
    """Engine to front, several times a second until it has Stats to send: the process lives."""


class Planned(_Record, frozen=True, tag="planned"):
    """Engine to front: the model can be served, and its weights are now read.

    rows              the memory plan as a table: (what, how much, remark)
    batch_invariant   promise P1
    kernels           the name of what computes
    """

    rows: list[tuple[str, str, str]]
    batch_invariant: bool
    kernels: str


class Rows(_Record, frozen=True):
    """What the ranks of a group exchange: ExchangeSpec, as a frame can hold it; and the kind of
    device that it lies on."""

    size: int
    tokens: int
    hidden: int
    top_k: int
    dtype: str
    gathered: int = 0
    width: int = 0
    device: str = "cpu"


class Loaded(_Record, frozen=True, tag="loaded"):
    """Engine to front: it can take requests, a rank once it has joined its group."""

    info: EngineInfo
    rows: Rows | None = None


class Joined(_Record, frozen=True, tag="joined"):
    """A rank to the front: it is in this epoch of its group."""

    epoch: int


class Parted(_Record, frozen=True, tag="parted"):
    """A rank to the front: it cannot go on with the others, and waits for the next epoch.

    steps   how many it has made in this one
    """

    epoch: int
    error: MoebiusError
    steps: int


class Moved(_Record, frozen=True, tag="moved"):
    """A rank to the front: it computes by the placement of this number, as all do."""

    number: int


class Unmoved(_Record, frozen=True, tag="unmoved"):
    """A rank to the front: it cannot have the experts that this placement says."""

    number: int
    error: MoebiusError


class Failed(_Record, frozen=True, tag="failed"):
    """Engine to front, last of all: it cannot go on, or could not begin."""

    error: MoebiusError


class Outputs(_Record, frozen=True, tag="outputs"):
    """Engine to front: what one step brought."""

    outputs: list[StepOutput]
    sent: float | None = None


class Stats(_Record, frozen=True, tag="stats"):
    """Engine to front, several times a second: the process lives, and how far the engine is."""

    stats: EngineStats


class Loads(_Record, frozen=True, tag="loads"):
    """Engine to front, which asked."""

    loads: ExpertLoads


OfGroup = Joined | Parted | Listening | Moved | Unmoved
"""What a rank says of its group."""
ToMember = Hear | Join | Listening | GiveUp | Move
"""What it hears of it."""
ToEngine = Launch | Submit | ToMember | Abort | ReadLoads | Stop
FromEngine = Heartbeat | Planned | Loaded | OfGroup | Failed | Outputs | Stats | Loads


class _Error(_Record, frozen=True):
    code: str
    text: str
    facts: dict[str, Fact]


def encode(message: ToEngine | FromEngine) -> bytes:
    """The message as a frame."""
    return framed(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """What a front has sent. WireError where the frame is no such message, or another version's."""
    return unframed(frame, _TO_ENGINE)


def decode_from_engine(frame: bytes) -> FromEngine:
    """What an engine has sent. WireError, as above."""
    return unframed(frame, _FROM_ENGINE)


def received(
    request: EngineRequest, limits: ServingLimits, hasher: BlockHasher | None
) -> EngineRequest:
    """A request from another process as an engine may take it, with these limits and this hasher.

    RequestError for what the limits refuse, WireError for prefix hashes that are not its prompt's.
    Hashes of another launch's key mean nothing here, and are left out.
    """
    request.check(limits)
    given = request.prompt_hashes
    if given is None:
        return request
    if hasher is None or given.key_id != hasher.key_id:
        return replace(request, prompt_hashes=None)
    if given != hasher.of_prompt(request.prompt_ids, request.salt):
        raise WireError(f"request {request.id}: its prefix hashes are not those of its prompt")
    return request


_Decoded = TypeVar("_Decoded")


def framed(message: Struct) -> bytes:
    """A record as a frame."""
    frame = bytearray((VERSION,))
    _ENCODER.encode_into(message, frame, 1)
    return bytes(frame)


def unframed(frame: bytes, decoder: msgspec.msgpack.Decoder[_Decoded]) -> _Decoded:
    """The record in a frame. WireError where it is none of them, or of another version."""
    if not frame:
        raise WireError("a frame without a byte; it must begin with its version")
    if frame[0] != VERSION:
        raise WireError(
            f"a frame of version {frame[0]}; this process speaks version {VERSION}: front and "
            "engines must be of one release"
        )
    try:
        return decoder.decode(memoryview(frame)[1:])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"a frame that cannot be read: {error}") from error


def _to_wire(value: object) -> object:
    """What MessagePack has no word for."""
    if isinstance(value, MoebiusError):
        # A text may quote what nobody could encode.
        text = str(value).encode("utf-8", "backslashreplace").decode()
        return _Error(value.wire_code, text, value.facts)
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} does not cross between processes")


def from_wire(kind: type, value: object) -> object:
    """What a decoder of these frames makes of the one kind that MessagePack does not have."""
    assert kind is MoebiusError, f"no record holds a {kind.__name__}"
    found = msgspec.convert(value, _Error)
    made = ERRORS_BY_CODE.get(found.code)
    if made is None:
        raise WireError(f"an error of the unknown code {found.code!r}")
    types = _fact_types(found.code)
    try:
        facts = {name: msgspec.convert(fact, types[name]) for name, fact in found.facts.items()}
        return made.again(found.text, facts)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise WireError(f"an error {found.code!r} with other facts than it has") from error


@cache
def _fact_types(code: str) -> dict[str, object]:
    """By name, what the class of a code is made with beside its text."""
    return get_type_hints(ERRORS_BY_CODE[code].__init__)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(
    ToEngine, dec_hook=from_wire
)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(
    FromEngine, dec_hook=from_wire
)
