"""Tiny models of gpt-oss' type, with a tokenizer of its format; one that says what it is told to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from oracle import save_tiny
from text.harmony import TEMPLATE, backend

VOCABULARY = 448


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
