"""RemoteClient against a hand-driven process at the other end: silence, rubbish, sudden ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from engine.collector import Collector
from engine.test_client import eventually
from moebius.engine import remote, wire
from moebius.engine.client import EngineInfo, EngineStats, ExpertLoads, StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.remote import RemoteClient, launch
from moebius.errors import (
    ChannelClosedError,
    ChannelError,
    DeadlineError,
    EngineError,
    EngineLostError,
    MoebiusError,
    OverloadError,
    RequestError,
    WeightsError,
    WireError,
)
from moebius.parallel import channel as channels
from moebius.parallel.channel import Channel
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams, ServingLimits

LIMITS = ServingLimits(vocab_size=1000, max_model_len=200_000)
INFO = EngineInfo(LIMITS, frozenset({1}), 16, 640, "fp_x")
LAUNCH = wire.Launch("/a/model", EngineConfig(), bytes(32), frozenset())


class Far:
    """The process at the other end."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def say(self, *messages: wire.FromEngine) -> None:
        for message in messages:
            self.channel.send(wire.encode(message), 10)

    def hears(self, timeout: float = 10) -> wire.ToEngine:
        return wire.decode_to_engine(self.channel.receive(timeout))

    def hears_nothing(self) -> None:
        with pytest.raises(DeadlineError):
            self.hears(0.05)


class Near(Collector):
    """A client, with what it delivered and why it ended, on a clock that a test sets."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.now = 100.0
        self.causes: list[EngineError] = []
        self.client = RemoteClient(
            channel, INFO, silence=3.0, ended=self.causes.append, clock=lambda: self.now
        )

    def error(self, id: str) -> MoebiusError | None:
        self.wait(lambda: self.ended(id))
        return self.outputs[id][-1].error


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Far]]:
    ours, theirs = socket.socketpair()
    near, far = Channel(ours, "the engine"), Channel(theirs, "the front")
    yield near, Far(far)
    near.close()
    far.close()


@pytest.fixture
def both(ends: tuple[Channel, Far]) -> Iterator[tuple[Near, Far]]:
    near = Near(ends[0])
    yield near, ends[1]
    near.client.close(0)


def request(id: str, prompt: tuple[int, ...] = (1, 2, 3)) -> EngineRequest:
    return EngineRequest.create(id, prompt, SamplingParams(max_tokens=5), LIMITS, arrival=0.0)


def test_silence_is_not_ready(both: tuple[Near, Far]) -> None:
    near, far = both
    near.client.start(near)
    assert near.client.stats().ready, "it has just said that it is loaded"
    near.now += 3.5
    assert not near.client.stats().ready and near.client.silent_for == 3.5
    far.say(wire.Stats(EngineStats(running=2, ready=True)))
    eventually(lambda: near.client.stats().running == 2)
    assert near.client.stats().ready
    far.say(wire.Stats(EngineStats(running=2, ready=False)))  # a step that takes too long
    eventually(lambda: not near.client.stats().ready)
    assert near.client.silent_for == 0


def test_nothing_is_sent_before_the_start_and_all_of_it_then(both: tuple[Near, Far]) -> None:
    near, far = both
    near.client.submit(request("a"))
    near.client.abort("a")
    far.hears_nothing()
    near.client.start(near)
    assert far.hears() == wire.Submit(request("a")) and far.hears() == wire.Abort("a")
    with pytest.raises(RequestError, match="'a' is in use"):
        near.client.submit(request("a"))


def test_each_request_ends_once_whatever_the_other_end_says(both: tuple[Near, Far]) -> None:
    near, far = both
    near.client.start(near)
    near.client.submit(request("a"))
    ended = StepOutput("a", (5,), finish_reason=FinishReason.STOP)
    far.say(
        wire.Outputs([StepOutput("nobody's", (4,)), StepOutput("a", (4,)), ended]),
        wire.Outputs([ended, StepOutput("a", (6,))]),
    )
    far.channel.close()
    eventually(lambda: near.client.stopped and near.causes != [])
    assert near.outputs == {"a": [StepOutput("a", (4,)), ended]}


def closes(far: Far) -> None:
    far.channel.close()


def says_why(far: Far) -> None:
    far.say(wire.Failed(EngineError("its memory is broken", error_id="0badcafe")))


def talks_rubbish(far: Far) -> None:
    far.channel.send(bytes((wire.VERSION,)) + b"rubbish", 1)


def counts_otherwise(far: Far) -> None:
    far.say(wire.Stats(EngineStats(step_tokens=(1, 2))))


def hangs_up_midway(far: Far) -> None:
    far.channel._sock.send(b"\0\0\0\x09half")
    far.channel.close()


@pytest.mark.parametrize(
    ("happens", "kind", "why"),
    [
        (closes, EngineError, "process is gone"),
        (says_why, EngineError, "its memory is broken"),
        (talks_rubbish, WireError, "cannot be read"),
        (counts_otherwise, WireError, "2 counts of steps"),
        (hangs_up_midway, ChannelError, "in the middle of a frame"),
    ],
)
def test_a_broken_connection_ends_what_is_unfinished(
    both: tuple[Near, Far], happens: Callable[[Far], None], kind: type[EngineError], why: str
) -> None:
    near, far = both
    near.client.start(near)
    for id in ("a", "b"):
        near.client.submit(request(id))
        assert isinstance(far.hears(), wire.Submit)
    happens(far)
    for id in ("a", "b"):
        error = near.error(id)
        assert type(error) is EngineLostError and why in str(error)
    eventually(lambda: len(near.causes) == 1)
    assert type(near.causes[0]) is kind
    assert not near.client.stats().ready
    with pytest.raises(EngineError, match="has stopped"):
        near.client.submit(request("c"))
    near.client.abort("a")
    assert near.client.expert_loads() == ExpertLoads()
    with pytest.raises(ChannelClosedError):
        far.hears()
    assert len(near.outputs["a"]) == 1 and len(near.causes) == 1


def test_a_process_that_takes_nothing_makes_nobody_wait(
    both: tuple[Near, Far], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not take is sent when it does; what is too much is refused, by an output."""
    monkeypatch.setattr(channels, "MOST_UNSENT", 8_000_000)
    near, far = both
    near.client.start(near)
    prompt = tuple(range(200, 1000)) * 200  # three bytes a token
    count = 0
    while not near.outputs:
        near.client.submit(request(str(count), prompt))
        count += 1
    refused = near.error(str(count - 1))
    assert isinstance(refused, OverloadError) and "takes nothing" in str(refused)
    for i in range(count - 1):
        message = far.hears()
        assert isinstance(message, wire.Submit) and message.request.id == str(i)
    near.client.submit(request(str(count - 1)))  # the id is free again
    assert isinstance(far.hears(), wire.Submit)


