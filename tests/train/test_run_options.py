"""The command's options: what is unknown or impossible is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moebius.cli.main import app
from moebius.errors import ConfigError

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.toml"


def refused(tmp_path: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["train", str(RECIPE), "--out", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, ConfigError), result.exception
    assert not (tmp_path / "out").exists()
    return str(result.exception)


@pytest.mark.case("C17")
@pytest.mark.parametrize("more", [[], ["--evaluate-only"], ["--dense-twin"]])
@pytest.mark.parametrize("device", ["xyz", "cuda:1", "CPU", "gpu", ""])
def test_an_unknown_device_is_refused(tmp_path: Path, device: str, more: list[str]) -> None:
    assert refused(tmp_path, "--device", device, *more) == f"--device is {device!r}; use auto, cpu or cuda"


@pytest.mark.case("C17")
def test_cuda_without_cuda_is_refused_as_serving_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    served = CliRunner().invoke(app, ["plan", "bundled", "--device", "cuda"])
    assert isinstance(served.exception, ConfigError)
    assert refused(tmp_path, "--device", "cuda") == str(served.exception)


@pytest.mark.case("C17")
@pytest.mark.parametrize("options", [["--resume"], ["--against", "twin"]])
def test_measuring_takes_no_option_that_it_would_ignore(tmp_path: Path, options: list[str]) -> None:
    assert "takes no --resume and no --against" in refused(tmp_path, "--evaluate-only", *options)
