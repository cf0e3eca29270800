"""Whatever ends a command, a person sees one line; a traceback only when asked for."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from covering import rest
from moebius.cli import main as command_line
from moebius.cli.border import report
from moebius.errors import ConfigError, StorageError


def ended_by(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = report(error)
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moebius", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_an_error_on_purpose_is_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_by(ConfigError("threads is 0; use 1"), capsys) == (
        2,
        "moebius: threads is 0; use 1\n",
    )
    assert ended_by(StorageError("the disk is full"), capsys) == (2, "moebius: the disk is full\n")


def test_the_system_s_errors_name_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "none").read_text()
    line = f"moebius: {tmp_path / 'none'}: No such file or directory\n"
    assert ended_by(caught.value, capsys) == (1, line)


def test_what_nobody_foresaw_is_one_bounded_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError) as caught:
        int("many\nlines\n" * 500)
    code, err = ended_by(caught.value, capsys)
    assert code == 1 and err.startswith("moebius: unexpected ValueError: ") and err.count("\n") == 1
    assert len(err) < 800 and "MOEBIUS_TRACEBACK=1" in err


def test_of_a_group_of_tasks_the_one_that_failed_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = BaseExceptionGroup(
        "tasks",
        [
            asyncio.CancelledError(),
            ExceptionGroup("inner", [OSError(28, "No space left on device", "out")]),
        ],
    )
    assert ended_by(group, capsys) == (1, "moebius: out: No space left on device\n")


def test_an_interruption_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_by(KeyboardInterrupt(), capsys) == (130, "")


@pytest.mark.parametrize("module", ["typer", "moebius.cli.bench", "moebius.schedule.config"])
def test_an_interruption_while_it_starts_is_silent(module: str) -> None:
    """Most of a short command's time goes into imports."""
    code = f"""
import signal, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["moebius", "version"]
from moebius.cli.main import script
script()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_foreign_errors_pass_the_border(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def foreign() -> None:
        raise KeyError("what a library dropped")

    monkeypatch.setattr("moebius.cli.commands.app", foreign)
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert end.value.code == 1
    assert (
        "unexpected KeyError: 'what a library dropped' (at moebius/cli/main.py:"
        in capsys.readouterr().err
    )


LONG = "x" * 300
"""Longer than a file's name may be: whatever opens it fails inside Python itself."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", LONG],
        ["generate", "hello", "--model", LONG],
        ["chat", LONG],
        ["plan", LONG],
        ["inspect", LONG, "--text", LONG],
        ["replay", LONG],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_command_lets_a_foreign_error_through(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moebius", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert end.value.code in (1, 2)
    is_one_line(capsys.readouterr().err)


def test_nor_does_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes the process's floating-point control and threads before it reads anything."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["moebius", "train", LONG, "--out", str(tmp_path / "out")])
    try:
        with pytest.raises(SystemExit) as end:
            command_line.main()
    finally:
        torch.set_flush_denormal(False)
    assert end.value.code in (1, 2)
    is_one_line(capsys.readouterr().err)


def is_one_line(told: str) -> None:
    assert "Traceback" not in told and told.count("moebius: ") == 1, told
    assert told.count("\n") == 1


def test_a_traceback_on_request() -> None:
    done = python("replay", "/proc/self/mem", MOEBIUS_TRACEBACK="1")
    assert done.returncode != 0 and "Traceback" in done.stderr and "moebius: " in done.stderr


@pytest.mark.parametrize("command", ["--help | true", rest("plan bundled --json | head -c 10")])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    line = f"'{sys.executable}' -m moebius {command}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


@pytest.mark.case("C25")
def test_the_version_is_told() -> None:
    import moebius

    assert python("--version").stdout == f"{moebius.__version__}\n" == python("version").stdout


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("version >&-", 0),
        rest("plan bundled >&-", 0),
        rest("plan bundled --json >&- 2>&- <&-", 0),
        ("generate 'a b' --max-tokens 2 <&- >&-", 0),
        rest("chat <&-", 0),
        ("replay no/where/at/all 2>&-", 2),
        rest("plan no/where/at/all 2>&-", 2),
    ],
)
def test_streams_that_came_closed_are_empty_ones(command: str, code: int) -> None:
    line = f"'{sys.executable}' -m moebius {command}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "")
    assert "moebius: " not in done.stdout  # an error goes to stderr or nowhere


def test_a_closed_stdin_is_empty() -> None:
    code = (
        "import sys; from moebius.cli.border import open_streams; "
        "open_streams(); print(sys.stdin.read())"
    )
    line = f"'{sys.executable}' -c '{code}' <&-"
    closed = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (closed.returncode, closed.stdout, closed.stderr) == (0, "\n", "")


def test_an_empty_stdin_is_no_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moebius", "generate"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as empty:
        command_line.main()
    assert empty.value.code == 2 and "at least" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_closed_stdin_is_an_empty_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"'{sys.executable}' -m moebius generate <&-"
    closed = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    monkeypatch.setattr(sys, "argv", ["moebius", "generate"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as empty:
        command_line.main()
    told = capsys.readouterr().err
    assert (closed.returncode, closed.stderr) == (empty.value.code, told) and "at least" in told


@pytest.mark.case("C13")
def test_results_and_trace_are_two_files(tmp_path: Path) -> None:
    calls, both = tmp_path / "calls.jsonl", tmp_path / "both.jsonl"
    calls.write_text(
        json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a"}})
    )
    done = python("generate", "--batch", str(calls), "--output", str(both), "--trace", str(both))
    assert (done.returncode, done.stderr) == (
        2,
        f"moebius: --output and --trace are one file, {both}; name two\n",
    )
    assert not both.exists()
