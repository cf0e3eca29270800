"""Tiny models of gpt-oss' type: in MXFP4, with a tokenizer of its format, and one that says what it
is told to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moebius.files import read_json
from oracle import save_tiny
from quantised import change_config
from text.harmony import TEMPLATE, backend

VOCABULARY = 448
# Whole blocks of 32, as 2,880 is, and none of 256.
SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 160, "num_local_experts": 3}
PUBLISHED = Path(__file__).parent / "models" / "published" / "gpt-oss-20b.json"
EXPERTS = "model.layers.{}.mlp.experts."


def write_gpt_oss(directory: Path, **changes: object) -> None:
    """A random one, whose windows are shorter than its prompts."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "max_position_embeddings": 2048,
        "sliding_window": 24,
    }
    save_tiny(directory, "gpt_oss", **{**sizes, **changes})
    backend().save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|return|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_scripted(directory: Path, ids: Sequence[int]) -> None:
    """One whose next token is the one behind its last one in `ids`, each of which is there once."""
    assert len(set(ids)) == len(ids) <= 64
    write_gpt_oss(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "down_proj" in name or "o_proj" in name:
            tensor.zero_()
    # Nothing is added to an embedding, which is one of as many directions.
    embedding = torch.zeros(VOCABULARY, 64)
    head = torch.zeros(VOCABULARY, 64)
    for direction, (token_id, following) in enumerate(pairwise(ids)):
        embedding[token_id, direction] = 1.0
        head[following, direction] = 1.0
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    tensors["model.norm.weight"] = torch.ones(64)
    save_file(tensors, file, metadata={"format": "pt"})


def in_mxfp4(directory: Path, layers: tuple[int, ...] = (0, 1), **changes: object) -> Path:
    """A tiny model whose experts are MXFP4 in these layers. Beside it, in `plain`, which is
    returned, the numbers that transformers makes of them."""
    # Here, as it takes a second to import and most tests need none of it.
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save_tiny(directory, "gpt_oss", **{**SIZES, **changes})
    tensors = load_file(directory / "model.safetensors")
    plain = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for name in ("gate_up_proj", "down_proj"):
            whole = EXPERTS.format(layer) + name
            experts, columns, rows = tensors.pop(whole).shape
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
            tensors |= {f"{whole}_blocks": blocks, f"{whole}_scales": scales}
            plain[whole] = convert_moe_packed_tensors(
                blocks, scales, dtype=torch.float32
            ).contiguous()
    beside = directory / "plain"
    beside.mkdir()
    (beside / "config.json").write_text((directory / "config.json").read_text())
    save_file(plain, beside / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    change_config(directory, quantization_config=read_json(PUBLISHED)["quantization_config"])
    return beside
