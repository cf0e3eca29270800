"""Model names: directories, the bundled model, hub ids from the local cache; everything else says what is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebius.errors import ConfigError
from moebius.models.hub import resolve_model


def test_existing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "bundled").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("bundled") == Path("bundled"), "a directory of that name wins"


@pytest.mark.parametrize("name", ["missing", "/no/such/dir", "./a/b", "a/b/c", "~/nowhere-at-all", "", "org/na me"])
def test_what_is_neither_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="hub id"):
        resolve_model(name)


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(str(tmp_path / "model.safetensors"))


def _fake_cache(root: Path) -> Path:
    """A hub cache as huggingface_hub lays it out, holding one model."""
    snapshot = root / "models--org--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = root / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    return snapshot


def test_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    snapshot = _fake_cache(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("org/tiny") == snapshot
    with pytest.raises(ConfigError, match="org/absent"):
        resolve_model("org/absent")
