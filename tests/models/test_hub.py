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
from huggingface_hub import ModelInfo, constants, errors
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
class FakeHub:
    """A repository of these files, a byte or more each, which are there once they are fetched."""

    def __init__(self, root: Path, files: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.files, self.fetched = root, files, set[str]()
        monkeypatch.chdir(root)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.info)

    def download(self, repo_id: str, **patterns: Any) -> str:
        snapshot = self.root / "cache" / repo_id
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(self.files, **patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(b"{}")
            self.fetched.add(name)
        return str(snapshot)

    def info(self, repo_id: str, *, files_metadata: bool) -> ModelInfo:
        siblings = [{"rfilename": name, "size": size} for name, size in self.files.items()]
        return ModelInfo(id=repo_id, siblings=siblings)


GGUF_FILES = {
    "README.md": 10,
    "config.json": 10,
    "tokenizer.json": 10,
    "mmproj-model-f16.gguf": 900_000_000,
    "m-Q4_K_M.gguf": 18_600_000_000,
    "m-Q8_0.gguf": 32_500_000_000,
    "BF16/m-BF16-00001-of-00002.gguf": 40_000_000_000,
    "BF16/m-BF16-00002-of-00002.gguf": 21_000_000_000,
}
SMALL = {"README.md", "config.json", "tokenizer.json"}


def test_a_repository_without_a_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(tmp_path, {"README.md": 10}, monkeypatch)
    said = refused("org/name")
    assert "org/name" in said and "config.json" in said


def test_of_a_repository_of_gguf_files_just_the_one_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path, GGUF_FILES, monkeypatch)
    assert refused("org/m-GGUF") == (
        "org/m-GGUF holds several models; choose one by --file: BF16/m-BF16-00001-of-00002.gguf "
        "(61 GB in 2 files), m-Q4_K_M.gguf (18.6 GB), m-Q8_0.gguf (32.5 GB)"
    )
    assert hub.fetched == SMALL
    here = tmp_path / "cache" / "org" / "m-GGUF"
    assert resolve_model("org/m-GGUF", "q4_k_m") == here / "m-Q4_K_M.gguf"
    assert hub.fetched == {*SMALL, "m-Q4_K_M.gguf"}
    parts = [name for name in GGUF_FILES if name.startswith("BF16/")]
    assert resolve_model("org/m-GGUF", parts[1]) == here / parts[0]
    assert hub.fetched == {*SMALL, "m-Q4_K_M.gguf", *parts}
    with pytest.raises(ConfigError, match="no model of --file Q2_K; it holds BF16/"):
        resolve_model("org/m-GGUF", "Q2_K")
    with pytest.raises(ConfigError, match=r"several models of --file Q: m-Q4_K_M\.gguf \(18"):
        resolve_model("org/m-GGUF", "Q")


def test_a_repository_of_one_gguf_file_needs_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: 5_000 for name in ("README.md", "one.gguf")}
    FakeHub(tmp_path, files, monkeypatch)
    assert resolve_model("org/one").name == "one.gguf"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked"))
    assert resolve_model("org/one").name == "one.gguf", "what the cache has, it has"


def test_safetensors_are_preferred_where_no_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path, {**GGUF_FILES, "model.safetensors": 9}, monkeypatch)
    assert resolve_model("org/both") == tmp_path / "cache" / "org" / "both"
    assert hub.fetched == {*SMALL, "model.safetensors"}
    assert resolve_model("org/both", "m-Q8_0.gguf").name == "m-Q8_0.gguf"


def test_gguf_files_of_a_directory(tmp_path: Path) -> None:
    for name in ("a-Q8_0.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(bytes(2_000_000))
    assert resolve_model(str(tmp_path)) == tmp_path / "a-Q8_0.gguf"
    assert resolve_model(str(tmp_path / "a-Q8_0.gguf")) == tmp_path / "a-Q8_0.gguf"
    for part in (1, 2, 3):
        (tmp_path / f"b-0000{part}-of-00003.gguf").write_bytes(bytes(1_500))
    assert refused(str(tmp_path)) == (
        f"{tmp_path} holds several models; choose one by --file: a-Q8_0.gguf (2 MB), "
        "b-00001-of-00003.gguf (4.5 kB in 3 files)"
    )
    first = tmp_path / "b-00001-of-00003.gguf"
    assert resolve_model(str(tmp_path), "b-") == first
    assert resolve_model(str(tmp_path / "b-00002-of-00003.gguf")) == first
    assert "there is no file" in refused(str(tmp_path / "c.gguf"))
    with pytest.raises(ConfigError, match="chooses among a directory's files"):
        resolve_model(str(first), "a")
    model_at(tmp_path)
    assert resolve_model(str(tmp_path)) == tmp_path, "what has been a model stays one"
    assert resolve_model(str(tmp_path), "Q8").name == "a-Q8_0.gguf"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no GGUF file"):
        resolve_model(str(tmp_path / "empty"), "Q8")
