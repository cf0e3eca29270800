"""A whole engine with `--device cuda`, by torch.cuda's own rules: what runs only where there is
CUDA, from loading to steps that begin ahead. Its tokens are a CPU's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from covering import chosen
from gpu_kernels.conftest import DEVICE
from gpu_kernels.device_tensor import CARD
from gpu_kernels.fake_cuda import FakeCuda
from moebius import LLM, SamplingParams
from moebius.engine import proof
from moebius.engine.runner import Runner
from moebius.models.store.sending import CudaStaging, Sender
from moebius.ops.steps import StepInputs
from moebius.ops.transfer import fetch, send
from oracle import FAMILY, save_tiny
from tiny import write_tokenizer

pytestmark = [
    pytest.mark.usefixtures("sums_in_order"),
    pytest.mark.skipif(DEVICE == "cuda", reason="a fake stands in the card's place"),
]
PROMPTS = [[5, 66, 0, 17, 23], [9, 9, 33, 50, 64, 3, 28], [7]]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": 8,
    "max_num_seqs": 2,
    "block_size": 4,
    "max_model_len": 32,
    "kv_cache_memory_bytes": 2**20,
}
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_k=5, seed=3, max_tokens=4, ignore_eos=True)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as cuda:
        yield cuda


@pytest.fixture
def _few_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes minutes for what a card proves in seconds."""
    prove = proof.prove
    few = proof.ProofSizes(long=8, step=8, sequences=2)
    monkeypatch.setattr(proof, "prove", lambda *args: prove(*args, sizes=few))


def tokens(path: Path, device: str, params: Sequence[SamplingParams], **options: Any) -> list[Any]:
    with LLM(str(path), device=device, **OPTIONS | options) as llm:
        found = [llm.generate(PROMPTS, each, progress=False) for each in params]
    return [[list(result.outputs[0].token_ids) for result in each] for each in found]


def of_one_layer(name: str) -> bool:
    return name == "qwen3_moe"


@pytest.mark.usefixtures("_few_proven")
@pytest.mark.parametrize("model_type", chosen(sorted(FAMILY), of_one_layer))
def test_tokens_are_those_of_a_cpu(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Everything is proven and captured, and steps begin ahead."""
    changes = {"num_hidden_layers": 1} if of_one_layer(model_type) else {}
    save_tiny(tmp_path, model_type, vocab_size=320, **changes)
    write_tokenizer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("MOEBIUS_CPU_ISA", "reference")
        expected = tokens(tmp_path, "cpu", [GREEDY, DRAWN])
    with caplog.at_level(logging.INFO), FakeCuda() as cuda:
        assert tokens(tmp_path, "cuda", [GREEDY, DRAWN]) == expected
    assert cuda.replays > 20
    said = [record.getMessage() for record in caplog.records]
    assert sum("were proven on this card" in line for line in said) == 1
    assert not [line for line in said if "failed on this card" in line]
    assert {line.split()[1] for line in said if line.startswith("captured")} == {"tokens", "logits"}


@pytest.mark.usefixtures("_few_proven")
@pytest.mark.parametrize("experts", chosen(["cpu", 2], lambda where: where == 2))
def test_experts_of_the_host(
    experts: str | int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows cross by pinned buffers between a step's pieces."""
    save_tiny(tmp_path, "qwen3_moe", vocab_size=320, num_hidden_layers=1)
    write_tokenizer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("MOEBIUS_CPU_ISA", "reference")
        expected = tokens(tmp_path, "cpu", [GREEDY])
    with FakeCuda() as cuda:
        assert tokens(tmp_path, "cuda", [GREEDY], experts=experts) == expected
    assert cuda.replays > 20


@pytest.mark.usefixtures("_few_proven")
@pytest.mark.parametrize("model_type", chosen(sorted(FAMILY), of_one_layer))
def test_no_step_waits_for_the_device(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a prompt's, which no graph has, nor a decode's: all of a step is handed over before
    anything of it is there."""
    changes = {"num_hidden_layers": 1} if of_one_layer(model_type) else {}
    save_tiny(tmp_path, model_type, vocab_size=320, **changes)
    write_tokenizer(tmp_path)
    execute = Runner.execute
    waits: list[int] = []

    def counted(self: Runner, inputs: StepInputs) -> torch.Tensor:
        before = cuda.waits
        found = execute(self, inputs)
        waits.append(cuda.waits - before)
        return found

    with FakeCuda() as cuda, LLM(str(tmp_path), device="cuda", **OPTIONS) as llm:
        monkeypatch.setattr(Runner, "execute", counted)
        llm.generate(PROMPTS, GREEDY, progress=False)
    assert len(waits) > 5 and not any(waits)


def test_weights_arrive_whole(cuda: FakeCuda) -> None:
    """Through two buffers that are smaller than they are."""
    x = torch.randn(9, 7)
    sender = Sender(CudaStaging(CARD), staged_bytes=32)
    there = sender(x)
    sender.finish()
    assert there.device == CARD and torch.equal(there.cpu(), x)


def test_what_is_fetched_is_waited_for(cuda: FakeCuda) -> None:
    x = torch.arange(5).to(CARD)
    wait = fetch(x)
    x.zero_()
    (found,) = wait()
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert send(torch.tensor([3, 4]), CARD).tolist() == [3, 4]


def written_early(host: torch.Tensor, there: torch.Tensor) -> None:
    there.copy_(host, non_blocking=True)
    host.fill_(7)
    torch.cuda.synchronize()


def read_early(host: torch.Tensor, there: torch.Tensor) -> None:
    host.copy_(there, non_blocking=True)
    assert host.tolist() == [0, 0]


def of_two_devices(host: torch.Tensor, there: torch.Tensor) -> None:
    there.add_(host)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (written_early, AssertionError),
        (read_early, AssertionError),
        (of_two_devices, RuntimeError),
    ],
)
def test_the_fake_notices(
    cuda: FakeCuda, wrong: Callable[..., None], error: type[Exception]
) -> None:
    host = torch.zeros(2, dtype=torch.int64, pin_memory=True)
    with pytest.raises(error):
        wrong(host, torch.zeros(2, dtype=torch.int64, device=CARD))


def test_memory_that_graphs_share_keeps_nothing(cuda: FakeCuda) -> None:
    """What one leaves in it another may have overwritten."""
    pool = torch.cuda.graph_pool_handle()
    x = torch.ones(2, device=CARD)
    made = []
    graphs = []
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)
            made.append(x + 1)
            graph.capture_end()
            graphs.append(graph)
    graphs[0].replay()
    assert made[0].tolist() == [2, 2]
    graphs[1].replay()
    assert made[0].isnan().all() and made[1].tolist() == [2, 2]
