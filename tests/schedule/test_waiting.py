from __future__ import annotations

import pytest

from moebius.errors import OverloadError
from moebius.schedule.waiting import DrainRate, WaitingQueue
from schedule.making import make_request


def test_order_and_token_count():
    queue = WaitingQueue(10, 1000)
    requests = [make_request(name, [1] * n, arrival=a) for name, n, a in (("c", 3, 3.0), ("a", 1, 1.0), ("b", 2, 2.0))]
    for request in requests:
        queue.push(request)
    assert [r.id for r in queue] == ["a", "b", "c"] and queue.num_tokens == 6
    queue.remove(requests[2])
    assert [r.id for r in queue] == ["a", "c"] and queue.num_tokens == 4


@pytest.mark.parametrize(
    ("left", "wanted", "seconds"),
    [
        ((10, 1000), (1, 0), 1.0),  # 0.5 s, but a second at the least
        ((10, 1000), (4, 0), 2.0),
        ((10, 1000), (4, 600), 3.0),  # the tokens take longer
        ((10, 1000), (-3, 600), 3.0),  # room for the request, not for its tokens
        ((1, 1000), (50, 0), 60.0),
        ((0, 0), (1, 0), 60.0),
    ],
)
def test_retry_after_is_excess_over_rate(left, wanted, seconds):
    rate = DrainRate()
    rate.observe(100.0, backlog=True)
    rate.observe(105.0, backlog=True)
    rate.count(*left)  # in 5 seconds
    assert rate.retry_after(*wanted) == pytest.approx(seconds)


def test_idle_time_and_clocks_that_stand_still_do_not_count():
    rate = DrainRate()
    assert rate.retry_after(1, 1) == 1.0
    rate.observe(0.0, backlog=False)
    rate.observe(1000.0, backlog=False)
    rate.observe(999.0, backlog=True)
    assert rate.retry_after(5, 5) == 1.0
    rate.observe(1003.0, backlog=True)
    rate.count(2, 20)
    assert rate.retry_after(4, 0) == pytest.approx(8.0)


def test_old_news_fades():
    rate = DrainRate()
    rate.observe(0.0, backlog=True)
    for second in range(1, 61):
        rate.observe(second, backlog=True)
        rate.count(10, 0)
    for second in range(61, 121):
        rate.observe(second, backlog=True)
        rate.count(1, 0)
    assert rate.retry_after(20, 0) == pytest.approx(20.0, rel=0.1)


def test_a_full_queue_refuses():
    queue = WaitingQueue(1, 1000)
    queue.push(make_request("a", [1]))
    with pytest.raises(OverloadError, match="1 of 1 requests and 1 of 1000 tokens wait"):
        queue.check_room(make_request("b", [1]))
