"""The command's options: what is unknown or impossible is refused before anything is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moebius.cli.commands import app
from moebius.errors import ConfigError
from moebius.train.run import main_from_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.toml"


def refused(tmp_path: Path, *options: str) -> str:
    result = CliRunner().invoke(
        app, ["train", str(RECIPE), "--out", str(tmp_path / "out"), *options]
    )
    assert isinstance(result.exception, ConfigError), result.exception
    assert not (tmp_path / "out").exists()
    return str(result.exception)


@pytest.mark.case("C17")
@pytest.mark.parametrize("more", [[], ["--evaluate-only"], ["--dense-twin"]])
@pytest.mark.parametrize("device", ["xyz", "cuda:1", "CPU", "gpu", ""])
def test_an_unknown_device_is_refused(tmp_path: Path, device: str, more: list[str]) -> None:
    assert (
        refused(tmp_path, "--device", device, *more)
        == f"--device is {device!r}; use auto, cpu or cuda"
    )


@pytest.mark.case("C17")
def test_cuda_without_cuda_is_refused_as_serving_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    served = CliRunner().invoke(app, ["plan", "bundled", "--device", "cuda"])
    assert isinstance(served.exception, ConfigError)
    assert str(served.exception).startswith(refused(tmp_path, "--device", "cuda"))


@pytest.mark.case("C17")
@pytest.mark.parametrize("options", [["--resume"], ["--against", "twin"]])
def test_measuring_takes_no_option_that_it_would_ignore(tmp_path: Path, options: list[str]) -> None:
    assert "takes no --resume and no --against" in refused(tmp_path, "--evaluate-only", *options)


SMALL = """
name = "small"
[corpus]
heldout_share = 0.2
[corpus.files]
prose = ["text"]
[tokenizer]
vocab_size = 270
[model]
model_type = "qwen3"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 8
intermediate_size = 16
max_position_embeddings = 64
[training]
steps = 2
rows_per_step = 2
row_length = 16
learning_rate = 0.001
warmup_steps = 1
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe beside its text."""
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} words and other words\n" * 20)
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


def train(recipe: Path, out: Path, *options: str) -> Exception | None:
    result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(out), *options])
    assert result.exception is None or isinstance(result.exception, ConfigError), result.exception
    return result.exception


@pytest.mark.case("C13")
@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "tokenizer_config.json",
        "model-00001-of-00002.safetensors",
        "training/notes",
        "training/data/a.txt",
    ],
)
def test_training_replaces_nothing_that_no_run_wrote(
    name: str, small: Path, tmp_path: Path
) -> None:
    held = tmp_path / "out" / name
    held.parent.mkdir(parents=True)
    held.write_text("a year of notes")
    (tmp_path / "out" / "training").mkdir(
        exist_ok=True
    )  # of somebody else's: the name is a common one
    for options in ([], ["--resume"]):
        said = str(train(small, tmp_path / "out", *options))
        assert f"holds {Path(name).parts[0]} already, which training would replace" in said
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [held]


def test_a_run_that_ended_while_it_prepared_its_text_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "moebius.train.data._write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            main_from_recipe(small, out)
    assert any((out / "training" / "data").iterdir())
    assert train(small, out) is None


def test_no_run_is_written_into_its_own_corpus(small: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "text", tmp_path / "text" / "below" / "out"):
        assert "which is read as corpus.files.prose" in str(train(small, out))
    assert len(list((tmp_path / "text").iterdir())) == 30
    assert train(small, tmp_path / "text" / ".hidden") is None


def test_a_pipe_is_no_corpus(small: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    small.write_text(SMALL.replace('["text"]', '["pipe"]'))
    assert "pipe is neither a file nor a directory" in str(train(small, tmp_path / "out"))


@pytest.mark.parametrize("damage", ["facts", "no facts", "stream", "no stream", "tokenizer"])
def test_prepared_files_that_are_damaged_are_made_anew(
    damage: str, small: Path, tmp_path: Path
) -> None:
    from moebius.train.data import prepare
    from moebius.train.recipe import read_recipe

    recipe, folder = read_recipe(small), tmp_path / "data"
    whole = prepare(recipe, folder)
    file = {
        "stream": "train.prose.bin",
        "no stream": "train.prose.bin",
        "tokenizer": "tokenizer.json",
    }
    path = folder / file.get(damage, "data.json")
    if damage == "no stream":
        path.unlink()
    elif damage == "no facts":
        path.write_text(json.dumps({"key": json.loads(path.read_text())["key"]}))
    else:
        path.write_bytes(path.read_bytes()[:-99])
    again = prepare(recipe, folder)
    assert again.facts == whole.facts
    assert again.train["prose"].tolist() == whole.train["prose"].tolist()
    assert again.tokenizer.to_str() == whole.tokenizer.to_str()


@pytest.mark.parametrize(
    ("figures", "why"),
    [
        ({}, "holds no figures of a training run"),
        ({"figures": {"all": {"bits_per_byte": 1.0}}}, "holds no figures of a training run"),
        (
            {"figures": {"all": {"bits_per_byte": 1.0}}, "tokens_per_second": 1},
            "no figures of held-out prose text",
        ),
        (
            {"figures": {"all": 1, "prose": {"bits_per_byte": 1}}, "tokens_per_second": 1},
            "no figures of held-out all",
        ),
    ],
)
def test_a_twin_that_does_not_fit_is_refused_before_training(
    figures: dict[str, object], why: str, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "twin" / "training").mkdir(parents=True)
    (tmp_path / "twin" / "training" / "figures.json").write_text(json.dumps(figures))
    assert why in str(train(small, tmp_path / "out", "--against", str(tmp_path / "twin")))
    assert not (tmp_path / "out" / "training" / "checkpoint.safetensors").exists()
