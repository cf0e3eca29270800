"""A KV cache on disk behind an engine: what a restart finds again changes no bit, and whatever
goes wrong with it is a miss."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from covering import chosen, rest
from engine.test_hybrids import text
from moebius.engine.disk_pace import Pace
from moebius.engine.disk_store import DiskBounds, DiskStore
from moebius.engine.disk_tier import DiskTier
from moebius.engine.engine import Engine
from moebius.engine.trace import TraceWriter, replay
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from moebius.schedule.tiers import TieredScheduler
from oracle import save_tiny
from random_schedules import (
    MAX_MODEL_LEN,
    Answer,
    Schedule,
    Wish,
    alone,
    constraints,
    each_alone,
    mixed,
    note,
    parts,
    request_of,
    wishes,
)

cpu = pytest.importorskip("moebius.ops.cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
ROOMY = Schedule(8, 200, 8, 2048, True, (0,), 1)
MODELS = ("qwen3_moe", "mixed windows", "qwen3_next", "lfm2_moe", "deepseek_v3")


@cache
def decoder(model_type: str) -> Decoder:
    if model_type == "mixed windows":
        return mixed(cpu.CpuOps(1), torch.bfloat16)
    with TemporaryDirectory() as directory:
        sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
        save_tiny(Path(directory), model_type, **sizes)
        ops = cpu.CpuOps(1)
        return load_decoder(Path(directory), torch.bfloat16, ops=ops, mapped=False)


class Launch:
    """An engine with a disk, which is given time to write where a test wants that."""

    def __init__(
        self,
        model: Decoder,
        directory: Path,
        schedule: Schedule = ROOMY,
        *,
        most: int = 10**9,
        least: int = 16,
        realm: bytes = b"test",
        trace: Path | None = None,
    ) -> None:
        runner, plain, info = parts(model, schedule)
        self.scheduler = TieredScheduler(plain.config, plain.pool)
        self.store = DiskStore(directory, bytes(16), DiskBounds(most, floor=0))
        self.tier = DiskTier(self.scheduler, runner.cache, self.store, realm, least=least)
        # Tiny models are computed sooner than files are found.
        self.tier.pace.worth = lambda tokens, nbytes: True  # type: ignore[method-assign]
        writer = None if trace is None else TraceWriter(trace, plain.config, plain.pool)
        self.engine = Engine(
            runner,
            self.scheduler,
            info,
            constraints(info),
            tier=self.tier,
            trace=writer,
        )

    def ask(self, *asked: Wish, salt: bytes = b"") -> tuple[dict[str, Answer], list[int]]:
        """Each wish's answer, all at once, and how many of its prompt's tokens were found."""
        found: dict[str, Answer] = {wish.id: ([], [], []) for wish in asked}
        requests = [self.request(wish, salt) for wish in asked]
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for output in self.engine.step():
                note(output, found)
        return found, [request.num_cached_tokens or 0 for request in requests]

    def request(self, wish: Wish, salt: bytes = b"") -> Request:
        made = request_of(wish, self.engine)
        return Request(replace(made.asked, salt=salt), made.start_ids)

    def written(self) -> None:
        assert self.tier.writer.wait(30)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if len(path.name) == 32)


@pytest.mark.parametrize("model_type", MODELS)
def test_cold_warm_and_from_disk_after_a_restart_are_one_answer(
    model_type: str, tmp_path: Path
) -> None:
    model = decoder(model_type)
    wish = Wish("w", text(101), GREEDY, 0)
    expected = alone(model, wish)
    with Launch(model, tmp_path / "disk") as first:
        assert first.ask(wish) == ({"w": expected}, [0])
        assert first.ask(wish) == ({"w": expected}, [96])
        first.written()
        assert first.store.stats().writes > 10 and first.store.stats().reads == 0
    with Launch(model, tmp_path / "disk") as second:
        assert second.ask(wish) == ({"w": expected}, [96])
        stats = second.engine.stats().disk
        assert stats.reads > 0 and stats.misses == 0
        assert second.ask(wish) == ({"w": expected}, [96])
        assert second.store.stats().reads == stats.reads, "the second time it was in memory"


# Of blocks of several tables, and of states.
KINDS = ("mixed windows", "qwen3_next")


@pytest.mark.parametrize("model_type", chosen(MODELS, lambda name: name in KINDS))
def test_a_flipped_byte_is_one_miss_and_changes_no_bit(model_type: str, tmp_path: Path) -> None:
    model = decoder(model_type)
    wish = Wish("w", text(101), GREEDY, 0)
    with Launch(model, tmp_path / "disk") as first:
        expected = first.ask(wish)[0]
        first.written()
    with Launch(model, tmp_path / "disk") as second:
        needed = read_names(second)
        second.ask(wish)
    rng = random.Random(model_type)
    for name in rng.sample(sorted(needed), 4):
        path = tmp_path / "disk" / "rank-0" / name[:2] / name
        flip(path, rng)
        with Launch(model, tmp_path / "disk") as launch:
            found, cached = launch.ask(wish)
            assert found == expected and cached[0] < 96
            assert launch.engine.stats().disk.misses == 1
            launch.written()
            assert path.exists() and launch.store.stats().writes >= 1


def test_a_disk_of_which_nothing_is_whole_changes_no_bit(tmp_path: Path) -> None:
    model = decoder("qwen3_next")
    wish = Wish("w", text(101), GREEDY, 0)
    with Launch(model, tmp_path / "disk") as first:
        expected = first.ask(wish)[0]
        first.written()
    rng = random.Random(0)
    for path in files(tmp_path / "disk"):
        flip(path, rng)
    with Launch(model, tmp_path / "disk") as second:
        assert second.ask(wish) == (expected, [0])
        stats = second.engine.stats().disk
        assert stats.misses >= 1 and stats.reads == 0


def flip(path: Path, rng: random.Random) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def read_names(launch: Launch) -> set[str]:
    """Which files it reads, from now on."""
    names: set[str] = set()
    read = launch.store.read

    def noting(name: bytes, check):
        names.add(name.hex())
        return read(name, check)

    launch.store.read = noting  # type: ignore[method-assign]
    return names


@pytest.mark.parametrize("model_type", [rest("qwen3_moe"), *KINDS])
def test_crowds_in_tight_caches_beside_a_disk_change_no_bit(
    model_type: str, tmp_path: Path
) -> None:
    """Blocks go and come back from the disk in the middle of others' requests."""
    model = decoder(model_type)
    rng = random.Random(model_type)
    asked = wishes(14, 300, rng, free=True)
    expected = each_alone(model, asked)
    tables = len(parts(model, ROOMY)[1].pool.groups.blocks)
    tight = Schedule(4, tables * 64 + 40, 8, 17, True, (0,), 1)
    for _ in range(2):
        with Launch(model, tmp_path / "disk", tight, least=8) as launch:
            for _ in range(2):
                assert launch.ask(*asked)[0] == expected
                launch.written()
            stats = launch.store.stats()
        assert stats.misses == 0
    assert stats.reads > 0, "or else nothing was compared"


