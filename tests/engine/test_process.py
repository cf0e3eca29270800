"""What an engine's process does with what comes over its channel, here on a thread of this one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.clients import KEY
from engine.test_engine import ask, engine
from moebius.engine import process, wire
from moebius.engine.client import EngineStats
from moebius.engine.engine import Engine
from moebius.engine.in_process import InProcessClient
from moebius.engine.process import Pulse, Service
from moebius.errors import (
    ChannelError,
    ConfigError,
    EngineError,
    MoebiusError,
    RequestError,
    WireError,
    in_one_line,
)
from moebius.parallel.channel import Channel
from moebius.request.finish import FinishReason


class Front:
    """The other end of a served engine."""

    def __init__(self, channel: Channel, one: Engine) -> None:
        self.channel = channel
        self.engine = one
        self.ended: BaseException | None = None

    def say(self, message: wire.ToEngine) -> None:
        self.channel.send(wire.encode(message), 5)

    def hears(self, *kinds: type) -> wire.FromEngine:
        """The next message of one of these kinds."""
        while not isinstance(
            message := wire.decode_from_engine(self.channel.receive(20)), kinds or object
        ):
            pass
        return message


@contextmanager
def serving(one: Engine) -> Iterator[Front]:
    front, back = socket.socketpair()
    ours, theirs = Channel(front, "the engine"), Channel(back, "the front")
    found = Front(ours, one)

    def serve() -> None:
        pulse = Pulse(theirs)
        try:
            Service(theirs, InProcessClient(one, step_deadline=5.0), KEY).run(pulse)
        except MoebiusError as error:
            found.ended = error
        finally:
            pulse.end()
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield found
    ours.close()
    thread.join(20)
    assert not thread.is_alive()


def test_it_is_heard_of_all_the_time(tiny_model: Path) -> None:
    with serving(engine(tiny_model)) as front:
        assert isinstance(front.hears(), wire.Loaded)
        for _ in range(2):
            stats = front.hears()
            assert isinstance(stats, wire.Stats)
            assert replace(stats.stats, now=0.0, last_step=0.0) == EngineStats(
                total_blocks=front.engine.info.num_blocks,
                most_running=front.engine.scheduler.config.max_num_seqs,
                ready=True,
            )
        front.say(wire.Stop(5.0))
        with pytest.raises(ChannelError):
            while True:
                front.hears()
    assert front.ended is None


def test_a_launch_is_waited_for_as_long_as_the_front_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes are started early, and the front may wait for other hosts meanwhile."""
    monkeypatch.setattr(process, "_LOOK_SECONDS", 0.01)
    front, back = socket.socketpair()
    ours, theirs = Channel(front, "the engine"), Channel(back, "the front")
    heard: list[object] = []

    def wait() -> None:
        for _ in range(2):
            try:
                heard.append(process._next(theirs))
            except ChannelError as error:
                heard.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.1)  # many times what it looks
    assert thread.is_alive()
    ours.send(wire.encode(LAUNCH), 5)
    ours.close()
    thread.join(20)
    assert heard[0] == LAUNCH and isinstance(heard[1], ChannelError)
    theirs.close()


def test_what_the_front_asks_wrongly_is_its_requests_error(tiny_model: Path) -> None:
    with serving(engine(tiny_model)) as front:
        good = ask(front.engine, "good", [1, 2, 3], max_tokens=2)
        front.say(wire.Submit(replace(good, id="bad", prompt_ids=())))
        message = front.hears(wire.Outputs)
        assert isinstance(message, wire.Outputs)
        assert message.outputs[0].finish_reason is FinishReason.ERROR
        assert isinstance(message.outputs[0].error, RequestError)
        front.say(wire.Submit(good))
        assert isinstance(front.hears(wire.Outputs), wire.Outputs)
        front.say(wire.ReadLoads())
        assert isinstance(front.hears(wire.Loads), wire.Loads)


def test_a_front_that_is_gone_ends_it(tiny_model: Path) -> None:
    with serving(engine(tiny_model)) as front:
        front.say(wire.Submit(ask(front.engine, "long", [1, 2, 3], max_tokens=400)))
        front.hears(wire.Outputs)
        front.channel.close()
    assert isinstance(front.ended, ChannelError)
    assert front.engine.scheduler.drained


def test_an_engine_that_fails_says_so_and_hangs_up(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine(tiny_model)

    def die(now: float) -> None:
        raise RuntimeError("scheduler broke")

    monkeypatch.setattr(one.scheduler, "plan", die)
    with serving(one) as front:
        front.say(wire.Submit(ask(one, "victim", [1, 2, 3])))
        failed = front.hears(wire.Failed)
        assert isinstance(failed, wire.Failed) and isinstance(failed.error, EngineError)
        with pytest.raises(ChannelError):
            front.hears()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_frames_that_mean_nothing_end_it_with_a_typed_error(
    tiny_model: Path, frames: list[bytes], versioned: bool, launched: bool
) -> None:
    with serving(idle(tiny_model)) as front:
        if launched:
            frames = [wire.encode(LAUNCH)]
        elif versioned:
            frames = [bytes([wire.VERSION]) + frame for frame in frames]
        for frame in frames:
            try:
                front.channel.send(frame, 5)
            except ChannelError:
                break
        with pytest.raises(ChannelError):
            while True:
                front.hears()
    assert isinstance(front.ended, WireError)


LAUNCH = wire.Launch("/a/model", wire.EngineConfig(), KEY, frozenset())


def idle(directory: Path, made: dict[Path, Engine] = {}) -> Engine:  # noqa: B006 - kept on purpose
    """One engine for many examples: none of them comes to compute anything."""
    return made.setdefault(directory, engine(directory))


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("block_size is 0"),
        FileNotFoundError(2, "No such file or directory", "/a/model/config.json"),
        RuntimeError("what nobody foresaw"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_a_start_is_told_as_one_process_would(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shown in ("0", "1"):
        monkeypatch.setenv("MOEBIUS_TRACEBACK", shown)
        front, back = socket.socketpair()
        ours, theirs = Channel(front, "the engine"), Channel(back, "the front")
        assert process._fail(theirs, error) == 1
        told = wire.decode_from_engine(ours.receive(5))
        assert isinstance(told, wire.Failed) and in_one_line(told.error) == in_one_line(error)
        kind = type(error) if isinstance(error, MoebiusError) else EngineError
        assert type(told.error) is kind
        assert (type(error).__name__ in capsys.readouterr().err) is (shown == "1")
        ours.close()
        theirs.close()
