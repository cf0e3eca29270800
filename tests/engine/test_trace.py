"""A trace replays to the same decisions, notices other ones, and spells out no prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.test_engine import cache_bytes, engine, make, prompts, run
from moebius.engine.trace import replay
from moebius.errors import ConfigError, StorageError


@pytest.fixture
def trace(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    options = {"block_size": 4, "kv_cache_memory_bytes": cache_bytes(120, 4), "max_model_len": 100}
    one = engine(tiny_model, trace=str(path), **options)
    shared = prompts(1, low=24, high=25)[0]
    many = [[*shared, *own] for own in prompts(12, seed=1, low=5, high=30)]
    run(
        one,
        [
            make(one, f"r{i}", p, max_tokens=20, stop_token_ids=(7,), temperature=1.0)
            for i, p in enumerate(many)
        ],
    )
    one.add(make(one, "aborted", [1, 2, 3], max_tokens=50))
    one.step()
    one.abort("aborted")
    run(one, [make(one, "late", [9, 9], deadline=one.clock() - 1.0)])
    one.close()
    assert one.stats().preemptions > 0 and one.stats().prefix_hits > 0
    return path


def test_the_same_decisions(trace: Path) -> None:
    report = replay(trace)
    assert report.difference is None and report.requests == 14 and report.steps > 20


def test_a_changed_decision_is_found(trace: Path) -> None:
    lines = trace.read_text().splitlines()
    number = next(
        i for i, line in enumerate(lines) if '"plan"' in line and json.loads(line)["chunks"]
    )
    record = json.loads(lines[number])
    record["chunks"][0][2] -= 1
    lines[number] = json.dumps(record)
    trace.write_text("\n".join(lines))
    report = replay(trace)
    assert report.difference is not None and "chunks" in report.difference


def test_tokens_are_renamed_in_order_of_first_sight(trace: Path) -> None:
    adds = [json.loads(line) for line in trace.read_text().splitlines() if '"add"' in line]
    assert adds[0]["prompt"][0] == 0
    assert adds[0]["prompt"][:24] == adds[1]["prompt"][:24]
    assert max(adds[0]["prompt"]) < len(adds[0]["prompt"])


def test_a_line_cut_short_by_a_crash_ends_the_replay(trace: Path) -> None:
    text = trace.read_text()
    trace.write_text(text[: len(text) * 2 // 3])
    assert replay(trace).difference is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with the start line"),
        ('{"event":"plan"}\n', "does not begin with the start line"),
        ("no json\n{}\n", "line 1: not JSON"),
        ("[1]\n", "no trace event"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"event":"start","version":8}\n', "not as this version writes it"),
        (
            '{"event":"start","version":8,"scheduler":{"of_tomorrow":1},"pool":{},"groups":{}}\n',
            "not as this version writes it",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        replay(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"max_tokens":', '"most":'),
        ('"prompt":[', '"prompt":5,"was":['),
        ('"waiting":', '"stepx":'),
    ],
)
def test_a_trace_with_a_broken_line_is_refused(old: str, new: str, trace: Path) -> None:
    trace.write_text(trace.read_text().replace(old, new))
    with pytest.raises(ConfigError, match="not as this version writes it"):
        replay(trace)


def test_a_missing_file_and_an_unwritable_one(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as a trace"):
        replay(tmp_path / "nothing")
    with pytest.raises(StorageError, match="cannot be written"):
        engine(tiny_model, trace=str(tmp_path / "no" / "such" / "folder"))


@pytest.mark.case("C13")
def test_only_a_trace_is_written_over(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "trace"
    for _ in range(2):
        engine(tiny_model, trace=str(path)).close()
    path.write_text("a year of notes")
    with pytest.raises(ConfigError, match="holds something else and is left as it is"):
        engine(tiny_model, trace=str(path))
    assert path.read_text() == "a year of notes"
