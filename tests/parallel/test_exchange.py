"""All exchanges between real processes, against what one process says they must give."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from covering import each_value
from moebius.errors import ConfigError, PeerError
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.shared_memory import Segment
from parallel import rank_side
from parallel.naive import cases, check
from parallel.rank_side import Case, Gathering, Meeting, bits
from parallel.ranks import Raised, Rank, ranks, together

SPEC = ExchangeSpec(4, 6, 10, 3, torch.bfloat16)
KINDS = ("shared", "sockets", "gloo", "one host", "two hosts")
# Ranks that connect and share memory, all or two by two.
NEAR = {"one host": lambda rank: range(4), "two hosts": lambda rank: (rank, rank ^ 1)}

Meet = Callable[..., Meeting]


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Rank]]:
    with ranks(4) as started:
        yield started


@pytest.fixture(params=KINDS)
def meet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Meet]:
    """Makes meeting places, each for an epoch of its own."""
    numbers = itertools.count(1)
    with ExitStack() as stack:

        def place(spec: ExchangeSpec = SPEC, timeout: float = 30.0) -> Meeting:
            names = tuple(f"rank {rank} on host {rank}" for rank in range(spec.size))
            epoch = Epoch("test", next(numbers), names)
            if request.param != "shared":
                store = str(tmp_path / f"store{epoch.number}")
                if request.param not in NEAR:
                    return Meeting(request.param, store, spec, epoch, timeout)
                near = tuple(tuple(NEAR[request.param](rank)) for rank in range(spec.size))
                return Meeting("sockets", store, spec, epoch, timeout, near)
            segment = stack.enter_context(Segment(spec, epoch))
            return Meeting("shared", segment.place, spec, epoch, timeout)

        yield place


@pytest.mark.parametrize(
    ("size", "dtype"),
    each_value([1, 2, 3, 4], [torch.bfloat16, torch.float16, torch.float32]),
    ids=str,
)
def test_rows_and_pairs(pool: list[Rank], meet: Meet, size: int, dtype: torch.dtype) -> None:
    spec = ExchangeSpec(size, 6, 10, 3, dtype)
    members = pool[:size]
    together(members, rank_side.join, meet(spec))
    check(members, spec, cases(size, 6))


def test_rows_of_odd_sizes(pool: list[Rank], meet: Meet) -> None:
    spec = ExchangeSpec(3, 2, 1, 1, torch.bfloat16)
    together(pool[:3], rank_side.join, meet(spec))
    check(pool[:3], spec, [Case(1, (2, 1, 0), 5), Case(2, (1, 2, 2), 1)])


def test_large_rows_of_many_tokens(pool: list[Rank], meet: Meet) -> None:
    """More than sockets and caches hold at once."""
    spec = ExchangeSpec(2, 300, 1000, 2, torch.float32)
    together(pool[:2], rank_side.join, meet(spec))
    check(pool[:2], spec, [Case(1, (300, 17), 8), Case(2, (0, 300), 8)])


def test_many_layers_in_a_row(pool: list[Rank], meet: Meet) -> None:
    """Ranks that run ahead overwrite nothing that others have yet to read."""
    together(pool, rank_side.join, meet())
    before, _ = pool[0].result_of(rank_side.waited)  # some greet each other by an agreement
    agreed = together(pool, rank_side.repeated, Case(1, (6, 0, 3, 1), 7), 40)
    assert agreed == [[(39, 0), (39, 1), (39, 2), (39, 3)]] * 4
    calls, waited = pool[0].result_of(rank_side.waited)
    assert calls - before == 41 * 2 + 40 and waited > 0


def test_agree(pool: list[Rank], meet: Meet) -> None:
    together(pool, rank_side.join, meet())
    values = [(5, -7), (), (2**62,), tuple(range(16))]
    right = [[tuple(v + rank for v in each) for rank in range(4)] for each in values]
    assert together(pool, rank_side.agree, *values) == [right] * 4
    assert together(pool, rank_side.agree_unlike) == [[(), (0,), (0, 1), (0, 1, 2)]] * 4


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 70, 1000])
def test_rows_are_gathered_and_what_is_made_of_them_scattered(
    pool: list[Rank], tmp_path: Path, size: int, width: int
) -> None:
    """Through memory alone. Columns do not go evenly, and some ranks have none; layers between."""
    spec = ExchangeSpec(size, 6, 10, 3, torch.bfloat16, gathered=5, width=width)
    columns = [column for rank in range(size) for column in spec.columns(rank)]
    assert columns == list(range(width))
    uneven = tuple((3 * rank + 1) % 6 for rank in range(size))
    cases = [Gathering(seed, uneven[::way]) for seed, way in ((1, 1), (2, -1), (3, 1))]
    cases += [Gathering(4, (0,) * size), Gathering(5, (5,) * size)]
    with Segment(spec, Epoch("test", 1)) as segment:
        together(pool[:size], rank_side.join, Meeting("shared", segment.place, spec, segment.epoch))
    for case in cases:
        check(pool[:size], spec, [Case(case.seed, (6,) * size, 7)])
        rows = torch.cat([bits(case.x_GD(rank, spec)) for rank in range(size)])
        for rank, ((found, untouched, back),) in enumerate(
            together(pool[:size], rank_side.gather, [case])
        ):
            assert untouched and torch.equal(found, rows)
            assert torch.equal(back, case.results_GV(rank, spec))


def test_what_cannot_be_gathered_is_refused(pool: list[Rank], meet: Meet) -> None:
    spec = ExchangeSpec(2, 6, 10, 3, torch.bfloat16, gathered=2, width=20)
    meeting = meet(spec)
    together(pool[:2], rank_side.join, meeting)
    pool[0].start(rank_side.gather, [Gathering(1, (3, 0))])
    error = pool[0].error()
    if meeting.kind != "shared":
        assert error.kind is RuntimeError and "gathers no rows" in error.text
        return
    assert error.kind is ValueError and "3 rows are to be gathered; there may be 2 a" in error.text
    pool[0].start(rank_side.scatter_without_gather)
    assert "scatter gather, and nothing else" in pool[0].error().text
    # Nothing was sent: the same ranks go on.
    together(pool[:2], rank_side.gather, [Gathering(1, (2, 1))])


def says_what_happened(meeting: Meeting, error: Raised, how: str, own: int) -> bool:
    """Of rank 2. Memory does not say that a process has ended, and gloo not whose sockets break;
    and those of ranks that have waited for as long break, too."""
    told = f"{meeting.epoch}: "
    if meeting.kind != "gloo":
        ended = meeting.kind == "sockets" and how == "kill"
        told += "rank 2 on host 2 "
        told += "has left, or its connection has ended" if ended else "did not come within 3 s"
        return error.ranks == (2,) and error.text == told
    others = tuple(rank for rank in range(4) if rank != own)
    some = f"one or more of {meeting.epoch.told(others)}"
    broke = f"{told}the connection to {some} broke ("
    late = f"{told}{some} did not come within 3 s ("
    right = (broke,) if how == "kill" else (broke, late)
    return error.ranks == others and error.text.startswith(right)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_peer_that_is_killed_or_stopped_while_others_wait(meet: Meet, how: str) -> None:
    meeting = meet(timeout=3.0)
    with ranks(4) as members:
        together(members, rank_side.join, meeting)
        together(members, rank_side.agree, (1,))
        survivors = members[:2] + members[3:]
        for rank in survivors:
            rank.start(rank_side.agree, (1,))
        getattr(members[2], how)()
        for own, rank in zip((0, 1, 3), survivors, strict=True):
            error = rank.error()
            assert error.kind is PeerError, error
            assert says_what_happened(meeting, error, how, own), error
            # Those who wait sleep.
            assert error.seconds < 20 and error.processor_seconds < 1
        # The epoch is over for who has survived it; in the next one, smaller, all is well.
        survivors[0].start(rank_side.agree, (1,))
        assert survivors[0].error().kind is PeerError
        spec = ExchangeSpec(3, 6, 10, 3, torch.bfloat16)
        following = meet(spec)
        for number, rank in enumerate(survivors):
            rank.start(rank_side.join, following, number)
        for rank in survivors:
            rank.result()
        check(survivors, spec, cases(3, 6)[:2])
        if how == "stop":
            # It goes on where nobody is any more. What the others had sent it may have come, after
            # which they sent nothing.
            members[2].go_on()
            members[2].start(rank_side.agree, (1,), (1,))
            assert members[2].error().kind is PeerError


def test_ranks_out_of_step_notice(pool: list[Rank], meet: Meet) -> None:
    spec = ExchangeSpec(2, 6, 10, 3, torch.bfloat16)
    together(pool[:2], rank_side.join, meet(spec))
    pool[0].start(rank_side.agree, (1,))
    pool[1].start(rank_side.layers, [Case(1, (1, 1), 5)])
    for own in (0, 1):
        error = pool[own].error()
        assert error.kind is PeerError and error.ranks == (1 - own,), error
        assert "something else" in error.text


WRONG = {
    "too many rows": "x has 7 rows; the group was made for 6",
    "other rows": r"x: torch.bfloat16 of shape \(1, 11\); it must be torch.bfloat16 of shape \(1, 10\)",
    "another dtype": "x: torch.float64",
    "fewer ids": r"ids: torch.int64 of shape \(1, 2\)",
    "not contiguous": "received rows: .* contiguous",
    "little room": "room for 23 received rows; 24 may come",
    "no owners": r"an owners table of shape \(0, 5\)",
    "an id too large": "expert",
    "an id below zero": "expert",
    "an owner too large": "rank",
    "an expert nowhere": "rank",
}


def test_bad_input_is_refused_and_can_be_corrected(pool: list[Rank], meet: Meet) -> None:
    """Before anything is sent, so that a rank that is refused can go on with the others."""
    together(pool, rank_side.join, meet())
    for wrong, words in WRONG.items():
        pool[2].start(rank_side.wrong_tensors, wrong)
        error = pool[2].error()
        assert error.kind is ValueError and re.search(words, error.text), error
    pool[2].start(rank_side.combine_without_dispatch)
    assert "combine follows dispatch" in pool[2].error().text
    check(pool, SPEC, cases(4, 6)[:3])


def test_waiting_lets_other_threads_run(pool: list[Rank], meet: Meet) -> None:
    together(pool[:2], rank_side.join, meet(ExchangeSpec(2, 6, 10, 3, torch.bfloat16)))
    pool[0].result_of(rank_side.agree_in_a_thread)
    assert pool[0].result_of(rank_side.is_waiting)
    assert pool[1].result_of(rank_side.agree, (1,)) == [[(7,), (2,)]]
    assert pool[0].result_of(rank_side.agreed_in_the_thread) == [(7,), (2,)]


def test_another_thread_can_give_up(pool: list[Rank], meet: Meet) -> None:
    """What waits ends at once, not when its time is over."""
    spec = ExchangeSpec(2, 6, 10, 3, torch.bfloat16)
    together(pool[:2], rank_side.join, meet(spec, timeout=600.0))
    pool[0].result_of(rank_side.agree_in_a_thread)
    assert pool[0].result_of(rank_side.is_waiting)
    pool[0].result_of(rank_side.give_up, (1,))
    for call, args in ((rank_side.agreed_in_the_thread, ()), (rank_side.agree, ((1,),))):
        pool[0].start(call, *args)
        error = pool[0].error()
        assert error.kind is PeerError and error.ranks == (1,), error
    # Nor does the next epoch wait for that.
    alone = ExchangeSpec(1, 6, 10, 3, torch.bfloat16)
    together(pool[:1], rank_side.join, meet(alone))
    check(pool[:1], alone, cases(1, 6)[:1])


def test_closing_ends_what_another_thread_waits_for(pool: list[Rank], meet: Meet) -> None:
    spec = ExchangeSpec(2, 6, 10, 3, torch.bfloat16)
    together(pool[:2], rank_side.join, meet(spec))
    pool[0].result_of(rank_side.agree_in_a_thread)
    pool[0].result_of(rank_side.leave)
    pool[0].start(rank_side.agreed_in_the_thread)
    error = pool[0].error()
    assert error.kind is PeerError and error.ranks == (0,), error


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"tokens": 0}, {"hidden": -1}, {"top_k": 0}, {"dtype": torch.float64}]
)
def test_a_group_that_no_exchange_can_be_for(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong.values())).__repr__().split(".")[-1]):
        replace(SPEC, **wrong)
