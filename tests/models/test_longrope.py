"""longrope (Phi-3): which frequencies are taken, by the longest sequence that an engine serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from models.gguf_writing import Converter
from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.errors import ConfigError, WeightsError
from moebius.models.family import model_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.nn.attention import GQA
from moebius.ops.reference import ReferenceOps
from oracle import Server, assert_close, load_theirs, save_tiny
from tiny import write_tokenizer

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 4.0],
}
CHANGES: dict[str, Any] = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
}
IDS = [i * 7 % 67 for i in range(40)]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"rope_parameters": {**LONGROPE, "attention_factor": 1.4}},
        {"rope_parameters": {**LONGROPE, "factor": 2.0}},
    ],
    ids=["usual", "attention-factor", "factor"],
)
@pytest.mark.parametrize(("length", "serves"), [(16, 16), (17, 17), (40, None)])
def test_one_sequence_is_as_transformers_has_it(
    tmp_path: Path, more: dict[str, Any], length: int, serves: int | None
) -> None:
    """One up to the original context with the short factors, a longer one with the long ones."""
    save_tiny(tmp_path, "phi3", **{**CHANGES, **more})
    checkpoint = open_checkpoint(tmp_path)
    at = replace(checkpoint, config=checkpoint.config.at_length(serves))
    server = Server(load_decoder(at, torch.float32, ops=ReferenceOps()), 4, 12)
    server.step([(0, IDS[:9])])
    server.step([(0, IDS[9:length])])
    with torch.inference_mode():
        theirs = load_theirs(tmp_path)(torch.tensor([IDS[:length]])).logits[0]
    assert_close(server.all_logits(0), theirs)


def divisors(config: Any) -> tuple[float, ...] | None:
    (rope,) = {mixer.rope for mixer in config.mixers if isinstance(mixer, GQA)}
    found: tuple[float, ...] | None = rope.divisors
    return found


@pytest.mark.parametrize(
    ("length", "factors"),
    [(16, "short_factor"), (8, "short_factor"), (17, "long_factor"), (None, "long_factor")],
)
def test_an_engine_takes_those_of_its_longest_sequence(
    tmp_path: Path, length: int | None, factors: str
) -> None:
    save_tiny(tmp_path, "phi3", vocab_size=320, **CHANGES)
    write_tokenizer(tmp_path)
    prepared = prepare(tmp_path, EngineConfig(block_size=8, max_model_len=length))
    assert divisors(prepared.decoder.config) == tuple(LONGROPE[factors])  # type: ignore[arg-type]
    assert prepared.plan.max_model_len == length or length is None


def test_the_old_spelling_is_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path, "phi3", **CHANGES)
    raw = json.loads((tmp_path / "config.json").read_text())
    given = raw.pop("rope_parameters")
    old = {
        **raw,
        "rope_theta": given["rope_theta"],
        "rope_scaling": {
            "type": "su",
            "short_factor": given["short_factor"],
            "long_factor": given["long_factor"],
        },
    }
    assert model_config(old) == model_config({**raw, "rope_parameters": given})


def test_other_models_are_one_at_any_length() -> None:
    raw = json.loads((Path(__file__).parent / "published" / "Qwen3-0.6B.json").read_text())
    config = model_config(raw)
    assert config.at_length(8) is config and config.at_length(None) is config


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.4}], ids=["usual", "factor"])
@pytest.mark.parametrize(("length", "serves"), [(16, 16), (40, None)])
def test_a_gguf_file_means_the_same(
    tmp_path: Path, more: dict[str, Any], length: int, serves: int | None
) -> None:
    """By the rules of llama.cpp's converter: the factors are tensors."""
    changes = {**CHANGES, "rope_parameters": {**LONGROPE, **more}}
    save_tiny(tmp_path, "phi3", **changes)
    Converter(tmp_path).save(tmp_path / "file.gguf")
    checkpoint = open_checkpoint(tmp_path / "file.gguf")
    at = replace(checkpoint, config=checkpoint.config.at_length(serves))
    server = Server(load_decoder(at, torch.float32, ops=ReferenceOps()), 4, 12)
    server.step([(0, IDS[:length])])
    with torch.inference_mode():
        theirs = load_theirs(tmp_path)(torch.tensor([IDS[:length]])).logits[0]
    assert_close(server.all_logits(0), theirs)


class Damaged(Converter):
    """long: the tensor of long factors; None for none."""

    long: list[float] | None = None

    def rope_freqs(self, writer: gguf.GGUFWriter) -> None:
        short = np.array(LONGROPE["short_factor"], dtype=np.float32)
        writer.add_tensor("rope_factors_short.weight", short)
        if self.long is not None:
            writer.add_tensor("rope_factors_long.weight", np.array(self.long, dtype=np.float32))


@pytest.mark.parametrize(
    ("long", "kind", "words"),
    [
        (None, None, "rope_factors_long.weight is missing"),
        ([1.0, 0.0, 2.0], None, "rope_factors_long.weight must hold positive finite numbers"),
        ([1.5, 2.5, 4.0], gguf.RopeScalingType.YARN, "rope.scaling.type is another than longrope"),
        ([1.5, 2.5], None, "2 divisors"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    tmp_path: Path, long: list[float] | None, kind: gguf.RopeScalingType | None, words: str
) -> None:
    save_tiny(tmp_path, "phi3", **CHANGES)
    damaged = Damaged(tmp_path)
    damaged.long = long
    damaged.save(
        tmp_path / "file.gguf", None if kind is None else lambda w: w.add_rope_scaling_type(kind)
    )
    with pytest.raises((ConfigError, WeightsError), match=words) as caught:
        open_checkpoint(tmp_path / "file.gguf")
    assert "\n" not in str(caught.value)
