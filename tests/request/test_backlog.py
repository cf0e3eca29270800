from __future__ import annotations

import pytest

from moebius.request.backlog import Backlog, DrainRate


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


def test_an_owner_leaves_room_for_others() -> None:
    """Of 20 places one owner has 17 at most: the 18th would leave two, and 8 times 2 is less than
    18. Of what is left another one has its first in any case."""
    backlog = Backlog(20, 10**6)
    taken = 0
    while backlog.refusal("crowd", 1) is None:
        backlog.add("crowd", 1, 0.0)
        taken += 1
    assert taken == 17
    assert backlog.refusal("other", 1) is None
    backlog.remove("crowd", 1)
    assert backlog.refusal("crowd", 1) is None


def test_where_owners_are_not_told_apart_the_bounds_alone_count() -> None:
    backlog = Backlog(20, 100)
    for _ in range(20):
        assert backlog.refusal("", 5) is None
        backlog.add("", 5, 0.0)
    refusal = backlog.refusal("", 5)
    assert refusal is not None
    assert str(refusal) == (
        "the queue is full: 20 of 20 requests and 100 of 100 tokens wait; try again later"
    )


def test_nothing_is_kept_of_an_owner_whose_requests_have_left() -> None:
    backlog = Backlog(8, 1000)
    for _ in range(3):
        backlog.add("a", 10, 0.0)
        backlog.add("b", 7, 0.0)
    for account, size in (("a", 10), ("b", 7)):
        for _ in range(3):
            backlog.remove(account, size)
    assert (backlog.num_requests, backlog.num_tokens, backlog._held) == (0, 0, {})
    assert backlog.refusal("a", 10**6) is None, "an empty one takes any request"
