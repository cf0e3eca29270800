"""What a GGUF file's keys say, beside the config.json that it was made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from models.gguf_writing import PERMUTED
from moebius.files import read_json
from moebius.gguf import open_gguf
from moebius.models.config import ModelConfig
from moebius.models.description import describe
from moebius.models.family import model_config
from moebius.models.gguf_config import _rope_divisors
from moebius.models.gguf_keys import gguf_keys
from moebius.nn.attention import GQA
from moebius.nn.mixers.latent import MLA
from moebius.nn.rope import RopeConfig, frequencies
from moebius.ops.config import Temperature


def without_rope(config: ModelConfig) -> ModelConfig:
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, rope=None))
        if isinstance(layer.mixer, GQA)
        else replace(layer, mixer=_rounded(layer.mixer))
        if isinstance(layer.mixer, MLA)
        else layer
        for layer in config.layers
    )
    return replace(config, layers=layers)


def _rounded(mixer: MLA) -> MLA:
    """Without rope, and with numbers that float32 and float64 have alike."""
    scale = mixer.scale and round(mixer.scale, 6)
    grows = mixer.temperature
    grows = grows and Temperature(round(grows.beta, 6), grows.original)
    return replace(mixer, rope=None, scale=scale, temperature=grows)


def ropes_of(config: ModelConfig) -> list[RopeConfig | None]:
    return [mixer.rope for mixer in config.mixers if isinstance(mixer, GQA | MLA)]


# What the converter writes although nothing follows from it, as if the key were absent.
NEUTRAL = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "nextn_predict_layers": 0}


def assert_keys_say_the_same(directory: Path, name: str, model_type: str) -> None:
    """Both ways: what the converter writes becomes the configuration, which becomes those keys."""
    config_json = read_json(directory / "config.json")
    found = gguf_keys(config_json)
    theirs = found.architecture.held_config(model_config(config_json))
    ours = describe(directory / "tiny.gguf").config
    names = {
        "mistral": "llama",
        "solar_open": "glm4_moe",
        "glm4_moe_lite": "deepseek_v3",
        "gemma4_unified_text": "gemma4_text",
        "granitemoeshared-none-shared": "granitemoe",
    }
    wanted = names.get(model_type, names.get(f"{model_type}-{name}", model_type))
    assert ours.model_type == wanted
    same = without_rope(replace(ours, model_type=model_type, norm_eps=theirs.norm_eps))
    multipliers = ("embedding_multiplier", "logits_divisor")
    for field in multipliers:
        assert getattr(ours, field) == pytest.approx(getattr(theirs, field))
    # Whose numbers are float32 in the file.
    inexact = (
        "granite",
        "granitemoe",
        "granitemoeshared",
        "granitemoehybrid",
        "dots1",
        "hy_v3",
        "afmoe",
    )
    inexact += ("glm4_moe_lite", "kimi_linear")
    if model_type not in inexact:
        assert same == without_rope(theirs)
    assert ours.norm_eps == pytest.approx(theirs.norm_eps)
    sizes = [
        mixer.rope_dim if isinstance(mixer, MLA) else mixer.head_dim
        for mixer in ours.mixers
        if isinstance(mixer, GQA | MLA)
    ]
    for one, other, size in zip(ropes_of(ours), ropes_of(theirs), sizes, strict=True):
        if one is None or other is None:
            assert one is other
            continue
        assert one.interleaved == other.interleaved or model_type in PERMUTED
        pairs = zip(frequencies(one, size), frequencies(other, size), strict=True)
        assert all(mine == pytest.approx(published, rel=1e-6) for mine, published in pairs)

    written = open_gguf(directory / "tiny.gguf").metadata
    before = f"{found.architecture.name}."
    differing = {
        key: (value, found.keys.get(key))
        for key, value in written.items()
        if key.startswith(before)
        and not key.endswith("yarn_attn_factor")  # written under the name that llama.cpp reads
        and found.keys.get(key, NEUTRAL.get(key.removeprefix(before))) != pytest.approx(value)
    }
    unscaled = f"{before}rope.scaling.type" not in found.keys
    if unscaled:
        differing.pop(f"{before}rope.scaling.original_context_length", None)
    if found.architecture.ropes == "none":  # where nothing turns, what the converter says of it
        differing = {key: each for key, each in differing.items() if f"{before}rope." not in key}
    if f"{before}attention.recurrent_layers" in written:
        differing.pop(f"{before}full_attention_interval", None)  # which those precede
    assert differing == {}
    divisors = _rope_divisors(open_gguf(directory / "tiny.gguf"), "tiny.gguf")
    assert found.rope_divisors == (divisors and pytest.approx(divisors, rel=1e-6))
