"""An engine in a process of its own: `python -m moebius.engine.process ADDRESS [TICKET]`.

It connects to its front at ADDRESS, shows the ticket that it was started with on another host,
hears in one frame what to load, answers with Loaded or with Failed, and serves until the front
tells it to stop, or is gone. What computes is InProcessClient, on a thread; this module's thread
reads frames, another sends heartbeats.

It outlives its front by a second at most: the end of the connection is the front's end, and Linux
kills it where it is too stuck to see that. Signals that end a front in order are sent to whole
groups of processes, so they are ignored here: the front has requests to finish first.
"""

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moebius import logs
from moebius.engine import wire
from moebius.engine.client import StepOutput
from moebius.engine.clocks import move_request
from moebius.engine.cluster import RankHello, encode_hello
from moebius.engine.faults import failed, say
from moebius.engine.garbage import settle
from moebius.errors import (
    ChannelError,
    DeadlineError,
    EngineError,
    MoebiusError,
    WireError,
    frames,
    in_one_line,
    wants_traceback,
)
from moebius.parallel.channel import Channel
from moebius.parallel.endpoint import parse_endpoint
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import connect, forget
from moebius.request.engine_request import EngineRequest

if TYPE_CHECKING:
    from moebius.engine.in_process import InProcessClient
    from moebius.engine.member import Member
    from moebius.text import Tokenizer

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 30.0
_LOOK_SECONDS = 60.0
_LAST_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class Pulse:
    """Heartbeats to the front, until `end`: that the process lives, and how far its engine is."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: InProcessClient | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def watch(self, engine: "InProcessClient") -> None:
        """Send this one's statistics from now on. Where it fails, say so and hang up."""
        self._engine = engine

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        try:
            while not self._ended.wait(wire.HEARTBEAT_SECONDS):
                self._beat()
        except ChannelError:
            pass  # the front is gone, which the thread that reads sees, too
        except Exception as error:
            say(log.error, "no more heartbeats: %s", frames(error))

    def _beat(self) -> None:
        engine = self._engine
        if engine is None:
            _send(self._channel, wire.Heartbeat())
            return
        if engine.stopped and not self._ended.is_set():
            _send(self._channel, wire.Failed(EngineError("the engine has failed; see its log")))
            self._channel.close()
            self._ended.set()
            return
        _send(self._channel, wire.Stats(engine.stats()))


class Service:
    """Serves one engine to the front at the other end of a channel."""

    def __init__(
        self,
        channel: Channel,
        engine: "InProcessClient",
        prefix_key: bytes,
        member: "Member | None" = None,
        far: bool = False,
    ) -> None:
        """member   of the group of ranks that this engine is one of
        far      the front is on another host, whose clock is not ours
        """
        self._far = far
        self._channel = channel
        self._engine = engine
        self._member = member
        self._rows = None if member is None else member.rows
        self._limits = engine.info.limits
        self._hasher = engine.info.hasher(prefix_key)

    def run(self, pulse: Pulse) -> None:
        """Until the front says Stop, or is gone: ChannelError. WireError for what is no frame."""
        self._engine.start(self._deliver)
        _send(self._channel, wire.Loaded(self._engine.info, self._rows))
        pulse.watch(self._engine)
        timeout = _LAST_SECONDS
        try:
            timeout = self._read()
        finally:
            pulse.end()
            self._engine.close(timeout)

    def _read(self) -> float:
        """Do what the front says; the seconds that it gives to stop in."""
        while True:
            message = _next(self._channel)
            match message:
                case wire.Submit(request, number, sent):
                    if sent is not None:
                        request = move_request(request, time.monotonic() - sent)
                    self._submit(request)
                    self._tell_member(wire.Hear(number))
                case wire.Hear() | wire.Join() | wire.Move() | wire.Listening() | wire.GiveUp():
                    self._tell_member(message)
                case wire.Abort(request_id):
                    self._engine.abort(request_id)
                case wire.ReadLoads():
                    _send(self._channel, wire.Loads(self._engine.expert_loads()))
                case wire.Stop(timeout):
                    return timeout
                case wire.Launch():
                    raise WireError("a second launch; a process loads one model")

    def _submit(self, request: EngineRequest) -> None:
        try:
            self._engine.submit(wire.received(request, self._limits, self._hasher))
        except MoebiusError as error:
            self._deliver([failed(request.id, error)])

    def _tell_member(self, message: wire.ToMember) -> None:
        member = self._member
        if member is None:
            if not isinstance(message, wire.Hear):
                raise WireError(f"an engine that is no rank was sent {type(message).__name__}")
            return
        match message:
            case wire.Listening():
                member.hear_address(message)
                return
            case wire.GiveUp():
                member.give_up(message)
                return
            case wire.Join():
                member.expect(message)
        self._engine.between_steps(partial(member.take, message))

    def _deliver(self, outputs: list[StepOutput]) -> None:
        _send_outputs(self._channel, self._far, outputs)