def test_what_another_salt_has_said_is_not_found(tmp_path: Path) -> None:
    wish = Wish("w", text(101), GREEDY, 0)
    with Launch(decoder("qwen3_moe"), tmp_path / "disk") as first:
        first.ask(wish, salt=b"alice")
        first.written()
    for salt, found in ((b"bob", 0), (b"", 0), (b"alice", 96)):
        with Launch(decoder("qwen3_moe"), tmp_path / "disk") as second:
            assert second.ask(wish, salt=salt)[1] == [found]
            assert (second.store.stats().reads > 0) == bool(found)


def test_what_another_program_has_computed_is_not_found(tmp_path: Path) -> None:
    wish = Wish("w", text(101), GREEDY, 0)
    model = decoder("qwen3_moe")
    with Launch(model, tmp_path / "disk") as first:
        first.ask(wish)
        first.written()
    other = replace(ROOMY, block_size=16)
    codes = replace(ROOMY, kv_dtype=torch.int8)
    for options in ({"realm": b"other"}, {"schedule": other}, {"schedule": codes}):
        with Launch(model, tmp_path / "disk", **options) as second:
            assert second.ask(wish)[1] == [0] and second.store.stats().reads == 0


def test_what_changes_no_byte_changes_no_name(tmp_path: Path) -> None:
    wish = Wish("w", text(101), GREEDY, 0)
    model = decoder("qwen3_moe")
    with Launch(model, tmp_path / "disk") as first:
        first.ask(wish)
        first.written()
    for other in (
        replace(ROOMY, num_blocks=50),
        replace(ROOMY, max_num_seqs=3, max_num_batched_tokens=64),
    ):
        with Launch(model, tmp_path / "disk", other) as second:
            assert second.ask(wish)[1] == [96]


