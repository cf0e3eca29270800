"""Whole models by our kernels: the operations fit together, and an engine gives one answer with
them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from covering import chosen
from gpu_kernels.conftest import DEVICE
from moebius.models.store import PlannedWeight, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.ops import Matrix, Ops
from moebius.ops.formats import planes_of_blocks
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import TritonOps
from moebius.quantize.export import write_model
from moebius.request.params import SamplingParams
from oracle import load_theirs, save_tiny
from quantised import held
from random_schedules import Wish, alone, answers, each_alone, groups_of, random_schedule
from tiny import write_tokenizer
from tiny_gpt_oss import SIZES, in_mxfp4

OPS = TritonOps()
REF = ReferenceOps()


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


def test_blocks_that_kernels_read_badly_become_planes(tmp_path: Path) -> None:
    """MXFP4's of a GGUF file: planes of as many bytes, and the same numbers."""
    model = tmp_path / "model"
    in_mxfp4(model, vocab_size=320)
    write_tokenizer(model)
    out = tmp_path / "out.gguf"
    write_model(model, out, "mxfp4")
    checkpoint = open_checkpoint(out)

    def plan(ops: Ops) -> list[PlannedWeight]:
        return checkpoint.plan_weights("float32", "cuda", ops.formats(torch.float32))

    blocks = plan(REF)
    for mine, its in zip(plan(OPS), blocks, strict=True):
        assert (mine.name, mine.nbytes) == (its.name, its.nbytes)
        assert mine.format == ("mxfp4_planes" if its.format == "mxfp4" else its.format)
    assert sum(its.format == "mxfp4" for its in blocks) == 2 * 3 * SIZES["num_local_experts"]
    mine, its = (
        held(load_decoder(out, torch.float32, device=DEVICE, ops=ops)) for ops in (OPS, REF)
    )
    for name, weight in its.items():
        numbers, wanted = (
            each.widened(torch.float32) if isinstance(each, Matrix) else each
            for each in (mine[name], weight)
        )
        assert torch.equal(numbers, wanted), name


def test_a_block_whose_scale_is_no_planes_is_refused() -> None:
    blocks = torch.zeros(2, 34, dtype=torch.uint8)
    blocks[1, 17] = 255
    with pytest.raises(ValueError, match=r"a scale of its MXFP4 blocks is 2\^128"):
        planes_of_blocks(blocks)


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
