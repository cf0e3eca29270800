"""A model on another device than the CPU, in plain PyTorch, against transformers on the CPU.

benchmarks/gpu.sh runs it. MOEBIUS_TEST_DEVICE names the device, cuda where it is not set; without one all is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import LLM, SamplingParams
from oracle import assert_close, load_theirs, save_tiny
from tiny import write_tokenizer

DEVICE = os.environ.get("MOEBIUS_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
)
PROMPTS = [
    [5, 66, 0, 17, 23, 23, 41, 8, 30, 2, 60, 11, 1],
    [9, 9, 33, 50, 64, 3, 28],
    [7],
    [5, 66, 0, 17, 23, 23, 41],
]
CACHE = 2**20


@pytest.fixture(autouse=True)
def _plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_CPU_ISA", "reference")


@pytest.fixture(
    params=["llama", "mistral", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1", "granitemoe"]
)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny random float32 model; Mistral's and Mixtral's see five tokens back."""
    window = {"sliding_window": 5} if request.param in ("mistral", "mixtral") else {}
    save_tiny(tmp_path, request.param, vocab_size=320, **window)
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def llm(saved: Path) -> Iterator[LLM]:
    """Steps of at most eight tokens, so that prompts come in chunks beside decodes; blocks of four."""
    options: dict[str, Any] = {
        "max_num_batched_tokens": 8,
        "max_num_seqs": 4,
        "block_size": 4,
        "kv_cache_memory_bytes": CACHE,
    }
    with LLM(str(saved), device=DEVICE, **options) as llm:
        yield llm


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    """(len(ids), vocabulary)"""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


def test_greedy_tokens_and_log_probabilities_equal_transformers(llm: LLM, saved: Path) -> None:
    """Several prompts at once, one the beginning of another; again with a warm prefix cache."""
    theirs = load_theirs(saved)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    for _ in range(2):
        for prompt, result in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            (choice,) = result.outputs
            rows = log_probabilities(theirs, [*prompt, *choice.token_ids])[len(prompt) - 1 : -1]
            assert list(choice.token_ids) == rows.argmax(-1).tolist()
            assert choice.logprobs is not None
            assert_close(
                torch.tensor([entry.logprob for entry in choice.logprobs]).double(), rows.amax(-1)
            )


def test_draws_depend_on_the_seed_and_position_alone(llm: LLM) -> None:
    """Each request draws alone what it draws beside others: logits that differ in a last bit change no draw here."""
    params = SamplingParams(
        temperature=0.9, top_p=0.95, max_tokens=6, seed=3, ignore_eos=True, repetition_penalty=1.2
    )
    together = [result.outputs[0].token_ids for result in llm.generate(PROMPTS, params)]
    alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert together == alone


def test_bfloat16_stays_close_to_float32(saved: Path) -> None:
    """Log-probabilities of a prompt, within some of bfloat16's roundings of what float32 gives for the same weights."""
    theirs = load_theirs(saved).bfloat16().float()
    with LLM(str(saved), device=DEVICE, dtype="bfloat16", kv_cache_memory_bytes=CACHE) as llm:
        (result,) = llm.generate(PROMPTS[:1], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert result.prompt_logprobs is not None
    ours = [entry.logprob for entry in result.prompt_logprobs if entry is not None]
    exact = log_probabilities(theirs, PROMPTS[0])[:-1].gather(
        1, torch.tensor(PROMPTS[0][1:])[:, None]
    )[:, 0]
    assert_close(torch.tensor(ours).double(), exact, tolerance=0.1)


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU's cache is reserved, not allocated")
def test_the_cache_takes_what_was_asked_for(tiny_model: Path) -> None:
    before = torch.cuda.memory_allocated()
    with LLM(str(tiny_model), device="cuda", kv_cache_memory_bytes=2**28):
        taken = torch.cuda.memory_allocated() - before
    assert 0.99 * 2**28 <= taken <= 1.05 * 2**28


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU's memory is the host's")
@pytest.mark.parametrize("experts", ["cpu", 2])
@pytest.mark.parametrize("kernels", ["", "reference"])
def test_experts_on_the_host_change_no_greedy_token(
    experts: str | int, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go there and come back, by the compiled kernels where there are some, or plain PyTorch."""
    monkeypatch.setenv("MOEBIUS_CPU_ISA", kernels)
    save_tiny(tmp_path, "qwen3_moe", vocab_size=320)
    write_tokenizer(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    found = []
    for where in ("device", experts):
        options = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "kv_cache_memory_bytes": CACHE}
        with LLM(str(tmp_path), device="cuda", experts=where, **options) as llm:
            found.append([one.outputs[0].token_ids for one in llm.generate(PROMPTS, params)])
    assert found[0] == found[1]