def test_two_who_begin_alike_wait_for_the_same_files(tmp_path: Path) -> None:
    model = decoder("qwen3_moe")
    asked = [Wish(f"w{i}", text(96) + text(9, seed=i + 1), GREEDY, i) for i in range(3)]
    expected = {wish.id: alone(model, wish) for wish in asked}
    with Launch(model, tmp_path / "disk") as first:
        first.ask(asked[0])
        first.written()
    with Launch(model, tmp_path / "disk") as second:
        assert second.ask(*asked)[0] == expected
        assert second.store.stats().reads == 13, "of 104 tokens, each block once"


class Stuck:
    """A method that does not go on before it is told to."""

    def __init__(self, owner: object, name: str) -> None:
        self.go = threading.Event()
        self.came = threading.Event()
        inner = getattr(owner, name)

        def wait(*args: object):
            self.came.set()
            assert self.go.wait(30)
            return inner(*args)

        setattr(owner, name, wait)


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Path]:
    """A disk that has a prompt of 101 tokens."""
    with Launch(decoder("qwen3_moe"), tmp_path / "disk") as first:
        first.ask(Wish("w", text(101), GREEDY, 0))
        first.written()
    yield tmp_path / "disk"


def test_a_disk_that_hangs_is_waited_for_no_longer_than_its_time(stored: Path) -> None:
    model = decoder("qwen3_moe")
    wish = Wish("w", text(101), GREEDY, 0)
    with Launch(model, stored) as second:
        stuck = Stuck(second.store, "read")
        now = [0.0]
        second.engine.clock = lambda: now[0]
        second.tier.pace.seconds_per_token = 0.01
        request = second.request(wish)
        second.engine.add(request)
        for _ in range(3):
            assert second.engine.step() == []
            assert second.scheduler.awaited == {"w": pytest.approx(0.96)}
        assert second.scheduler.num_deferred == 1
        now[0] = 1.0
        found: dict[str, Answer] = {"w": ([], [], [])}
        while second.engine.has_work:
            for output in second.engine.step():
                note(output, found)
        assert found["w"] == alone(model, wish) and request.num_cached_tokens == 0
        assert second.engine.stats().disk.late == 1
        stuck.go.set()


def test_who_leaves_while_it_waits_is_forgotten(stored: Path) -> None:
    with Launch(decoder("qwen3_moe"), stored) as second:
        stuck = Stuck(second.store, "read")
        second.engine.add(second.request(Wish("w", text(101), GREEDY, 0)))
        second.engine.step()
        assert stuck.came.wait(10)
        assert second.engine.abort("w") is not None
        stuck.go.set()
        other = Wish("x", text(40, seed=9), GREEDY, 0)
        assert second.ask(other)[0] == {"x": alone(decoder("qwen3_moe"), other)}
        assert second.scheduler.drained and not second.scheduler.awaited
        assert second.engine.stats().disk.late == 0


def test_requests_do_not_wait_for_what_is_written(tmp_path: Path) -> None:
    model = decoder("qwen3_moe")
    asked = [Wish(f"w{i}", text(101, seed=i), GREEDY, i) for i in range(4)]
    with Launch(model, tmp_path / "disk") as launch:
        stuck = Stuck(launch.store, "write")
        launch.tier.writer._most = 20
        for wish in asked:
            assert launch.ask(wish)[0] == {wish.id: alone(model, wish)}
        assert launch.store.stats().dropped > 0, "the queue has room for 20 of 4 times 13"
        stuck.go.set()
        launch.written()
        assert 13 <= launch.store.stats().writes < 52


