"""The bench commands as a person runs them, against this project's own server and others."""

from __future__ import annotations

import inspect
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.fake_openai import FakeOpenAI, answer, running
from moebius.bench.metrics import Record
from moebius.bench.report import plot_serving
from moebius.cli.bench import bench
from moebius.cli.main import main
from moebius.text import Tokenizer
from serving import serving


def moebius(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moebius", "bench", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that ends with 2; its one line on stderr."""

    def run(*arguments: str) -> str:
        assert moebius(monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("moebius: ") and err.count("\n") == 1, (out, err)
        return str(err)

    return run


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    """A real server with a tiny model, served under the name of its directory."""
    with serving(tiny_model, str(tiny_model), max_model_len=256) as address:
        yield address


def test_serve_counts_every_token_of_our_server(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.png"
    arguments = (
        "serve",
        "--base-url",
        url,
        "--random-input-len",
        "20",
        "--random-output-len",
        "6",
        "--ignore-eos",
    )
    more = (
        "--num-prompts",
        "12",
        "--request-rate",
        "60",
        "--max-concurrency",
        "4",
        "--random-range-ratio",
        "0.5",
    )
    limits = ("--goodput", "ttft:60000", "e2el:60000", "--metric-percentiles", "50,99")
    files = ("--output-json", str(figures), "--plot", str(chart))
    assert moebius(monkeypatch, *arguments, *more, *limits, *files) == 0
    out = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert (found["completed"], found["failed"], found["max_concurrent_requests"] <= 4) == (
        12,
        0,
        True,
    )
    requests = found["requests"]
    assert (
        found["total_input_tokens"] == sum(r["input_tokens"] for r in requests)
        and len(requests) == 12
    )
    assert {r["input_tokens"] for r in requests} <= set(range(10, 31)) and all(
        r["arrivals"] for r in requests
    )
    assert {r["output_tokens"] for r in requests} <= set(range(3, 10)) and not any(
        r["error"] for r in requests
    )
    assert found["request_goodput"] == found["request_throughput"] > 0
    # An answer may arrive in one part, and then begins when it ends.
    assert all(r["e2el"] >= r["arrivals"][-1] >= r["arrivals"][0] > 0 for r in requests)
    assert found["median_ttft_ms"] == pytest.approx(
        median(r["arrivals"][0] for r in requests) * 1e3
    )
    assert (
        found["p50_e2el_ms"]
        == found["median_e2el_ms"]
        == pytest.approx(median(r["e2el"] for r in requests) * 1e3)
    )
    assert (
        f"Total generated tokens: {found['total_output_tokens']:>26}" in out
        and "P50 E2EL (ms):" in out
    )
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_answers_that_arrive_in_one_part_are_drawn_too(tmp_path: Path) -> None:
    """There is no time between their tokens, and no logarithm of it."""
    record = Record(0.0, 5, arrivals=[0.5, 0.5, 0.5], output_tokens=3, e2el=0.5)
    plot_serving(tmp_path / "chart.png", "one part", [record], {})
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_serve_chats_and_reads_files(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def f(", "output_tokens": 3}\n' * 3)
    arguments = ("serve", "--base-url", url, "--ignore-eos", "--num-prompts", "5")
    file = ("--dataset-name", "jsonl", "--dataset-path", str(prompts))
    assert moebius(monkeypatch, *arguments, *file, "--endpoint", "/v1/chat/completions") == 0
    out, err = capsys.readouterr()
    assert "the dataset has 3 prompts" in err
    assert f"Successful requests: {3:>29}" in out and f"Total generated tokens: {9:>26}" in out
    words = ("--endpoint", "/v1/chat/completions", "--input-len", "9", "--output-len", "4")
    assert moebius(monkeypatch, *arguments, *words) == 0
    assert f"Total generated tokens: {20:>26}" in capsys.readouterr().out


def test_failures_are_reported_and_all_of_them_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = (503, b'{"error": {"message": "full"}}')
    fake = FakeOpenAI(lambda number, body: refusal if number % 2 else answer(0, (0,)))
    with running(fake) as base:
        arguments = ("serve", "--base-url", base, "--num-prompts", "4", "--input-len", "3")
        assert moebius(monkeypatch, *arguments, "--num-warmups", "0") == 0
        out = capsys.readouterr().out
        assert f"Successful requests: {2:>29}" in out and out.endswith("2 failed: HTTP 503: full\n")
        assert fake.bodies[0]["temperature"] == 0 and fake.bodies[0]["model"] == "fake"
        fake.script = lambda number, body: refusal
        assert moebius(monkeypatch, *arguments, "--num-warmups", "0") == 1
        assert "4 failed: HTTP 503: full" in capsys.readouterr().out


def test_serve_refuses_in_one_line(refused: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert f"no server answers at http://127.0.0.1:{port}" in refused("serve", "--port", port)
    assert f"no server answers at http://[::1]:{port}" in refused(
        "serve", "--host", "::1", "--port", port
    )
    assert "'ttft:x' is no limit" in refused("serve", "--goodput", "ttft:x")
    assert "'fast' is no limit" in refused("serve", "--goodput", "ttft:5", "fast")
    assert "'ttft:5' belongs to no option" in refused("serve", "ttft:5")
    assert "--max-concurrency is 0" in refused("serve", "--max-concurrency", "0")
    assert "--num-prompts is 0" in refused("serve", "--num-prompts", "0")
    assert "use random or jsonl" in refused("serve", "--dataset-name", "sonnet")
    assert "go together" in refused("serve", "--dataset-name", "jsonl")
    assert "the name must end in .png" in refused("serve", "--plot", str(tmp_path / "x.gif"))
    assert "cannot be written" in refused(
        "serve", "--output-json", str(tmp_path / "none" / "x.json")
    )
    with running(FakeOpenAI(lambda number, body: answer(0, ()))) as base:
        assert "--tokenizer 'nowhere' is no directory" in refused(
            "serve", "--base-url", base, "--tokenizer", "nowhere"
        )


def test_latency(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = tmp_path / "figures.json"
    arguments = (
        "latency",
        "--model",
        str(tiny_model),
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--batch-size",
        "3",
    )
    more = ("--num-iters", "3", "--num-iters-warmup", "1", "-n", "2", "--output-json", str(figures))
    assert moebius(monkeypatch, *arguments, *more) == 0
    found = json.loads(figures.read_text())
    assert len(found["latencies"]) == 3 and found["avg_latency"] == pytest.approx(
        sum(found["latencies"]) / 3
    )
    assert found["percentiles"]["50"] == sorted(found["latencies"])[1]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"Avg latency: {found['avg_latency']:.4f} seconds" and out[-1].startswith(
        "99% percentile latency"
    )


def test_throughput(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = tmp_path / "figures.json"
    arguments = (
        "throughput",
        "--model",
        str(tiny_model),
        "--num-prompts",
        "5",
        "--output-json",
        str(figures),
    )
    assert moebius(monkeypatch, *arguments, "--input-len", "8", "--output-len", "4") == 0
    found = json.loads(figures.read_text())
    assert (found["num_requests"], found["total_prompt_tokens"], found["total_output_tokens"]) == (
        5,
        40,
        20,
    )
    assert found["tokens_per_second"] == pytest.approx(60 / found["elapsed_time"])
    assert capsys.readouterr().out.startswith(
        f"Throughput: {found['requests_per_second']:.2f} requests/s, "
    )
    talk = {"conversations": [{"value": "def f("}, {"value": "return n"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk) + "\n")
    file = ("--dataset-name", "jsonl", "--dataset-path", str(tmp_path / "talk.jsonl"))
    assert moebius(monkeypatch, *arguments, *file) == 0
    expected = len(Tokenizer.load(tiny_model).encode("return n"))
    assert json.loads(figures.read_text())["total_output_tokens"] == expected


def test_offline_commands_refuse_in_one_line(refused: Any, tiny_model: Path) -> None:
    model = ("--model", str(tiny_model))
    assert "./none" in refused("latency", "--model", "./none")
    assert "--num-iters is 0" in refused("latency", *model, "--num-iters", "0")
    assert "--num-iters-warmup is -1" in refused("latency", *model, "--num-iters-warmup", "-1")
    assert "--batch-size is 0" in refused("latency", *model, "--batch-size", "0")
    assert "no single batch for --max-num-seqs 64" in refused(
        "latency", *model, "--batch-size", "65"
    )
    assert "context length is 2048" in refused(
        "throughput", *model, "--input-len", "3000", "--num-prompts", "1"
    )
    assert "--num-prompts is 0" in refused("throughput", *model, "--num-prompts", "0")


def test_options_stay_few() -> None:
    counts = {}
    for command in bench.registered_commands:
        assert command.callback is not None
        counts[command.callback.__name__] = len(inspect.signature(command.callback).parameters)
    assert set(counts) == {"latency", "throughput", "serve"} and max(counts.values()) < 40


@pytest.mark.case("C13")
def test_figures_never_replace_what_is_not_figures(refused: Any, tmp_path: Path) -> None:
    """It is said before the run, which may take hours; the file stays as it is."""
    notes = tmp_path / "notes.png"
    notes.write_text("a year of notes")
    for option in ("--output-json", "--plot"):
        assert "holds something else" in refused("serve", "--port", "1", option, str(notes))
    assert notes.read_text() == "a year of notes"


@pytest.mark.case("C13")
def test_figures_and_chart_are_two_files(refused: Any, tmp_path: Path) -> None:
    both = str(tmp_path / "both.png")
    assert "--output-json and --plot are one file" in refused(
        "serve", "--output-json", both, "--plot", both
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("C13")
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures_replace_earlier_ones(tmp_path: Path, suffix: str) -> None:
    from moebius.bench import report

    figures, chart = tmp_path / "figures.json", tmp_path / f"chart.{suffix}"
    for round in (1, 2):
        report.check_outputs(figures, chart)
        report.save_json(figures, {"round": round})
        with report.chart(chart, f"round {round}", 1, 1) as (axis,):
            axis.plot([0, round])
    assert json.loads(figures.read_text())["round"] == 2
