"""Checkpoints that are quantised already, as Hugging Face's world has them, quantised otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import save_file

from covering import each_value
from moebius.models.store import open_checkpoint
from moebius.quantize.cached import Quantized
from moebius.quantize.export import write_model
from oracle import save_tiny
from quantised import KINDS, write_quantised
from tiny import write_tokenizer

# One of each way in which planes lie: blocks, rows, zero points, columns out of order, stacks.
SOME = ["fp8-block", "fp8-row", "mxfp4", "nvfp4-pack-quantized", "pack-4-zeros", "gptq-ordered",
        "awq", "mlx-4"]  # fmt: skip
SIZES = {
    "llama": {"intermediate_size": 96, "num_attention_heads": 4},
    "qwen3_moe": {"moe_intermediate_size": 32, "head_dim": 16},
}


def both(directory: Path, kind: str, model_type: str) -> tuple[Path, Path]:
    """A checkpoint of that kind, and the same numbers as plain ones."""
    quantised = directory / "quantised"
    plain = directory / "plain"
    for at in (quantised, plain):
        at.mkdir()
        save_tiny(at, model_type, hidden_size=64, vocab_size=320, **SIZES[model_type])
        write_tokenizer(at)
    meant = write_quantised(quantised, KINDS[kind])
    save_file(
        {name: each.contiguous() for name, each in meant.items()}, plain / "model.safetensors"
    )
    return quantised, plain


@pytest.mark.parametrize(("kind", "model_type"), each_value(SOME, SIZES))
def test_the_file_is_that_of_the_numbers(kind: str, model_type: str, tmp_path: Path) -> None:
    quantised, plain = both(tmp_path, kind, model_type)
    found = []
    for at in (quantised, plain):
        write_model(at, at / "out.gguf", "q8_0")
        found.append({each.name: each for each in gguf.GGUFReader(at / "out.gguf").tensors})
    one, other = found
    assert set(one) == set(other)
    for name, tensor in other.items():
        assert one[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(one[name].data, tensor.data), name


def test_a_cache_is_made_of_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    quantised, _ = both(tmp_path, "fp8-block", "qwen3_moe")
    assert "quantization_config" in json.loads((quantised / "config.json").read_text())
    made = Quantized.of(open_checkpoint(quantised), "q8_0")
    made.make()
    formats = {tensor.format for tensor in made.checkpoint.tensors.values()}
    assert formats == {"q8_0", "float32"}
    assert all(not tensor.parts for tensor in made.checkpoint.tensors.values())
