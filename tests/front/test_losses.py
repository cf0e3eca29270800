"""Real processes that are killed, stopped, stuck or broken: every answer is as if nothing was."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import pytest

from front.losses import KILL, REGEX, STOP, Losses, losses
from moebius.errors import EngineError
from moebius.request.finish import FinishReason

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory on Linux")


def test_one_engine_is_killed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch) as house:
        ids = house.some("killed")
        house.signal(0, KILL)
        house.until(lambda: not house.client.stats().ready)
        assert house.same(*ids)
        assert re.fullmatch(REGEX, house.text("killed, regex"))
        assert re.search(f"</think>{REGEX}$", house.text("killed, budget"))
        assert re.match('<tool_call>\n?{"name": "f", "arguments": {', house.text("killed, call"))
        assert re.match(r'{\s*"a"\s*:', house.text("killed, schema"))
        assert house.client.stats().restarts == 1
        assert house.client.stats().replayed >= 2
        # What every engine has found in its cache is told as the first one found it.
        last = [house.heard.outputs[id][-1] for id in ids]
        assert all(step.num_cached_tokens % 16 == 0 for step in last)


@pytest.mark.losses
def test_one_engine_is_stuck(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch, step_deadline=4) as house:
        ids = house.some("stuck")
        house.fault("endless step")
        assert house.same(*ids)
        assert house.client.stats().restarts == 1
        assert house.client.stats().replayed >= 2


def test_a_rank_is_lost_and_the_others_stay(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch, ranks=2) as house:
        before = house.pids
        ids = house.some("raises")
        house.fault("step that raises")
        house.wait_for(*ids)
        failed = [id for id in ids if house.heard.outputs[id][-1].error is not None]
        assert failed, "the step's own requests end"
        assert house.same(*(id for id in ids if id not in failed))
        assert house.pids == before

        ids = house.some("killed")
        house.signal(1, KILL)
        assert house.same(*ids)
        house.until(lambda: house.client.stats().ready)
        assert house.pids[0] == before[0] and house.pids[1] != before[1]
        assert house.client.stats().restarts == 1


@pytest.mark.losses
def test_a_rank_is_stuck_and_the_others_stay(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch, ranks=2, step_deadline=8) as house:
        before = house.pids
        ids = house.some("stuck")
        house.fault("endless step")
        assert house.same(*ids)
        house.until(lambda: house.client.stats().ready)
        assert sum(now == pid for now, pid in zip(house.pids, before, strict=True)) == 1


def many_ways(house: Losses) -> None:
    for way in ("broken device", "device that is told late", "stopped", "lost twice in a row"):
        ids = house.some(way)
        if way == "stopped":
            house.signal(-1, STOP)
        elif "device" in way:
            house.fault(way)
        else:
            house.signal(0, KILL)
            house.fault("death while it loads")
        house.until(lambda: not house.client.stats().ready)
        assert house.same(*ids), way
        house.until(lambda: house.client.stats().ready)


@pytest.mark.losses
@pytest.mark.parametrize("ranks", [1, 2])
def test_more_ways(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch, ranks) as house:
        many_ways(house)


@pytest.mark.losses
def test_both_ranks_are_lost_at_once_and_one_while_the_other_loads(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch, ranks=2) as house:
        ids = house.some("both")
        house.signal(0, KILL)
        house.signal(1, KILL)
        assert house.same(*ids)
        house.until(lambda: house.client.stats().ready)
        ids = house.some("one after the other")
        house.signal(1, KILL)
        old = house.pids[1]
        house.until(lambda: house.pids[1] != old)
        house.signal(0, KILL)
        assert house.same(*ids)


@pytest.mark.losses
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_that_ends_engines_fails_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch, ranks) as house:
        ids = house.some("innocent", max_tokens=200)
        house.submit("poison", [319, 5, 6], max_tokens=20)
        house.wait_for("poison")
        last = house.heard.outputs["poison"][-1]
        assert last.finish_reason is FinishReason.ERROR and isinstance(last.error, EngineError)
        assert "nothing else to do" in str(last.error)
        assert len(house.tokens("poison")) == 2
        assert house.same(*ids)


@pytest.mark.losses
def test_closing_while_an_engine_is_started_again_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with losses(tiny_model, tmp_path, monkeypatch) as house:
        house.submit("a", [1, 2, 3], max_tokens=500)
        old = house.pids[0]
        house.signal(0, KILL)
        house.until(lambda: house.pids[0] != old)
        began = time.monotonic()
    assert time.monotonic() - began < 60
    assert isinstance(house.heard.outputs["a"][-1].error, EngineError)
    deadline = time.monotonic() + 20
    while any(thread.name in ("restart", "watch") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.02)
