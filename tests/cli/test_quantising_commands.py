"""What quantises and measures, asked wrongly: one line that says what would be right, exit code 2, and
no file that was begun."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.test_commands import moebius
from cli.test_commands import refused as refusal
from moebius.gguf import writer
from moebius.gguf.writer import TensorToWrite


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def in_the_middle(monkeypatch: pytest.MonkeyPatch, happens: object) -> None:
    """Have something happen behind the first tensor of a file."""
    whole = writer._checked

    def checked(tensor: TensorToWrite) -> Iterator[bytes | memoryview]:
        yield from whole(tensor)
        assert callable(happens)
        happens()

    monkeypatch.setattr(writer, "_checked", checked)


def test_sigterm_takes_a_file_back(
    tiny_model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_middle(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    found = moebius(monkeypatch, "quantize", str(tiny_model), str(out / "m.gguf"), "--type", "f32")
    assert found == 143
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_a_full_disk_is_one_line(
    tiny_model: Path,
    out: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    in_the_middle(monkeypatch, full)
    asked = ["quantize", str(tiny_model), str(out / "m.gguf"), "--type", "f32"]
    if command == "generate":
        asked = ["generate", "x", "--model", str(tiny_model), "--quantization", "q8_0"]
    words = refusal(monkeypatch, capsys, *asked)
    assert "cannot be written: No space left on device" in words
    assert [each for each in tmp_path.rglob("*") if each.suffix == ".gguf"] == []