def test_a_block_that_is_reused_while_it_is_copied_is_dropped(tmp_path: Path) -> None:
    """The writer gets to what it was given when others have long had those blocks."""
    model = decoder("qwen3_moe")
    small = replace(ROOMY, num_blocks=16)
    with Launch(model, tmp_path / "disk", small) as launch:
        stuck = Stuck(launch.tier.writer, "_copy")
        launch.ask(Wish("w", text(101), GREEDY, 0))
        assert stuck.came.wait(10)
        launch.ask(Wish("x", text(101, seed=1), GREEDY, 0))
        stuck.go.set()
        launch.written()
        assert launch.store.stats().dropped >= 10
    wish = Wish("w", text(101), GREEDY, 0)
    with Launch(model, tmp_path / "disk") as second:
        assert second.ask(wish)[0] == {"w": alone(model, wish)}


def test_short_prefixes_are_not_kept(tmp_path: Path) -> None:
    with Launch(decoder("qwen3_moe"), tmp_path / "disk", least=112) as launch:
        launch.ask(Wish("w", text(101), GREEDY, 0))
        launch.written()
        assert launch.store.stats().writes == 0
        launch.ask(Wish("x", text(107), GREEDY, 0))
        launch.written()
        assert launch.store.stats().writes == 14


def test_the_beginning_of_a_text_stays_longest(tmp_path: Path) -> None:
    """With room for half of it, a restart still starts from what there is."""
    wish = Wish("w", text(101), GREEDY, 0)
    with Launch(decoder("qwen3_moe"), tmp_path / "disk") as first:
        first.ask(wish)
        first.written()
        most = first.store.stats().nbytes // 2
    with Launch(decoder("qwen3_moe"), tmp_path / "disk", most=most) as second:
        assert second.ask(wish)[0] == {"w": alone(decoder("qwen3_moe"), wish)}
        second.written()
        assert second.store.stats().nbytes <= most


def test_a_trace_with_a_disk_replays_to_the_same_decisions(stored: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    tight = Schedule(8, 40, 8, 32, True, (0,), 1)
    with Launch(decoder("qwen3_moe"), stored, tight, trace=path) as launch:
        asked = [Wish(f"w{i}", text(60 + i) + text(9, seed=i), GREEDY, i) for i in range(6)]
        launch.ask(*asked)
        assert launch.store.stats().reads > 0
    lines = path.read_text()
    assert all(f'"event":"{each}"' in lines for each in ("expect", "land", "settle"))
    report = replay(path)
    assert report.difference is None and report.requests == 6 and report.steps > 5


def test_what_reading_costs_more_than_computing_is_not_read() -> None:
    pace = Pace()
    assert pace.worth(100, 10**12), "nothing was measured yet"
    pace.read(1000, 1.0)
    assert pace.worth(100, 10**12)
    pace.computed(63, 10.0)
    assert pace.seconds_per_token is None, "too few tokens to tell"
    pace.computed(100, 1.0)
    assert pace.worth(100, 999) and not pace.worth(100, 1000)
    assert pace.patience(1000) == pytest.approx(10.0) and pace.patience(1) == 0.25
    pace.computed(100, 2.0)
    assert pace.seconds_per_token == pytest.approx(0.013)
    pace.computed(100, 0.0)
    pace.read(1000, 0.0)
    assert pace.bytes_per_second == 1000.0


def test_a_slow_disk_is_left_alone(stored: Path) -> None:
    with Launch(decoder("qwen3_moe"), stored) as second:
        del second.tier.pace.worth
        second.tier.pace.seconds_per_token = 1e-6
        second.tier.pace.bytes_per_second = 1000.0
        assert second.ask(Wish("w", text(101), GREEDY, 0))[1] == [0]
        assert second.store.stats().reads == 0
        second.tier.pace.bytes_per_second = 1e12
        second.tier.pace.seconds_per_token = 1.0
        assert second.ask(Wish("x", text(101, seed=3), GREEDY, 0))[1] == [0]


def test_an_engine_measures_what_its_prompts_cost(tmp_path: Path) -> None:
    with Launch(decoder("qwen3_moe"), tmp_path / "disk") as launch:
        now = iter(range(10**6))
        launch.engine.clock = lambda: float(next(now))
        launch.ask(Wish("w", text(101), GREEDY, 0))
        assert launch.tier.pace.seconds_per_token is not None
        assert 1 / 101 <= launch.tier.pace.seconds_per_token < 10 / 101
