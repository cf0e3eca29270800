"""Model names: directories, the bundled model, hub ids from the local cache; everything else says
what is right."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from moebius.cli.main import main
from moebius.errors import ConfigError
from moebius.models.hub import resolve_model


def model_at(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_existing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(model_at(tmp_path))) == tmp_path
    model_at(tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("bundled") == Path("bundled"), "a directory of that name wins"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/bundled") == tmp_path / "bundled"


# What huggingface_hub itself refuses, and so never asks the hub for.
NO_HUB_ID = ["org/name-", "runs/exp--3", "-org/name", "org/.name", "org/a..b", "org/name.git"]


@pytest.mark.case("C16")
@pytest.mark.parametrize("name", NO_HUB_ID)
def test_what_can_be_no_hub_id_is_refused_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(errors.HFValidationError):
        validate_repo_id(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moebius", "plan", "--", name])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith("moebius: ") and said.count("\n") == 1
    assert name in said and "neither a directory or GGUF file that is here nor a hub id" in said


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "/no/such/dir",
        "./a/b",
        "a/b/c",
        "~/nowhere-at-all",
        "",
        "org/na me",
        "org/näme",
        "a\0b",
        "org/name/",
    ],
)
def test_what_is_neither_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hub id" in refused(name)


@pytest.mark.case("C16")
@pytest.mark.parametrize(
    "name", ["org/name", "a/b", "_x/y_", "Qwen/Qwen3-30B-A3B", "rednote-hilab/dots.llm1.inst"]
)
def test_what_may_be_a_hub_id_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_repo_id(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda asked, **_: str(model_at(tmp_path / "c" / asked)),
    )
    assert resolve_model(name) == tmp_path / "c" / name


REPOSITORY = {
    "config.json": True,
    "generation_config.json": True,
    "tokenizer.json": True,
    "chat_template.jinja": True,
    "additional_chat_templates/tool_use.jinja": True,
    "model.safetensors.index.json": True,
    "model-00001-of-00002.safetensors": True,
    "model-00002-of-00002.safetensors": True,
    "LICENSE": True,
    "consolidated.safetensors": False,
    "consolidated-00001-of-00004.safetensors": False,
    "checkpoint-500/model.safetensors": False,
    "original/consolidated.00.pth": False,
    "pytorch_model-00001-of-00002.bin": False,
    "model-Q4_K_M.gguf": False,
}
"""Files as they lie on the hub, and whether they are needed; Mistral's have every weight twice."""


def test_only_what_is_read_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fake(repo_id: str, **patterns: Any) -> str:
        fetched.extend(filter_repo_objects(REPOSITORY, **patterns))
        return str(model_at(tmp_path / "cache"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    resolve_model("mistralai/Mistral-7B-Instruct-v0.3")
    assert fetched == [name for name, needed in REPOSITORY.items() if needed]


@pytest.mark.case("C16")
def test_places_that_are_no_model_say_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in refused(str(tmp_path / "model.safetensors"))
    assert "without a config.json" in refused(str(tmp_path))
    model_at(tmp_path / "checkpoint-20")
    assert f"did you mean {tmp_path}/checkpoint-20?" in refused(str(tmp_path))
    cached = model_at(tmp_path / "models--org--name" / "snapshots" / "0123")
    assert f"did you mean {cached}?" in refused(str(tmp_path / "models--org--name"))
    assert "no such user" in refused("~nobody-of-that-name/model")
    assert "File name too long" in refused("n" * 5000)


def _fake_cache(root: Path) -> Path:
    """A hub cache as huggingface_hub lays it out, holding one model."""
    snapshot = root / "models--org--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    model_at(snapshot)
    refs = root / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    return snapshot


def test_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = _fake_cache(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("org/tiny") == snapshot
    said = refused("org/absent")
    assert "org/absent" in said and "HF_HUB_OFFLINE" in said and str(tmp_path) in said


def _http(kind: type[errors.HfHubHTTPError], status: int) -> Callable[[], Exception]:
    def make() -> Exception:
        transport: Any = sys.modules[errors.HTTPError.__module__.split(".")[0]]
        request = transport.Request("GET", "https://hub.test/api")
        return kind("refused\n\nsee there", response=transport.Response(status, request=request))

    return make


FAILURES: list[tuple[Callable[[], Exception], str]] = [
    (_http(errors.GatedRepoError, 403), "accept its terms"),
    (
        _http(errors.RepositoryNotFoundError, 404),
        "no such model on the hub; if it is private, set HF_TOKEN",
    ),
    (_http(errors.HfHubHTTPError, 401), "401; look at the token in HF_TOKEN"),
    (_http(errors.HfHubHTTPError, 503), "refused"),
    (_http(errors.RevisionNotFoundError, 404), "refused"),
    (
        lambda: errors.LocalEntryNotFoundError("Got: ConnectError: no route\nplease check"),
        r"hub: ConnectError: no route",
    ),
    (lambda: errors.HTTPError("read timed out"), "read timed out"),
    (lambda: errors.XetDownloadError(), "XetDownloadError"),
    (lambda: errors.HFValidationError("Repo id must be\nother"), "Repo id must be"),
    (lambda: OSError(errno.ENOSPC, "No space left on device"), "disk under .* is full.* HF_HOME"),
    (
        lambda: PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
        "/cache/x cannot be written; set HF_HOME",
    ),
]


@pytest.mark.case("C16")
@pytest.mark.parametrize(("failure", "words"), FAILURES, ids=[words for _, words in FAILURES])
def test_whatever_the_hub_says_is_one_line(
    failure: Callable[[], Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo_id: str, **_: object) -> str:
        raise failure()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=words) as caught:
        resolve_model("org/name")
    assert "org/name" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.case("C16")
def test_a_repository_without_a_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that holds GGUF files alone, nothing is downloaded, and no directory made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, **_: str(tmp_path / "nothing")
    )
    said = refused("org/name-GGUF")
    assert "org/name-GGUF" in said and "config.json" in said
