"""EngineClient of an engine in another process, over a channel."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from moebius.engine import wire
from moebius.engine.client import Deliver, EngineInfo, EngineStats, ExpertLoads
from moebius.engine.clocks import move_outputs, move_stats
from moebius.engine.deliveries import Deliveries
from moebius.engine.faults import failed, failure, lost
from moebius.errors import (
    ChannelClosedError,
    ChannelError,
    DeadlineError,
    EngineError,
    MoebiusError,
    OverloadError,
    WireError,
)
from moebius.parallel.channel import Channel
from moebius.request.engine_request import EngineRequest

log = logging.getLogger(__name__)

SILENCE_SECONDS = 2.5
"""Without a heartbeat for so long, ten of them missed, an engine is not ready."""
_LOADING_SILENCE_SECONDS = 120.0
_LOADS_SECONDS = 1.0


def launch(
    channel: Channel, message: wire.Launch, planned: Callable[[wire.Planned], None]
) -> wire.Loaded:
    """Have the process at the other end load a model; return when it can take requests.

    planned is called once the model was checked, before its weights are read. Raises the error that
    the process ends with, ChannelError where it just ends, EngineError where it falls silent.
    """
    with suppress(ChannelError):  # a process that is gone may have said why
        channel.send(wire.encode(message), wire.SEND_SECONDS)
    while True:
        try:
            frame = channel.receive(_LOADING_SILENCE_SECONDS)
        except DeadlineError as error:
            raise EngineError(f"the engine's process is stuck: {error}") from error
        match wire.decode_from_engine(frame):
            case wire.Heartbeat():
                continue
            case wire.Planned() as plan:
                planned(plan)
            case wire.Loaded() as loaded:
                return loaded
            case wire.Failed(cause):
                raise cause
            case other:
                raise WireError(f"the engine's process sent {type(other).__name__} while it loaded")


class RemoteClient:
    """The engine that `launch` has had loaded at the other end of a channel.

    What it says is read on a thread of its own, which also delivers outputs. Nothing is waited for
    in `submit` and `abort`: what the socket does not take is sent on another thread. Once the
    connection is broken, or the engine says that it failed, every unfinished request ends with
    EngineError.

    silence   seconds without a heartbeat after which it is not ready
    ended     called on the reading thread when nothing more will come, with the cause
    far       the engine is on another host, whose clock is not ours
    """

    def __init__(
        self,
        channel: Channel,
        info: EngineInfo,
        *,
        silence: float = SILENCE_SECONDS,
        ended: Callable[[EngineError], None] = lambda cause: None,
        clock: Callable[[], float] = time.monotonic,
        far: bool = False,
    ) -> None:
        self._far = far
        self._channel = channel
        self._info = info
        self._silence = silence
        self._ended = ended
        self._clock = clock
        self._deliveries = Deliveries(self.abort)
        self.heard: Callable[[wire.OfGroup], None] = lambda message: None
        """Called, on the reading thread, with what a rank says of its group."""
        self._early: list[bytes] | None = []
        self._last_heard = clock()
        # What it says by itself in a moment.
        self._stats = EngineStats(total_blocks=info.num_blocks, now=self._last_heard, ready=True)
        self._loads = _Loads()
        self._unsent = threading.Event()
        self._done = threading.Event()
        for work, name in ((self._read, "engine reader"), (self._flush, "engine writer")):
            threading.Thread(target=work, name=name, daemon=True).start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def silent_for(self) -> float:
        """Seconds since the engine's process was last heard of."""
        return self._clock() - self._last_heard

    @property
    def stopped(self) -> bool:
        """It was closed, or the connection is broken: nothing more will come."""
        return self._deliveries.stopped

    def start(self, deliver: Deliver) -> None:
        self._deliveries.start(deliver, self._begin)

    def submit(self, request: EngineRequest, number: int = 0) -> None:
        """As in EngineClient; an output says OverloadError where the engine's process takes nothing
        any more, and much waits for it already, and WireError where the request is too large for a
        frame. number: see wire.Submit."""
        sent = self._clock() if self._far else None
        frame = wire.encode(wire.Submit(request, number, sent))
        try:
            self._deliveries.take(request.id, lambda: self._in_order(frame))
        except (OverloadError, WireError) as error:
            self._deliveries.refuse(failed(request.id, error))
        except ChannelError as error:
            raise EngineError(str(error)) from error

    def tell(self, message: wire.ToEngine) -> None:
        """Send what is neither a request nor an abort, without waiting."""
        with suppress(ChannelError, OverloadError):
            self._deliveries.while_running(lambda: self._post(wire.encode(message)))

    def abort(self, request_id: str) -> None:
        with suppress(ChannelError, OverloadError):  # it ends, or is ended, for that
            frame = wire.encode(wire.Abort(request_id))
            self._deliveries.while_running(lambda: self._in_order(frame))

    def advance(self, wanted: Callable[[], bool]) -> bool:
        """Nothing: the engine makes its steps itself."""
        return False

    def stats(self) -> EngineStats:
        """The last ones that were heard, at most a heartbeat old; not ready in silence."""
        heard = self.silent_for <= self._silence
        started = self._early is None and not self.stopped
        return replace(self._stats, ready=self._stats.ready and started and heard)

    def expert_loads(self) -> ExpertLoads:
        """Those of this second. It asks for them, and waits for a second at most; without an answer
        they are the last that were heard."""
        return self._loads.read(lambda: self._post(wire.encode(wire.ReadLoads())))

    def close(self, timeout: float) -> None:
        """Stop the engine and end its process. Where that takes longer than `timeout` seconds, what
        is unfinished ends without it."""
        deadline = self._clock() + timeout
        self._deliveries.stop()
        with suppress(MoebiusError):
            self._channel.send(wire.encode(wire.Stop(timeout)), timeout)
        if not self._done.wait(max(0.0, deadline - self._clock())):
            log.error("the engine did not stop within %.1f s", timeout)
            self._channel.close()
            self._deliveries.end_all()

    def _begin(self) -> None:
        early = self._early or []
        self._early = None
        for frame in early:
            self._post(frame)

    def _in_order(self, frame: bytes) -> None:
        """Post it, or keep it until the start: nobody would hear of outputs before."""
        if self._early is None:
            self._post(frame)
        else:
            self._early.append(frame)

    def _post(self, frame: bytes) -> None:
        """Send without waiting."""
        if not self._channel.post(frame):
            self._unsent.set()

    def _flush(self) -> None:
        """Send what the socket has not taken at once."""
        while True:
            self._unsent.wait()
            self._unsent.clear()
            try:
                self._channel.flush(wire.SEND_SECONDS)
            except ChannelError:
                return  # the reading thread hears of it

    def _read(self) -> None:
        """Take what the engine says until nothing more can come, and end what is unfinished."""
        cause = EngineError("the engine's process is gone")
        try:
            self._hear_all()
        except ChannelClosedError:
            pass
        except EngineError as error:
            cause = error
        except Exception as error:
            cause = failure("reading what the engine says", error)
        finally:
            self._deliveries.stop(lost(cause))
            self._channel.close()
            self._unsent.set()
            self._deliveries.end_all()
            self._loads.end()
            self._done.set()
            self._ended(cause)

    def _hear_all(self) -> None:
        """Take frame after frame. Raises what ends that: the engine's own last words among it."""
        while True:
            try:
                frame = self._channel.receive(self._silence)
            except DeadlineError:
                continue
            message = wire.decode_from_engine(frame)
            self._last_heard = self._clock()
            match message:
                case wire.Outputs(outputs, sent):
                    if sent is not None:
                        outputs = move_outputs(outputs, self._last_heard - sent)
                    self._deliveries.send(outputs)
                case wire.Stats(stats):
                    self._take_stats(stats)
                case wire.Loads(loads):
                    self._loads.heard(loads)
                case wire.Failed(error):
                    raise error if isinstance(error, EngineError) else EngineError(str(error))
                case (
                    wire.Joined() | wire.Parted() | wire.Listening() | wire.Moved() | wire.Unmoved()
                ):
                    self.heard(message)
                case wire.Heartbeat() | wire.Planned() | wire.Loaded():
                    pass

    def _take_stats(self, stats: EngineStats) -> None:
        found = len(stats.step_tokens)
        if found != len(self._stats.step_tokens):  # nobody could add them to another engine's
            raise WireError(f"statistics with {found} counts of steps by their size")
        self._stats = move_stats(stats, self._last_heard) if self._far else stats


class _Loads:
    """Expert loads that are asked for, once for all who ask within a second."""

    def __init__(self) -> None:
        self._loads = ExpertLoads()
        self._asked = -_LOADS_SECONDS
        self._ended = False
        self._waiting = False
        self._changed = threading.Condition()

    def read(self, ask: Callable[[], None]) -> ExpertLoads:
        with self._changed:
            if not self._ended and time.monotonic() - self._asked >= _LOADS_SECONDS:
                self._asked = time.monotonic()
                self._waiting = True
                with suppress(MoebiusError):
                    ask()
            self._changed.wait_for(lambda: not self._waiting or self._ended, _LOADS_SECONDS)
            self._waiting = False
            return self._loads

    def heard(self, loads: ExpertLoads) -> None:
        with self._changed:
            self._loads = loads
            self._waiting = False
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
