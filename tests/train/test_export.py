"""The exported directory against transformers, and the whole command on a tiny recipe."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from moebius.cli.main import main
from moebius.errors import ConfigError
from moebius.models.store import save as weights_module
from moebius.models.store.load import load_decoder
from moebius.nn.packed import PackedPast
from moebius.train.data import PreparedData, bytes_per_token
from moebius.train.evaluate import score
from moebius.train.export import export, parameter_counts
from moebius.train.recipe import Recipe
from moebius.train.run import main_from_recipe
from moebius.train.trainer import Trainer

TOML = """
name = "tiny"
[corpus]
heldout_share = 0.2
[corpus.files]
library = "library.jsonl"
docs = "docs.jsonl"
chat = "chat.jsonl"
[mixture]
docs = 0
[tokenizer]
vocab_size = 300
[model]
model_type = "qwen3_moe"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
num_experts = 4
num_experts_per_tok = 2
norm_topk_prob = true
moe_intermediate_size = 8
max_position_embeddings = 64
[training]
steps = 3
rows_per_step = 2
row_length = 32
learning_rate = 0.01
warmup_steps = 1
"""


@pytest.fixture(scope="module")
def exported(recipe: Recipe, data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = Trainer(recipe, data)
    for _ in range(4):
        trainer.step()
    folder = tmp_path_factory.mktemp("exported")
    export(trainer, folder)
    return folder


@pytest.fixture(scope="module")
def oracle(exported: Path) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()


@torch.no_grad()
def test_transformers_and_the_decoder_agree_on_it(
    exported: Path, oracle: torch.nn.Module, data: PreparedData
) -> None:
    ids = torch.tensor(data.tokenizer.encode("def f(x):\n    return x + 1\n").ids)
    expected = oracle(ids.unsqueeze(0)).logits[0]
    decoder = load_decoder(exported, torch.float32)
    hidden, _ = decoder(ids, torch.arange(len(ids)), PackedPast(len(ids)))
    torch.testing.assert_close(decoder.logits(hidden), expected, atol=1e-4, rtol=1e-4)
    assert oracle.config.norm_topk_prob
    assert oracle.generation_config.eos_token_id == [0, 2]
    stored = load_decoder(exported, torch.bfloat16)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert json.loads((exported / "config.json").read_text())["torch_dtype"] == "bfloat16"


@torch.no_grad()
def test_bits_per_byte_against_transformers(
    recipe: Recipe, exported: Path, oracle: torch.nn.Module, data: PreparedData
) -> None:
    """Each document alone, each row of it alone, through transformers."""
    stream, length = np.asarray(data.heldout["library"][:150]).copy(), 48
    stream[[20, 60, 61]] = 0
    nats, num_bytes, sizes = 0.0, 0, bytes_per_token(data.tokenizer)
    tokens = torch.from_numpy(stream.astype(np.int64))
    for start in range(0, len(tokens) - 1, length):
        row = tokens[start : start + length]
        row = row[: len(tokens) - 1 - start]
        cuts = [0, *[i for i in range(1, len(row)) if row[i] == 0], len(row)]
        for a, b in itertools.pairwise(cuts):
            targets = tokens[start + a + 1 : start + b + 1]
            logits = oracle(row[a:b].unsqueeze(0)).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            num_bytes += int(sizes[targets].sum())
    measured = score(load_decoder(exported, torch.float32), stream, data, length)
    assert measured.num_tokens == len(stream) - 1
    assert measured.num_bytes == num_bytes
    assert measured.nats == pytest.approx(nats, rel=1e-4)
    assert measured.bits_per_byte == pytest.approx(nats / num_bytes / math.log(2), rel=1e-4)


def test_parameters_a_token_uses(recipe: Recipe, data: PreparedData) -> None:
    decoder = Trainer(recipe, data).decoder
    experts = 2 * 3 * 32 * 16
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 8 + 2 * 32 + 4 * 32)
    rest = 320 * 32 + 32 + attention
    assert parameter_counts(decoder) == (rest + 4 * experts, rest + 2 * experts)


def test_from_recipe_to_directory_and_back(text: Path, tmp_path: Path) -> None:
    shutil.copytree(text, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tiny.toml").write_text(TOML)
    out = tmp_path / "model"
    figures = main_from_recipe(tmp_path / "tiny.toml", out)
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "training",
    }
    again = main_from_recipe(tmp_path / "tiny.toml", out, evaluate_only=True)
    assert again == figures
    card = (out / "README.md").read_text()
    assert f"**{figures['all']['bits_per_byte']:.3f}**" in card
    report = json.loads((out / "training" / "inspection" / "report.json").read_text())
    assert report["model"]["name"] == "tiny" and len(report["layers"]) == 1
    assert (out / "training" / "inspection" / "report.html").exists()
    total = figures["all"]
    parts = [f for kind, f in figures.items() if kind != "all"]
    assert total["bytes"] == sum(f["bytes"] for f in parts)
    weighted = sum(f["bits_per_byte"] * f["bytes"] for f in parts) / total["bytes"]
    assert total["bits_per_byte"] == pytest.approx(weighted)
    assert 0 < total["xz_bits_per_byte"] < total["gzip_bits_per_byte"] * 1.5 < 8
    with pytest.raises(
        ConfigError, match="holds a training run already; continue it with --resume"
    ):
        main_from_recipe(tmp_path / "tiny.toml", out)
    twin = tmp_path / "twin"
    dense = main_from_recipe(tmp_path / "tiny.toml", twin, dense_twin=True)
    assert json.loads((twin / "config.json").read_text())["model_type"] == "qwen3"
    assert not (twin / "training" / "inspection").exists()
    continued = main_from_recipe(tmp_path / "tiny.toml", out, resume=True, against=twin)
    assert continued == figures
    card = (out / "README.md").read_text()
    assert f"**{total['bits_per_byte']:.3f}** | {dense['all']['bits_per_byte']:.3f} |" in card
    assert "(the dense twin: " in card
    assert (
        f"MaxVio {total['max_violation'][0]:.2f} by layer; dead experts: {total['dead_experts']}."
        in card
    )
    assert len(total["max_violation"]) == 1 and 0 <= total["max_violation"][0] <= 3


def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    from moebius.cli.commands import app

    (tmp_path / "tiny.toml").write_text(TOML)
    arguments = ["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path), "--evaluate-only"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "holds no model to evaluate" in str(result.exception)
    assert CliRunner().invoke(app, ["train", str(tmp_path / "tiny.toml")]).exit_code == 2


@pytest.mark.case("C10")
def test_the_deepseek_recipe_runs_to_its_end(text: Path, tmp_path: Path) -> None:
    """recipes/deepseek.toml, smaller: its last step writes a report of its routers."""
    recipe = (Path(__file__).parent.parent.parent / "recipes" / "deepseek.toml").read_text()
    smaller = {
        "stdlib/text": str(text),
        "hidden_size = 256": "hidden_size = 32",
        "head_dim = 64": "head_dim = 8",
        "num_hidden_layers = 4": "num_hidden_layers = 2",
        "intermediate_size = 488": "intermediate_size = 64",
        "n_routed_experts = 32": "n_routed_experts = 8",
        "moe_intermediate_size = 96": "moe_intermediate_size = 16",
        "steps = 2000": "steps = 3\nwarmup_steps = 1",
        "rows_per_step = 16": "rows_per_step = 2",
        "row_length = 256": "row_length = 64",
        "[training]": "[tokenizer]\nvocab_size = 320\n[training]",
        'tests = "': '# tests = "',
    }
    for old, new in smaller.items():
        assert old in recipe
        recipe = recipe.replace(old, new)
    (tmp_path / "deepseek.toml").write_text(recipe)
    main_from_recipe(tmp_path / "deepseek.toml", tmp_path / "out")
    report = (tmp_path / "out" / "training" / "inspection" / "report.json").read_text()
    router = json.loads(report, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[
        "router"
    ]
    assert router["selection_bias"] and router["num_experts"] == 8
    for file in (tmp_path / "out").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.case("C19")
def test_a_full_disk_at_the_end_is_one_line_and_the_run_is_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("library", "docs", "chat"):
        shutil.copy(text / f"{kind}.jsonl", tmp_path)
    (tmp_path / "tiny.toml").write_text(TOML)
    arguments = ["moebius", "train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out")]

    def full(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half a model")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    def train(*more: str) -> object:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    with monkeypatch.context() as disk:
        disk.setattr(weights_module, "save_file", full)
        assert train() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last.startswith("moebius: ")
        and "model.safetensors cannot be written" in last
        and "No space left" in last
    )
    assert (tmp_path / "out" / "training" / "checkpoint.safetensors").exists()
    assert not any(path.name.endswith(".safetensors") for path in (tmp_path / "out").iterdir())
    assert train("--resume") == 0
    assert load_decoder(tmp_path / "out", torch.bfloat16).config.model_type == "qwen3_moe"
