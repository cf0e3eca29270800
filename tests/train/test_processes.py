"""Whole runs in processes of their own: killed at any moment, on several ranks, and refused in one
line."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from covering import rest
from moebius.errors import ConfigError, MoebiusError
from moebius.train.data import prepare
from moebius.train.recipe import read_recipe
from moebius.train.run import main_from_recipe
from train.test_export import TOML

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
RUN = TOML.replace(
    "steps = 3\n", "steps = 14\ncheckpoint_seconds = 0\nlog_every = 3\nrows_per_step = 4\n"
).replace("rows_per_step = 2\n", "")


@pytest.fixture(scope="module", autouse=True)
def _flushed() -> Iterator[None]:
    """As the command does, so that runs here and there are the same."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """The small standard library as files, and a recipe over them."""
    folder = tmp_path_factory.mktemp("files")
    corpus = f'[corpus.files]\ncode = "{library}"\n[corpus]\nheldout_share = 0.05\n'
    lines = RUN[RUN.index("[tokenizer]") :]
    (folder / "tiny.toml").write_text(f'name = "tiny"\n{corpus}{lines}')
    return folder


def state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "training" / "checkpoint.safetensors")


def metrics(out: Path) -> list[dict[str, object]]:
    lines = [
        json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {key: x for key, x in line.items() if key not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


@pytest.mark.parametrize("kills", [(4,), rest((1, 6, 10))], ids=["once", "thrice"])
def test_killed_and_resumed_is_the_same_run_bit_for_bit(text: Path, kills: tuple[int, ...]) -> None:
    """kill -9, at whatever moment: early, or later; checkpoints are written at each step."""
    whole, out = (text / f"{name}-{len(kills)}" for name in ("whole", "killed"))
    main_from_recipe(text / "tiny.toml", whole)
    for wanted in kills:
        arguments = ["train", text / "tiny.toml", "--out", out, "--resume"]
        launched = [sys.executable, "-m", "moebius", *map(str, arguments)]
        process = subprocess.Popen(launched, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        lines = out / "training" / "metrics.jsonl"
        checkpoint = out / "training" / "checkpoint.safetensors"
        while process.poll() is None:
            done = len(lines.read_text().splitlines()) * 3 if lines.exists() else 0
            if checkpoint.exists() and done + 1 >= wanted:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was still running"
    main_from_recipe(text / "tiny.toml", out, resume=True)
    first, second = state(whole), state(out)
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert metrics(whole) == metrics(out)


@pytest.mark.exhaustive  # test_ranks has the command on two ranks that are begun another way
def test_torchrun_trains_the_model_that_one_process_does(text: Path) -> None:
    """The whole command on two ranks, which share experts and rows: one set of files, of which
    each is that of one process, within rounding."""
    recipe = (text / "tiny.toml").read_text().replace("= 14", "= 6")
    recipe = recipe.replace("[training]", '[training]\nexport_every = 4\ndtype = "float32"')
    (text / "ranks.toml").write_text(recipe)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "moebius", "train", text / "ranks.toml", "--out", text / "both"]
    command = [*torchrun, *map(str, arguments)]
    done = subprocess.run(
        command, check=True, env=ENVIRONMENT, timeout=120, capture_output=True, text=True
    )
    main_from_recipe(text / "ranks.toml", text / "alone")
    assert done.stdout.count("| all |") == 1 and done.stderr.count("step 6 of 6: loss") == 1
    assert _files(text / "both") == _files(text / "alone")
    for name in ("model", "training/steps/000004/model", "training/checkpoint"):
        alone, both = (load_file(text / out / f"{name}.safetensors") for out in ("alone", "both"))
        assert alone.keys() == both.keys()
        for key, tensor in alone.items():
            torch.testing.assert_close(both[key], tensor, rtol=1e-2, atol=1e-4)
    lines = [metrics(text / out) for out in ("alone", "both")]
    assert len(lines[0]) == len(lines[1])
    for mine, theirs in zip(*lines, strict=True):
        for key in ("loss", "balance", "z", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-4)
        assert mine["expert_load"] == theirs["expert_load"]


def _files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("num_experts_per_tok = 2", "num_experts_per_tok = 9"),
            "top_k (num_experts_per_tok) is 9; it must lie between",
        ),
        (("code = ", "other = 3\ncode = "), "corpus.files.other is 3; it must be a valid string"),
        (
            ("heldout_share = 0.05", "heldout_share = 0.000001"),
            "the corpus holds no held-out text; raise",
        ),
        (
            ("rows_per_step = 4", "rows_per_step = 400000"),
            "the training text has fewer than 400000 rows of 32 tokens",
        ),
        (("[tokenizer]", '[tokenizer]\npath = "nowhere"'), "nowhere/tokenizer.json cannot be read"),
    ],
    ids=lambda x: x[1][:20] if isinstance(x, tuple) else "",
)
def test_bad_input_is_one_line(
    text: Path, change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    (text / "bad.toml").write_text((text / "tiny.toml").read_text().replace(*change))
    with pytest.raises(MoebiusError) as caught:
        main_from_recipe(text / "bad.toml", tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_corpus_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "picture.png").write_bytes(b"\x89PNG\x00")
    recipe = read_recipe(text / "tiny.toml")
    for folder in ("data", "again"):
        corpus = dataclasses.replace(recipe.corpus, files={"code": (str(tmp_path / "none"),)})
        with pytest.raises(ConfigError, match="the corpus holds no text"):
            prepare(dataclasses.replace(recipe, corpus=corpus), tmp_path / folder)
