"""Whole models by our kernels: the operations fit together, and an engine gives one answer with
them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from covering import chosen
from gpu_kernels.conftest import DEVICE
from moebius.models.store.load import load_decoder
from moebius.ops.triton import TritonOps
from moebius.request.params import SamplingParams
from oracle import load_theirs, save_tiny
from random_schedules import Wish, alone, answers, each_alone, groups_of, random_schedule

OPS = TritonOps()


def is_float32(dtype: torch.dtype) -> bool:
    """In bfloat16 the interpreter takes three times as long."""
    return dtype == torch.float32


@pytest.mark.parametrize(
    "model_type",
    chosen(
        ["qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3", "gemma4_text"],
        lambda name: name in ("gpt_oss", "qwen3_next", "deepseek_v3"),
    ),
)
def test_greedy_tokens_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, model_type, vocab_size=300, max_position_embeddings=64)
    decoder = load_decoder(tmp_path, torch.float32, device=DEVICE, ops=OPS)
    rng = random.Random(model_type)
    prompt = tuple(rng.randrange(300) for _ in range(11))
    wish = Wish("a", prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), 0)
    whole = load_theirs(tmp_path).generate(
        torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert alone(decoder, wish)[0] == whole[0, 11:].tolist()


@pytest.mark.parametrize("dtype", chosen([torch.bfloat16, torch.float32], is_float32), ids=str)
def test_one_answer_in_any_batch(dtype: torch.dtype, tmp_path: Path, sums_in_order: None) -> None:
    """By value, where it is interpreted: chunks, neighbours and caches change no token and no
    log-probability."""
    sizes = {"vocab_size": 300, "max_position_embeddings": 256, "num_hidden_layers": 1}
    save_tiny(tmp_path, "qwen3_moe", **sizes)
    decoder = load_decoder(tmp_path, dtype, device=DEVICE, ops=OPS)
    rng = random.Random(0)
    params = SamplingParams(temperature=1.0, max_tokens=2, logprobs=2, ignore_eos=True)
    asked = [
        Wish(str(i), tuple(rng.randrange(300) for _ in range(length)), params, i)
        for i, length in enumerate((18, 1))
    ]
    expected = each_alone(decoder, asked)
    schedule = random_schedule(len(asked), rng, groups_of(decoder))
    for found in answers(decoder, asked, schedule).rounds:
        assert found == expected, schedule
