from __future__ import annotations

import pytest

from moebius.errors import OverloadError
from moebius.schedule.request import Request
from moebius.schedule.waiting import WaitingQueue
from schedule.making import make_request


def test_order_and_token_count():
    queue = WaitingQueue(10, 1000)
    requests = [
        make_request(name, [1] * n, arrival=a)
        for name, n, a in (("c", 3, 3.0), ("a", 1, 1.0), ("b", 2, 2.0))
    ]
    for request in requests:
        queue.push(request)
    assert [r.id for r in queue] == ["a", "b", "c"] and queue.backlog.num_tokens == 6
    queue.remove(requests[2])
    assert [r.id for r in queue] == ["a", "c"] and queue.backlog.num_tokens == 4


def test_a_full_queue_refuses():
    queue = WaitingQueue(1, 1000)
    queue.push(make_request("a", [1]))
    with pytest.raises(OverloadError, match="1 of 1 requests and 1 of 1000 tokens wait"):
        queue.check_room(make_request("b", [1]))


def burst(
    queue: WaitingQueue, count: int, now: float, size: int = 1, first: int = 0
) -> list[Request]:
    requests = [make_request(f"r{now}-{first + i}", [1] * size, arrival=now) for i in range(count)]
    for request in requests:
        queue.push(request)
    return requests


def told(queue: WaitingQueue, size: int = 1) -> float:
    with pytest.raises(OverloadError) as refusal:
        queue.check_room(make_request("one more", [1] * size))
    return refusal.value.retry_after


@pytest.mark.parametrize("idle", [0.0, 30.0, 3600.0])
def test_an_idle_hour_says_nothing_of_how_fast_a_queue_drains(idle: float):
    """The engine makes no step while there is no work: the time between the last step and the next
    request."""
    queue = WaitingQueue(100, 10**6)
    (alone,) = burst(queue, 1, 0.0)
    queue.backlog.observe(0.01)
    queue.remove(alone)
    now = idle + 1.0
    waiting = burst(queue, 100, now)
    for step in range(1, 21):  # a step takes half a second, and five start in it
        queue.backlog.observe(now + step / 2)
        for request in waiting[:5]:
            queue.remove(request)
        waiting = [*waiting[5:], *burst(queue, 5, now + step / 2, first=5 * step)]
    for excess in (1, 40):
        burst(queue, excess - 1, now + 10.0, first=1000)
        assert told(queue) == pytest.approx(max(1.0, excess / 10), rel=0.15)


def test_tokens_are_told_by_tokens():
    """Room for 300 more tokens, of requests of 100 that leave one a second, is there in three
    seconds."""
    queue = WaitingQueue(1000, 1000)
    waiting = burst(queue, 10, 0.0, size=100)
    for second in range(1, 31):
        queue.backlog.observe(float(second))
        queue.remove(waiting.pop(0))
        waiting += burst(queue, 1, float(second), size=100)
    for size in (100, 300, 1000):
        assert told(queue, size) == pytest.approx(size / 100, rel=0.1)


def test_who_waits_as_told_finds_room():
    """Whatever the rate: after the time that it was told, at the same pace, a request is taken."""
    for pace in (0.2, 1.0, 7.0, 50.0):
        queue = WaitingQueue(50, 10**6)
        waiting = burst(queue, 50, 0.0)
        step, now = 1.0 / pace, 0.0
        for _ in range(40):
            now += step
            queue.backlog.observe(now)
            queue.remove(waiting.pop(0))
            waiting += burst(queue, 1, now)
        seconds, until = told(queue), now
        assert seconds == pytest.approx(min(60.0, max(1.0, step)), rel=0.15)
        while waiting and now < until + 1.2 * seconds:
            now += step
            queue.backlog.observe(now)
            queue.remove(waiting.pop(0))
        queue.check_room(make_request("again", [1]))
