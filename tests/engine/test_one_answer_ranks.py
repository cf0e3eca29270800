"""One answer on any number of ranks: bit for bit that of one process, whatever else is served there
and wherever the experts lie.

`benchmarks/one_answer.py --ranks` runs the same with as many schedules as one likes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moebius
from covering import chosen, rest
from moebius.engine.runner import Runner
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.moe.placement import Placement
from moebius.parallel.shared_memory import SharedMemoryExchange
from moebius.request.params import SamplingParams
from oracle import FAMILY, save_tiny
from random_ranks import answers_of_ranks, load_ranks, random_placement
from random_schedules import (
    MAX_MODEL_LEN,
    WINDOWED,
    Schedule,
    Wish,
    each_alone,
    groups_of,
    random_schedule,
    wishes,
)

cpu = pytest.importorskip("moebius.ops.cpu")
BUNDLED = Path(moebius.__file__).parent / "bundled"
WITH_EXPERTS = {
    **{name: (name, {}) for name in FAMILY},
    "mixtral-window": WINDOWED["mixtral-window"],
    "nemotron_h-latent": ("nemotron_h", {"moe_latent_size": 10}),
}
DENSE = (
    *("llama", "mistral", "granite", "qwen2", "qwen3", "qwen3_5_text"),
    *("gemma3_text", "gemma4_unified_text", "phi3", "lfm2"),
)


def check(
    directory: Path,
    one: Decoder,
    asked: list[Wish],
    ranks: int,
    rng: random.Random,
    least: int = 1,
) -> None:
    expected = each_alone(one, asked)
    placement = random_placement(one, ranks, rng)
    decoders = load_ranks(directory, one.dtype, placement, rng.choice((1, 2)))
    schedules = [random_schedule(len(asked), rng, groups_of(one), least=least) for _ in decoders]
    homes = [rng.randrange(ranks) for _ in asked]
    for found in answers_of_ranks(decoders, asked, homes, schedules).rounds:
        assert found == expected, (placement, homes, schedules)


def test_ranks_make_logits_together_where_they_are_few_and_alone_where_they_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[bool] = Counter()
    logits = Runner.logits

    def counted(runner: Runner, rows: Iterable[int], shared: bool = False) -> Tensor:
        made[shared] += 1
        return logits(runner, rows, shared)

    monkeypatch.setattr(Runner, "logits", counted)
    save_tiny(tmp_path, "mixtral", max_position_embeddings=MAX_MODEL_LEN, vocab_size=300)
    one = load_decoder(tmp_path, torch.bfloat16, ops=cpu.CpuOps(1))
    asked = [
        Wish(f"r{i}", (i, 7, i), SamplingParams(max_tokens=4 + 4 * i, ignore_eos=True), i)
        for i in range(8)
    ]
    expected = each_alone(one, asked)
    made.clear()
    decoders = load_ranks(tmp_path, torch.bfloat16, Placement.linear(one.config.experts, 2))
    schedule = Schedule(16, 400, 8, 300, True, (0,) * 8, 1)
    seen = answers_of_ranks(decoders, asked, [0] * 7 + [1], [schedule] * 2)
    assert seen.rounds[0] == expected
    # After 12 steps three have ended and four are left at rank 0, which are few. Its last ends
    # after 28, and it takes part in the other rank's until the 32nd.
    assert made == {False: 2 * 12, True: 2 * 20}


# Each in one of the two; benchmarks/one_answer.py has both. Every run has one of each kind, and
# tests/models/test_ranks.py has steps that are chosen by hand. Routed experts alone, with biases,
# shared ones beside, a dense part beside, states beside, and experts that compute in fewer columns.
KINDS = {"mixtral", "gpt_oss", "deepseek_v3", "gemma4_text", "kimi_linear", "nemotron_h-latent"}
CASES = [
    (name, (torch.bfloat16, torch.float32)[i % 2])
    for i, name in enumerate(sorted(WITH_EXPERTS.keys() - set(DENSE)))
]


@pytest.mark.parametrize(
    ("name", "dtype"), [case if case[0] in KINDS else rest(*case) for case in CASES]
)
# Steps of a token or two each take most of the time, as ranks wait for each other in every layer.
@pytest.mark.parametrize("least", chosen([5, 1], lambda least: least == 5))
def test_every_architecture_gives_one_answer_on_any_number_of_ranks(
    name: str, dtype: torch.dtype, least: int, tmp_path: Path
) -> None:
    """Experts that do not divide evenly among them."""
    model_type, changes = WITH_EXPERTS[name]
    sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
    save_tiny(tmp_path, model_type, **sizes, **changes)
    one = load_decoder(tmp_path, dtype, ops=cpu.CpuOps(1))
    rng = random.Random(f"{name} {dtype}")
    check(tmp_path, one, wishes(4, 300, rng, free=True), rng.choice((2, 3, 4)), rng, least)


@pytest.mark.parametrize("ranks", chosen([1, 2, 3, 4], lambda ranks: ranks in (1, 3)))
@pytest.mark.parametrize("least", chosen([5, 1], lambda least: least == 5))
def test_the_bundled_model_gives_one_answer_on_any_number_of_ranks(ranks: int, least: int) -> None:
    one = load_decoder(BUNDLED, torch.bfloat16, ops=cpu.CpuOps(1))
    rng = random.Random(ranks)
    check(BUNDLED, one, wishes(4, one.config.vocab_size, rng), ranks, rng, least)


def test_preemption_and_warm_caches_are_among_the_schedules(tmp_path: Path) -> None:
    """The comparison above means something: small caches do preempt, and warm ones do hit."""
    sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
    save_tiny(tmp_path, "qwen3_moe", **sizes)
    one = load_decoder(tmp_path, torch.bfloat16, ops=cpu.CpuOps(1))
    asked = wishes(32, 300, random.Random(0))
    schedule = Schedule(8, MAX_MODEL_LEN // 8, 32, 50, True, (0,) * 32, 2)
    decoders = load_ranks(tmp_path, torch.bfloat16, Placement.linear(one.config.experts, 2))
    seen = answers_of_ranks(decoders, asked, [i % 2 for i in range(32)], [schedule] * 2)
    assert seen.preemptions > 0 and seen.prefix_hits > 0
    expected = each_alone(one, asked)
    assert all(found == expected for found in seen.rounds)


def test_the_lowest_bit_of_what_comes_home_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail."""
    sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
    save_tiny(tmp_path, "dots1", **sizes)
    one = load_decoder(tmp_path, torch.bfloat16, ops=cpu.CpuOps(1))
    asked = wishes(6, 300, random.Random(0))
    expected = each_alone(one, asked)
    combine = SharedMemoryExchange.combine

    def changed(self: SharedMemoryExchange, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        combine(self, outputs_RKD, back_TKD)
        back_TKD.view(torch.int16).bitwise_xor_(1)

    monkeypatch.setattr(SharedMemoryExchange, "combine", changed)
    decoders = load_ranks(tmp_path, torch.bfloat16, Placement.linear(one.config.experts, 2))
    schedule = Schedule(16, 400, 6, 300, True, (0,) * 6, 1)
    seen = answers_of_ranks(decoders, asked, [i % 2 for i in range(6)], [schedule] * 2)
    assert seen.rounds[0] != expected
