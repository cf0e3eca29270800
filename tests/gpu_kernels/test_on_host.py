"""Our kernels beside the host's: some experts of each layer are the device's, the others lie in the
host's memory and are computed there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from covering import chosen
from gpu_kernels.conftest import DEVICE
from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.crossing import CrossingRows
from moebius.moe.on_host import HostExperts
from moebius.ops import Ops, select_ops
from moebius.ops.triton import TritonOps
from moebius.request.params import SamplingParams
from oracle import load_theirs, save_tiny
from random_schedules import Wish, alone, answers, each_alone, groups_of, random_schedule

DEVICE_OPS = TritonOps()
F32 = torch.float32
BF16 = torch.bfloat16


def split(directory: Path, dtype: torch.dtype, host: Ops, left: int = 2) -> Decoder:
    """All but the first `left` experts of each layer on the host."""
    config = open_checkpoint(directory).config
    held = {layer: range(left, count) for layer, count in config.experts.items()}
    top_k = max(part.router.top_k for part in config.feed_forward if part.router is not None)
    most = CrossingRows(256, top_k, config.hidden_size, dtype)
    beside = HostExperts(host, held, config.experts, most)
    return load_decoder(directory, dtype, device=DEVICE, ops=DEVICE_OPS, host=beside)


@pytest.mark.parametrize(
    "model_type", chosen(["qwen3_moe", "gpt_oss", "deepseek_v3"], lambda name: name == "gpt_oss")
)
def test_greedy_tokens_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, model_type, vocab_size=300, max_position_embeddings=64)
    decoder = split(tmp_path, F32, select_ops("cpu", F32))
    rng = random.Random(model_type)
    prompt = tuple(rng.randrange(300) for _ in range(11))
    wish = Wish("a", prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), 0)
    whole = load_theirs(tmp_path).generate(
        torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert alone(decoder, wish)[0] == whole[0, 11:].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_each_pair_is_computed_as_alone(
    dtype: torch.dtype, tmp_path: Path, sums_in_order: None
) -> None:
    """To the bit, by whichever has its expert; and summed by the device in routing order."""
    save_tiny(tmp_path, "gpt_oss", vocab_size=300)
    host = select_ops("cpu", dtype)
    layer = split(tmp_path, dtype, host).layers[0].mlp
    theirs = load_decoder(tmp_path, dtype, ops=host).layers[0].mlp.experts
    ours = load_decoder(tmp_path, dtype, device=DEVICE, ops=DEVICE_OPS).layers[0].mlp.experts
    x_TD = torch.randn(13, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    out_TD, routing = layer(x_TD.to(DEVICE))
    ids_TK = routing.expert_ids_TK.cpu()
    on_host_TK = ids_TK >= 2
    assert on_host_TK.any() and not on_host_TK.all()
    pairs = [(t, k) for t in range(13) for k in range(ids_TK.shape[1])]
    rows_TKD = torch.empty(*ids_TK.shape, 24, dtype=dtype)
    for t, k in pairs:
        id_11 = ids_TK[t : t + 1, k : k + 1].contiguous()
        x_1D = x_TD[t : t + 1]
        if on_host_TK[t, k]:
            rows_TKD[t, k] = theirs.rows(x_1D, id_11)[0, 0]
        else:
            rows_TKD[t, k] = ours.rows(x_1D.to(DEVICE), id_11.to(DEVICE))[0, 0]
    expected = DEVICE_OPS.combine(rows_TKD.to(DEVICE), routing.weights_TK)
    assert torch.equal(out_TD, expected)


@pytest.mark.exhaustive  # the pairs above in every run, and whole engines in engine/test_host_experts
def test_one_answer_in_any_batch(tmp_path: Path, sums_in_order: None) -> None:
    pytest.importorskip("moebius._cpu", reason="plain PyTorch on the host has no one answer")
    save_tiny(tmp_path, "qwen3_moe", vocab_size=300, max_position_embeddings=256)
    decoder = split(tmp_path, F32, select_ops("cpu", F32))
    rng = random.Random(0)
    params = SamplingParams(temperature=1.0, max_tokens=3, logprobs=2, ignore_eos=True)
    asked = [
        Wish(str(i), tuple(rng.randrange(300) for _ in range(rng.choice((1, 5, 18)))), params, i)
        for i in range(3)
    ]
    expected = each_alone(decoder, asked)
    schedule = random_schedule(len(asked), rng, groups_of(decoder))
    for found in answers(decoder, asked, schedule).rounds:
        assert found == expected, schedule
