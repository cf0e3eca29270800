"""A batch's results: what a second run keeps, and that nothing else is ever touched."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from moebius.cli.main import main
from moebius.errors import ConfigError, StorageError
from moebius.server.batch import BatchCall, open_results, read_batch


def call(name: str, prompt: str = "x") -> BatchCall:
    return BatchCall(custom_id=name, url="/v1/completions", body={"prompt": prompt})


def result(of: BatchCall, status: int = 200) -> str:
    """A line as the output has it; its text is only to be kept."""
    answer = {"status_code": status, "request_id": "r", "body": {"text": "grüße"}}
    record = {"id": of.result_id, "custom_id": of.custom_id, "response": answer, "error": None}
    return json.dumps(record, ensure_ascii=False) + "\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(call(name).model_dump_json() + "\n" for name in "abc"))
    return path


def left(output: Path, source: Path) -> list[str]:
    with open_results(output, source, read_batch(source)) as (_, calls):
        return [each.custom_id for each in calls]


def test_what_was_answered_for_good_is_kept(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert left(out, source) == ["a", "b", "c"]
    a, b, failed = result(call("a")), result(call("b"), 400), result(call("c"), 503)
    out.write_text(a + failed + b + result(call("c"))[:40])
    assert left(out, source) == ["c"]
    assert out.read_text() == a + b
    assert left(out, source) == ["c"] and out.read_text() == a + b


@pytest.mark.case("C13")
@pytest.mark.parametrize("kind", ["the same", "a link", "a hard link"])
def test_the_batch_itself_is_never_the_output(tmp_path: Path, source: Path, kind: str) -> None:
    before, out = source.read_text(), tmp_path / "out.jsonl"
    if kind == "a link":
        out.symlink_to(source)
    elif kind == "a hard link":
        os.link(source, out)
    else:
        out = source.parent / "." / source.name
    with pytest.raises(ConfigError, match="is the batch file itself"):
        left(out, source)
    assert source.read_text() == before


@pytest.mark.case("C13")
@pytest.mark.parametrize(
    "held",
    [
        "a year of notes",
        "a year of notes\n",
        '{"id": "batch_req_',  # never whole: a beginning that another line follows
        "[1, 2]\n",
        '{"custom_id": "a", "response": {"status_code": 200}}\n',
        '{"id": "batch_req_1", "custom_id": "a"}\n',
        '{"id": "batch_req_1", "custom_id": ' + "[" * 100_000 + "\n",
        "\n\n",
        '{"a',
    ],
)
def test_a_file_that_holds_something_else_is_refused(
    tmp_path: Path, source: Path, held: str
) -> None:
    out = tmp_path / "notes.txt"
    for text in (held, result(call("a")) + held):
        if held == '{"id": "batch_req_':
            text += "\n" + result(call("b"))
        out.write_text(text)
        with pytest.raises(
            ConfigError,
            match=r"notes\.txt, line \d+: no result of a batch; the file is left as it is",
        ):
            left(out, source)
        assert out.read_text() == text


def test_another_batch_s_answers_are_not_taken_for_these(tmp_path: Path, source: Path) -> None:
    """Names such as request-1 come again and again; the question has to be the same too."""
    out = tmp_path / "out.jsonl"
    for other in (result(call("a", prompt="another question")), result(call("z"))):
        out.write_text(other)
        with pytest.raises(ConfigError, match="line 1: the answer to another batch's call"):
            left(out, source)
        assert out.read_text() == other


@pytest.mark.case("C13")
def test_results_go_through_a_link(tmp_path: Path, source: Path) -> None:
    target, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    target.write_text(result(call("a"), 500) + result(call("b")))
    link.symlink_to(target)
    assert left(link, source) == ["a", "c"]
    assert link.is_symlink() and target.read_text() == result(call("b"))


def test_two_runs_do_not_share_an_output(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out.jsonl"
    with (
        open_results(out, source, read_batch(source)),
        pytest.raises(ConfigError, match="another run"),
    ):
        left(out, source)
    assert left(out, source) == ["a", "b", "c"]


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match="it is a directory"):
        left(tmp_path, source)
    with pytest.raises(StorageError, match="directory that exists"):
        left(tmp_path / "none" / "out", source)


def test_a_full_disk_ends_the_batch_in_one_line(
    tiny_model: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--model", str(tiny_model), "--kv-cache-memory-bytes", "4000000", "--threads", "1"]
    arguments = ["moebius", "generate", "--batch", str(source), "--output", "/dev/full", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        "moebius: --output /dev/full cannot be written: No space left on device; what was answered "
        "is kept, run again to go on"
    )


@pytest.mark.case("C13")
def test_a_second_run_cuts_nothing_out_while_the_first_is_writing(
    tmp_path: Path, source: Path
) -> None:
    """A result half-written is then no trace of a run that was killed."""
    out = tmp_path / "out.jsonl"
    calls = read_batch(source)
    with open_results(out, source, calls) as (file, _):
        half = result(call("a")).encode()
        file.write(half[:30])
        with pytest.raises(ConfigError, match="another run"), open_results(out, source, calls):
            pass
        file.write(half[30:])
    assert out.read_text() == result(call("a"))
    out.write_text(result(call("a"), 500))
    with open_results(out, source, calls) as (file, _):
        assert out.read_bytes() == b""
        with pytest.raises(ConfigError, match="another run"), open_results(out, source, calls):
            pass
        file.write(half)
    assert out.read_text() == result(call("a"))
