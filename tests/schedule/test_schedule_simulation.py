"""The real scheduler under random, hostile work; every step checks I1 to I12."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moebius
from covering import chosen
from schedule.checker import Violation
from schedule.simulate import FAMILIES, READING, Episode, main, simulate

# The trace that coverage needs makes a step of the simulation three times as slow.
no_cover = pytest.mark.no_cover
SEED = 1


@no_cover
@pytest.mark.parametrize("steps", chosen([40_000, 200_000], lambda steps: steps == 40_000))
def test_many_steps_without_a_violation(steps, capsys):
    total = simulate(steps, SEED)
    with capsys.disabled():
        print(f"\n  from seed {SEED}: {total}")
    assert total.steps >= steps
    # Work of every kind must have been there, or the run proves nothing about it.
    rarest = min(
        total.preemptions, total.prefix_waits, total.failed, total.expired, total.rollbacks
    )
    assert rarest > steps / 1000
    assert total.requests == total.finished + total.aborted + total.failed + total.expired
    assert total.prefix_hits > steps / 20 and total.refused > steps / 200
    assert total.blocks_passed > steps / 20 and total.turns > steps / 20
    assert total.snapshots > steps / 70 and total.restores > steps / 700
    assert min(total.right_drafts, total.drafts - total.right_drafts) > steps / 40


@no_cover
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", chosen([2_000, 6_000], lambda steps: steps == 2_000))
def test_each_family_of_models(family, steps):
    """Each has its own mix of windows and states; work of each kind that it has must have been."""
    windows, recurrent = FAMILIES[family]
    total = simulate(steps, 300, family=family)
    assert total.turns > steps / 20 and total.rollbacks > steps / 1000
    shares = family not in READING
    assert (total.prefix_hits > 5) == shares and (total.prefix_waits > 5) == shares
    assert (total.blocks_passed > steps / 6) == any(windows)
    assert (total.snapshots > steps / 12) == recurrent
    assert (total.restores > steps / 300) == recurrent


@no_cover
def test_a_seed_replays():
    assert Episode(7).run(300) == Episode(7).run(300)
    assert Episode(7).run(300) != Episode(8).run(300)


@no_cover
def test_episodes_follow_each_other_until_the_steps_are_done():
    total = simulate(1500, 40)
    assert total.episodes == 3 and total.steps >= 1500
    assert simulate(600, 41).requests < total.requests


@no_cover
def test_a_request_that_does_not_end_is_a_violation():
    episode = Episode(2)
    episode._compute = lambda plan, covered: (
        episode.scheduler.rollback(plan) or episode.checker.rolled_back(plan)
    )
    with pytest.raises(Violation, match="do not end") as violation:
        episode.run(100)
    assert violation.value.invariant == "I8"


def test_refusing_what_fits_is_a_violation():
    episode = Episode(4)
    episode.scheduler._waiting.backlog._max_requests = 1
    with pytest.raises(Violation, match="refused without cause"):
        episode.run(600)


def test_a_violation_crosses_processes():
    import pickle  # what the standard library's pool does with a worker's exception

    violation = Violation("I4", "wrong", seed=3, step=5)
    again = pickle.loads(pickle.dumps(violation))
    assert str(again) == str(violation) and (again.seed, again.step) == (3, 5)


def test_command_prints_its_figures():
    paths = (Path(moebius.__file__).parents[1], Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [
        sys.executable,
        "-m",
        "schedule.simulate",
        "--steps",
        "2000",
        "--seed",
        "4",
        "--processes",
        "2",
    ]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert "no violation" in run.stdout and "steps/s" in run.stdout and "preemptions" in run.stdout


def test_command_reports_a_violation(monkeypatch, capsys):
    class Inline:
        """An executor in this process, so that the patched simulation is the one that runs."""

        def __init__(self, processes):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

        def submit(self, run, *args):
            self.result = lambda: run(*args)
            return self

    def broken(steps, seed):
        raise Violation("I2", "a reference count is wrong", seed=seed, step=3)

    monkeypatch.setattr("schedule.simulate.ProcessPoolExecutor", Inline)
    monkeypatch.setattr("schedule.simulate.simulate", broken)
    assert main(["--steps", "10", "--seed", "9"]) == 1
    assert "I2 violated in step 3 of the episode with seed 9" in capsys.readouterr().out


def test_the_command_prints_what_it_did(capsys):
    assert main(["--steps", "300", "--seed", "9"]) == 0
    out = capsys.readouterr().out
    assert "seeds [9], 300 steps" in out and "no violation" in out and "preemptions" in out