def _send_outputs(channel: Channel, far: bool, outputs: list[StepOutput]) -> None:
    """Send a step's outputs. That the front is gone is for the reading thread to see."""
    with suppress(ChannelError):
        sent = time.monotonic() if far else None
        _send(channel, wire.Outputs(outputs, sent))


def _send(channel: Channel, message: wire.FromEngine) -> None:
    channel.send(wire.encode(message), wire.SEND_SECONDS)


def _next(channel: Channel) -> wire.ToEngine:
    """The front's next message, whenever that comes: a front that is gone ends the wait."""
    while True:
        try:
            return wire.decode_to_engine(channel.receive(_LOOK_SECONDS))
        except DeadlineError:
            continue


def main(argument: str, ticket: str = "") -> int:
    """Connect, load and serve; the exit status."""
    gc.set_threshold(100_000)  # as cli/main.py, and for its reason
    _live_with_the_front()
    try:
        channel = _connected(argument)
        if ticket:
            channel.send(encode_hello(RankHello(ticket)), wire.SEND_SECONDS)
    except MoebiusError as error:
        log.error("the front is not to be had: %s", error)
        return 1
    pulse = Pulse(channel)
    try:
        return _run(channel, pulse, far=bool(ticket))
    except ChannelError:  # the front is gone, or Pulse has told it why there is an end
        return 1
    except WireError as error:
        log.error("the front is not understood: %s", error)
        return _fail(channel, error)
    finally:
        pulse.end()
        channel.close()


def _run(channel: Channel, pulse: Pulse, far: bool) -> int:
    import moebius.engine.load  # noqa: F401 - for seconds, in which the front reads the tokenizer

    launch = _next(channel)
    if not isinstance(launch, wire.Launch):
        raise WireError(f"a {type(launch).__name__} came before a Launch")
    logs.to_stderr(launch.log_level)
    try:
        service = _load(channel, launch, far)
    except (ChannelError, WireError):
        raise
    except Exception as error:
        return _fail(channel, error)
    settle()
    service.run(pulse)
    return 0


def _load(channel: Channel, launch: wire.Launch, far: bool) -> Service:
    from moebius.engine.expert_share import ExpertShare
    from moebius.engine.in_process import InProcessClient
    from moebius.engine.load import exchange_spec, load_engine, prepare
    from moebius.engine.member import Member
    from moebius.engine.place import place
    from moebius.engine.rank import RankEngine
    from moebius.engine.rank_device import take_device
    from moebius.moe.placement import Placement

    if launch.isa:
        os.environ["MOEBIUS_CPU_ISA"] = launch.isa
    directory = Path(launch.directory)
    config = launch.config
    ranks = config.ranks
    here = place(launch.local_rank, launch.local_ranks, config.threads)
    here.take()
    config = replace(config, threads=here.threads)
    share = None
    if ranks > 1:
        placement = None if launch.held is None else Placement.of(launch.held)
        share = ExpertShare(launch.rank, ranks, placement, launch.neighbours, here.memory)
        take_device(launch)
    prepared = prepare(directory, config, share, ahead=True)
    planned = wire.Planned(prepared.rows(), prepared.batch_invariant, prepared.ops.name)
    _send(channel, planned)
    engine = load_engine(
        directory,
        config,
        eos_ids=launch.eos_ids,
        prefix_key=launch.prefix_key,
        prepared=prepared,
        tokenizer=partial(_tokenizer, directory, launch.tokenizer),
    )
    engine.on_moved = partial(_send_outputs, channel, far)
    member = None
    if isinstance(engine, RankEngine):
        member = Member(
            engine,
            exchange_spec(prepared),
            partial(_send, channel),
            key=ClusterKey.from_environment(),
            crowded=here.at_once < launch.local_ranks,
            device=prepared.device,
        )
    client = InProcessClient(engine, step_deadline=config.step_deadline)
    return Service(channel, client, launch.prefix_key, member, far)


def _tokenizer(directory: Path, other: str) -> "Tokenizer":
    from moebius.text import load_text

    return load_text(directory, Path(other) if other else None).tokenizer


def _fail(channel: Channel, error: Exception) -> int:
    """Tell the front why this process ends; the exit status."""
    if wants_traceback():
        traceback.print_exception(error)
    told = error if isinstance(error, MoebiusError) else EngineError(in_one_line(error))
    with suppress(ChannelError):
        _send(channel, wire.Failed(told))
    return 1


def _live_with_the_front() -> None:
    """End when the front does, and not before: see above."""
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # the supervisor has them blocked until now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _connected(text: str) -> Channel:
    """The channel to the front, at the path of a socket or at HOST:PORT."""
    if os.sep not in text:
        address = parse_endpoint(text, "the front's address")
        return connect(address, _CONNECT_SECONDS, ClusterKey.from_environment())
    path = Path(text)
    try:
        return connect(path, _CONNECT_SECONDS)
    finally:
        forget(path)


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)  # with torch loaded, taking down Python's modules takes most of a second