def test_a_request_that_no_frame_can_hold_ends(
    both: tuple[Near, Far], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an output, as all that `submit` has taken."""
    monkeypatch.setattr(channels, "MOST_FRAME", 10_000)
    near, far = both
    near.client.start(near)
    near.client.submit(request("large", tuple(range(1, 1000)) * 10))
    error = near.error("large")
    assert isinstance(error, WireError) and "10000 are the most" in str(error)
    near.client.submit(request("large"))  # the id is free again, and the connection whole
    assert isinstance(far.hears(), wire.Submit)


def test_loads_are_asked_for_once_a_second_for_all(
    both: tuple[Near, Far], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = both
    near.client.start(near)
    found: list[ExpertLoads] = []
    threads = [
        threading.Thread(target=lambda: found.append(near.client.expert_loads())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert far.hears() == wire.ReadLoads()
    far.say(wire.Loads(ExpertLoads(7)))
    for thread in threads:
        thread.join(20)
    far.hears_nothing()
    assert found == [ExpertLoads(7)] * 3
    monkeypatch.setattr(remote, "_LOADS_SECONDS", 0.05)
    assert near.client.expert_loads() == ExpertLoads(7), "without an answer, the last one"
    assert far.hears() == wire.ReadLoads()


def test_closing_asks_it_to_stop_and_waits_no_longer_than_told(ends: tuple[Channel, Far]) -> None:
    near, far = Near(ends[0]), ends[1]
    near.client.start(near)
    near.client.submit(request("a"))
    assert isinstance(far.hears(), wire.Submit)
    near.client.close(0.05)
    assert far.hears() == wire.Stop(0.05)
    assert isinstance(near.error("a"), EngineError)
    with pytest.raises(ChannelClosedError):
        far.hears()


def test_a_launch_tells_the_plan_and_then_that_it_is_loaded(ends: tuple[Channel, Far]) -> None:
    near, far = ends
    planned = wire.Planned([("weights", "1 B", "")], True, "cpu-avx2")
    far.say(wire.Heartbeat(), planned, wire.Heartbeat(), wire.Loaded(INFO))
    heard: list[Any] = []
    assert launch(near, LAUNCH, heard.append) == wire.Loaded(INFO)
    assert heard == [planned] and far.hears() == LAUNCH


@pytest.mark.parametrize(
    ("said", "kind", "why"),
    [
        (wire.Failed(WeightsError("a.safetensors is short")), WeightsError, "a.safetensors is"),
        (wire.Stats(EngineStats()), WireError, "sent Stats while it loaded"),
        (None, ChannelClosedError, "closed the connection"),
        ("nothing", EngineError, "is stuck: nothing came from the engine within 0.05 s"),
    ],
)
def test_a_launch_that_fails_says_why(
    ends: tuple[Channel, Far],
    monkeypatch: pytest.MonkeyPatch,
    said: Any,
    kind: type[MoebiusError],
    why: str,
) -> None:
    monkeypatch.setattr(remote, "_LOADING_SILENCE_SECONDS", 0.05)
    near, far = ends
    far.say(wire.Heartbeat())
    if said is None:
        far.channel.close()
    elif said != "nothing":
        far.say(said)
    with pytest.raises(kind, match=why) as error:
        launch(near, LAUNCH, lambda planned: None)
    assert type(error.value) is kind


def test_stats_that_came_keep_their_other_figures(both: tuple[Near, Far]) -> None:
    near, far = both
    told = EngineStats(running=3, waiting=2, steps=9, last_step=5.0, now=6.0, ready=True)
    far.say(wire.Stats(told))
    eventually(lambda: near.client.stats() == replace(told, ready=False))
    near.client.start(near)
    assert near.client.stats() == told
