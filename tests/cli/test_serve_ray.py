"""moebius serve --ray without a cluster: what is asked wrongly is one line, and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moebius.cli.main import main
from moebius.cli.ray import lasting_name


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    command = ["moebius", "serve", "bundled", "--port", "0", *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    _, err = capsys.readouterr()
    assert end.value.code == 2, err
    return str(err.splitlines()[-1])


def test_options_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    two = ("--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:1", "--ranks", "2")
    assert "Ray says which hosts there are" in refused(monkeypatch, capsys, "--ray", *two)
    key = ("--cluster-key-file", str(tmp_path / "key"))
    assert "a key is drawn at each start" in refused(monkeypatch, capsys, "--ray", *key)
    alone = refused(monkeypatch, capsys, "--ray-allow-unauthenticated")
    assert "of no use without --ray" in alone


def test_ray_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'moebius[ray]'" in refused(monkeypatch, capsys, "--ray")


def test_a_directory_means_the_same_on_every_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert lasting_name(tmp_path.name) == str(tmp_path)
    assert lasting_name("bundled") == "bundled" and lasting_name("org/name") == "org/name"
