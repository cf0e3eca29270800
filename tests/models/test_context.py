"""How long a sequence may be: what published config.json files say, with a rotary embedding that
was stretched.

The numbers are those that the models' cards name, and what vLLM derives from the same files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.test_engine import make, run, tokens
from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine, prepare
from moebius.errors import ConfigError
from moebius.models.family import model_config
from tiny import write_model

pytestmark = pytest.mark.case("A7")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 320,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2.5 as its card says": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", **YARN},
        },
        131072,
    ),
    "Qwen3 as its card says, its context a little beyond the original": (
        {
            "model_type": "qwen3",
            "max_position_embeddings": 40960,
            "rope_scaling": {"rope_type": "yarn", **YARN},
        },
        131072,
    ),
    "the same saved by transformers 5": (
        {
            "model_type": "qwen3",
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN},
        },
        131072,
    ),
    "yarn, the context includes the factor": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "yarn", **YARN},
        },
        131072,
    ),
    "yarn, the factor is what lies between the two lengths": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32768},
        },
        131072,
    ),
    "yarn without an original length": (
        {
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "yarn", "factor": 4.0},
        },
        131072,
    ),
    "vicuna-7b-v1.5-16k": (
        {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
        },
        16384,
    ),
    "linear, the context includes the factor": (
        {
            "model_type": "llama",
            "max_position_embeddings": 16384,
            "rope_scaling": {
                "factor": 4.0,
                "type": "linear",
                "original_max_position_embeddings": 4096,
            },
        },
        16384,
    ),
    "linear with half a factor more": (
        {
            "model_type": "llama",
            "max_position_embeddings": 2048,
            "rope_scaling": {"factor": 2.5, "type": "linear"},
        },
        5120,
    ),
    "Llama 3.1": (
        {"model_type": "llama", "max_position_embeddings": 131072, "rope_scaling": LLAMA3},
        131072,
    ),
    "Llama 3.2, whose factor is 32": (
        {
            "model_type": "llama",
            "max_position_embeddings": 131072,
            "rope_scaling": {**LLAMA3, "factor": 32.0},
        },
        131072,
    ),
    "no scaling": ({"model_type": "llama", "max_position_embeddings": 4096}, 4096),
    "scaling of the default type": (
        {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default"},
        },
        4096,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    config, expected = PUBLISHED[name]
    assert model_config(SIZES | config).context == expected


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "linear", "factor": 4.0},
    ],
    ids=lambda scaling: str(scaling["rope_type"]),
)
def test_a_stretched_model_serves_its_whole_context(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    write_model(tmp_path, max_position_embeddings=256)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | {"rope_theta": 10_000.0, "rope_scaling": scaling}))
    assert prepare(tmp_path, EngineConfig()).plan.max_model_len == 1024
    with pytest.raises(
        ConfigError, match="max_model_len = 1025 is beyond the model's 1024 positions"
    ):
        prepare(tmp_path, EngineConfig(max_model_len=1025))
    one = load_engine(tmp_path, EngineConfig(max_model_len=1024, kv_cache_memory_bytes=2**21))
    prompt = torch.randint(3, 320, (1000,), generator=torch.Generator().manual_seed(2)).tolist()
    got = tokens(run(one, [make(one, "long", prompt, max_tokens=6)])["long"])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    assert got == ids[1000:]
