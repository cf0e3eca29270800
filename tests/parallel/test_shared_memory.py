"""What is particular to memory that ranks share: who may join, what is left, who is told at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebius.errors import ConfigError, MemoryPlanError, PeerError
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange, segment_bytes
from parallel import rank_side
from parallel.rank_side import Case, Meeting
from parallel.ranks import Rank, ranks, together

SPEC = ExchangeSpec(3, 6, 10, 3, torch.bfloat16)
EPOCH = Epoch("shared", 5)
# Nobody waits this long: what must come at once comes before.
LONG = 600.0


@pytest.fixture
def segment() -> Iterator[Segment]:
    with Segment(SPEC, EPOCH) as made:
        yield made


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Rank]]:
    with ranks(3) as started:
        yield started


def meeting(segment: Segment) -> Meeting:
    return Meeting("shared", segment.place, segment.spec, segment.epoch, LONG)


def join(segment: Segment, rank: int = 0, **changed: object) -> SharedMemoryExchange:
    spec = replace(SPEC, **changed)
    return SharedMemoryExchange(segment.place, spec, rank, EPOCH, timeout=LONG)


def mapped_anywhere(name: str) -> list[str]:
    """Processes that have a segment of this name in their memory or among their files."""
    processes = (process for process in Path("/proc").iterdir() if process.name.isdecimal())
    return [process.name for process in processes if f"memfd:{name}" in held_by(process)]


def held_by(process: Path) -> str:
    """Empty where the process has ended, or is not ours."""
    try:
        held = (process / "maps").read_text()
        for file in list((process / "fd").iterdir()):
            with suppress(OSError):  # it has been closed
                held += os.readlink(file)
    except OSError:
        return ""
    return held


def test_who_may_join(segment: Segment) -> None:
    held = [join(segment, 2), join(segment, 0)]
    with pytest.raises(ConfigError, match=f"rank 2 has joined already, as process {os.getpid()}"):
        join(segment, 2)
    with pytest.raises(ConfigError, match="rank 3 of a group of 3"):
        join(segment, 3)
    segment.give_up([1])
    # Those who have joined keep the memory.
    segment.close()
    with pytest.raises(PeerError, match="has closed it or ended"):
        join(segment, 1)
    for exchange in held:
        with pytest.raises(PeerError, match=r"epoch 5 of group shared: rank 1 is lost$"):
            exchange.agree(())


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 4},
        {"tokens": 7},
        {"hidden": 11},
        {"top_k": 2},
        {"gathered": 1},
        {"width": 9},
        {"dtype": torch.float32},
    ],
)
def test_a_segment_for_something_else_is_refused(
    segment: Segment, changed: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"the segment is for .* 3 ranks of 6 tokens, 3 .* 20 "):
        join(segment, **changed)


def test_a_rank_of_another_epoch_is_refused(segment: Segment) -> None:
    with pytest.raises(ConfigError, match=r"for epoch 5 of group shared.*is for epoch 6 of "):
        SharedMemoryExchange(segment.place, SPEC, 0, Epoch("shared", 6), timeout=LONG)


def test_other_files_are_no_segments(segment: Segment, tmp_path: Path) -> None:
    for content in (b"", b"x" * 10, b"x" * segment_bytes(SPEC)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ConfigError, match="no segment"):
            SharedMemoryExchange(str(tmp_path / "file"), SPEC, 0, EPOCH, timeout=1)


def test_names_and_numbers_of_ranks_have_bounds() -> None:
    for group in ("", "g" * 64):
        with pytest.raises(ConfigError, match="a group's name of"):
            Segment(SPEC, Epoch(group, 1))
    with pytest.raises(ConfigError, match="65 ranks; through shared memory there are 1 to 64"):
        segment_bytes(replace(SPEC, size=65))


def test_memory_is_for_what_ranks_send() -> None:
    """Rows out, pairs home, and little else."""
    spec = ExchangeSpec(4, 512, 1024, 8, torch.bfloat16)
    rows = 4 * 512 * (1 + 8) * 2048
    assert rows < segment_bytes(spec) < 1.05 * rows


def test_a_segment_cannot_be_cut_short(segment: Segment) -> None:
    file = os.open(segment.place, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    os.close(file)


def test_a_rank_that_leaves_and_one_that_is_given_up_are_known_at_once(pool: list[Rank]) -> None:
    for given_up in (False, True):
        with Segment(SPEC, EPOCH) as segment:
            together(pool, rank_side.join, meeting(segment))
            together(pool, rank_side.agree, (1,))
            for rank in pool[1:]:
                rank.start(rank_side.agree, (1,))
            if given_up:
                segment.give_up([0])
            else:
                pool[0].result_of(rank_side.leave)
            for rank in pool[1:]:
                error = rank.error()
                assert error.kind is PeerError and error.ranks == (0,)
            if given_up:
                pool[0].start(rank_side.agree, (1,))
                assert pool[0].error().text.endswith(": rank 0 is lost")


@pytest.mark.parametrize("microseconds", [10, 70, 330, 1900])
def test_a_rank_that_is_killed_anywhere_in_a_layer(microseconds: int) -> None:
    """Whoever sees it die tells the others, who need not wait for their deadline."""
    with Segment(SPEC, EPOCH) as segment, ranks(3) as members:
        together(members, rank_side.join, meeting(segment))
        for rank in members:
            rank.start(rank_side.layers_without_end, Case(1, (6, 2, 3), 7), 1, microseconds)
        members[1].wait_for_its_end()
        segment.give_up([1])
        for rank in (members[0], members[2]):
            error = rank.error()
            assert error.kind is PeerError and error.ranks == (1,), error


@pytest.mark.parametrize("cores", [1, 64])
def test_fewer_cores_than_ranks_and_more(pool: list[Rank], cores: int) -> None:
    with Segment(SPEC, EPOCH, cores=cores) as segment:
        together(pool, rank_side.join, meeting(segment))
        agreed = together(pool, rank_side.repeated, Case(1, (6, 0, 3), 7), 30)
        assert agreed == [[(29, 0), (29, 1), (29, 2)]] * 3


def test_memory_that_cannot_be_had() -> None:
    """In a process that may have no more than it has."""
    spec = replace(SPEC, tokens=4096, hidden=4096)
    with ranks(1) as [rank]:
        rank.start(rank_side.start_segment_without_memory, spec, EPOCH)
        error = rank.error()
    assert error.kind is MemoryPlanError
    mebibytes = segment_bytes(spec) / 2**20
    assert f"the {mebibytes:.1f} MiB that ranks share cannot be had" in error.text


def test_what_is_closed_holds_no_memory() -> None:
    epoch = Epoch(f"closed{os.getpid()}", 1)
    name = f"moebius-{epoch.group}"
    segment = Segment(SPEC, epoch)
    exchange = SharedMemoryExchange(segment.place, SPEC, 0, epoch, timeout=LONG)
    segment.close()
    assert mapped_anywhere(name) == [str(os.getpid())]
    exchange.close()
    assert mapped_anywhere(name) == []
    with pytest.raises(PeerError, match="rank 0 has left it"):
        exchange.agree(())


def test_nothing_is_left_of_a_segment_whoever_is_killed() -> None:
    """The starter is one of those who die, without closing anything."""
    name = f"moebius-killed{os.getpid()}"
    epoch = Epoch(f"killed{os.getpid()}", 1)
    before = set(os.listdir("/dev/shm"))
    with ranks(3) as members:
        place = members[0].result_of(rank_side.start_segment, SPEC, epoch)
        together(members, rank_side.join, Meeting("shared", place, SPEC, epoch, LONG))
        together(members, rank_side.agree, (1,))
        assert len(mapped_anywhere(name)) == 3
        for rank in members:
            rank.kill()
    assert mapped_anywhere(name) == []
    assert set(os.listdir("/dev/shm")) - before == set()
