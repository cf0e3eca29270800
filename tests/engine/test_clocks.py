"""Times that cross between hosts, whose clocks began at different moments."""

from __future__ import annotations

import queue
import socket
import time

import pytest

from moebius.engine import wire
from moebius.engine.client import EngineInfo, EngineStats, StepOutput
from moebius.engine.clocks import move_outputs, move_request, move_stats
from moebius.engine.remote import RemoteClient
from moebius.parallel.channel import Channel
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams, ServingLimits

LIMITS = ServingLimits(vocab_size=1000, max_model_len=500)
INFO = EngineInfo(LIMITS, frozenset(), block_size=4, num_blocks=9, fingerprint="fp")


def asked(**times: float) -> EngineRequest:
    params = SamplingParams(max_tokens=5)
    return EngineRequest.create("a", [1, 2], params, LIMITS, **{"arrival": 100.0, **times})


def test_what_is_moved_keeps_its_distances() -> None:
    assert move_request(asked(), 5.0) == asked(arrival=105.0)
    assert move_request(asked(deadline=130.0), -50.0) == asked(arrival=50.0, deadline=80.0)
    outputs = [StepOutput("a", (3,), at=10.0, scheduled=9.0), StepOutput("b", at=10.0)]
    moved = [StepOutput("a", (3,), at=7.0, scheduled=6.0), StepOutput("b", at=7.0)]
    assert move_outputs(outputs, -3.0) == moved
    shown = move_stats(EngineStats(last_step=1000.0, now=1002.5, running=3), 50.0)
    assert shown == EngineStats(last_step=47.5, now=50.0, running=3)


class Elsewhere:
    """The far end of a channel, on a host whose clock shows `ahead` seconds more."""

    def __init__(self, sock: socket.socket, ahead: float) -> None:
        self._channel = Channel(sock, "front")
        self._ahead = ahead

    @property
    def now(self) -> float:
        return time.monotonic() + self._ahead

    def answer(self) -> EngineRequest:
        """Take a request, and end it one second after its arrival."""
        submit = wire.decode_to_engine(self._channel.receive(10))
        assert isinstance(submit, wire.Submit) and submit.sent is not None
        taken = move_request(submit.request, self.now - submit.sent)
        at = taken.arrival + 1.0
        last = StepOutput("a", finish_reason=FinishReason.LENGTH, at=at, scheduled=at)
        self.say(wire.Outputs([last], self.now))
        return taken

    def say(self, message: wire.FromEngine) -> None:
        self._channel.send(wire.encode(message), 10)


@pytest.mark.parametrize("ahead", [0.0, 1e6, -1e6])
def test_a_client_tells_its_own_times_of_an_engine_elsewhere(ahead: float) -> None:
    ours, theirs = socket.socketpair()
    far = Elsewhere(theirs, ahead)
    client = RemoteClient(Channel(ours, "engine"), INFO, far=True)
    heard: queue.Queue[StepOutput] = queue.Queue()
    client.start(lambda outputs: [heard.put(each) for each in outputs])
    begun = time.monotonic()
    client.submit(asked(arrival=begun - 3.0, deadline=begun + 60.0))
    taken = far.answer()
    output = heard.get(timeout=10)
    late = time.monotonic() - begun  # that times on the way may be off by
    assert 0 <= taken.arrival - (begun + ahead - 3.0) <= late + 1e-3
    assert taken.deadline is not None
    assert taken.deadline - taken.arrival == pytest.approx(63.0, abs=1e-3)
    assert -1e-3 <= output.at - (begun - 2.0) <= 2 * late + 1e-3
    assert output.scheduled == output.at

    far.say(wire.Stats(EngineStats(last_step=far.now - 8.0, now=far.now, ready=True, running=1)))
    while client.stats().running == 0:
        time.sleep(0.01)
    stats = client.stats()
    assert stats.now - stats.last_step == pytest.approx(8.0, abs=1e-2)
    assert begun <= stats.now <= time.monotonic()
    far._channel.close()


def test_times_of_this_host_cross_as_they_are() -> None:
    ours, theirs = socket.socketpair()
    client = RemoteClient(Channel(ours, "engine"), INFO)
    client.start(lambda outputs: None)
    client.submit(asked(arrival=12.5, deadline=99.0))
    channel = Channel(theirs, "front")
    submit = wire.decode_to_engine(channel.receive(10))
    assert isinstance(submit, wire.Submit)
    assert (submit.request.arrival, submit.request.deadline, submit.sent) == (12.5, 99.0, None)
    channel.close()
