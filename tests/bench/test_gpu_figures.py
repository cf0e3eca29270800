"""What benchmarks/gpu_figures.py measures on a card, rehearsed on models of its kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.crossing import CrossingRows
from moebius.moe.on_host import HostExperts
from moebius.ops import Matrix
from moebius.ops.reference import ReferenceOps

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpu_models, and the folders that it imports from."""
    for folder in ("", "peers"):
        monkeypatch.syspath_prepend(str(BENCHMARKS / folder))
    import gpu_models

    return gpu_models


def test_a_hollow_checkpoint_is_the_published_one_and_takes_no_disk(
    models: Any, tmp_path: Path
) -> None:
    """Sizes counted by hand: 48 layers of 128 experts of 3 x 2,048 x 768, and the rest."""
    nbytes = models.write_hollow(models.card_model("qwen3-30b", small=False), tmp_path)
    attention = 2048 * 128 * (32 + 4 + 4 + 32) + 2 * 128
    layer = attention + 2 * 2048 + 128 * 2048 + 128 * 3 * 2048 * 768
    assert nbytes == 2 * (48 * layer + 2 * 151_936 * 2048 + 2048)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > nbytes and 512 * file.stat().st_blocks < nbytes / 1000
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        head = json.loads(stream.read(size))
        assert head["model.layers.47.mlp.experts.127.down_proj.weight"]["shape"] == [2048, 768]
        stream.seek(8 + size + head["model.norm.weight"]["data_offsets"][0])
        norm = torch.frombuffer(bytearray(stream.read(2 * 2048)), dtype=torch.bfloat16)
        assert norm.eq(1).all()
    assert open_checkpoint(tmp_path).config.experts == dict.fromkeys(range(48), 128)


@pytest.mark.parametrize("name", ["m2", "qwen3-30b", "gpt-oss-20b"])
def test_holes_are_drawn_and_what_was_there_stays(models: Any, tmp_path: Path, name: str) -> None:
    model = models.card_model(name, small=True)
    models.write_hollow(model, tmp_path)
    decoder = load_decoder(tmp_path, torch.float32, ops=ReferenceOps(), mapped=False)
    count = decoder.changes.count
    assert models.draw_holes(decoder) > 10 and decoder.changes.count > count
    assert decoder.norm.weight.eq(1).all()
    embedding = decoder.embed_tokens.weight
    assert 0.019 < embedding.std() < 0.021 and embedding.mean().abs() < 0.001
    for layer in decoder.layers:
        weights = layer.mlp.experts.weights()
        for weight in (*weights.gate_FD, *weights.up_FD, *weights.down_DF):
            wide = Matrix.of(weight).widened(torch.float32)
            assert 0.01 < wide.std() < 0.1 and wide.isfinite().all()
    assert models.draw_holes(decoder) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fake stands in the card's place")
def test_the_host_s_experts_are_pages_of_a_file_and_stay(models: Any, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from gpu_kernels.fake_cuda import FakeCuda

    models.write_hollow(models.card_model("qwen3-30b", small=True), tmp_path)
    config = open_checkpoint(tmp_path).config
    held = {layer: range(2, count) for layer, count in config.experts.items()}
    most = CrossingRows(8, 2, config.hidden_size, torch.bfloat16)
    host = HostExperts(ReferenceOps(), held, config.experts, most)
    with FakeCuda():
        decoder = load_decoder(
            tmp_path, torch.bfloat16, device="cuda", ops=ReferenceOps(), host=host
        )
        assert models.draw_holes(decoder) > 10
        for layer in decoder.layers:
            every = layer.mlp.experts.weights().gate_FD
            drawn = [bool(Matrix.of(weight).planes[0].ne(0).any()) for weight in every]
            assert drawn == [True, True, False, False]


def test_a_step_of_codes_reads_their_bytes(models: Any) -> None:
    """gpt-oss-20b: an expert's three matrices of 2,880 x 2,880 in 4 bits and a quarter; biases are few."""
    stored = models.card_model("gpt-oss-20b", small=False).stored
    assert stored.expert == pytest.approx(3 * 2880 * 2880 * 4.25 / 8, rel=1e-3)
    assert stored.head == 2 * 2880 * 201_088


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", ["figures-m2", "figures-qwen3-30b", "figures-gpt-oss-20b"])
def test_a_stage_rehearsed(tmp_path: Path, stage: str) -> None:
    (tmp_path / "environment.json").write_text('{"bytes_per_second": 1e9, "flops_per_second": 1e9}')
    program = [sys.executable, BENCHMARKS / "gpu_figures.py", stage, "--out", tmp_path]
    done = subprocess.run(
        [*program, "--device", "cpu", "--small"],
        env={**os.environ, "MOEBIUS_CPU_ISA": "reference"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{stage}.json").read_text())
    assert record["finished"] and record["ops"] == "reference"
    for batch in (1, 4):
        found = record[f"decode_{batch}"]
        [step] = found["step_s"]
        assert found["tokens_per_second"] == pytest.approx(batch / step)
        assert found["share_of_bandwidth"] == pytest.approx(found["bytes_per_step"] / step / 1e9)
    assert record["prefill_64"]["operations"] > 0
    assert record["closed_loop"]["output_tokens_per_second"] > 0
