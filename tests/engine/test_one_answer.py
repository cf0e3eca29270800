"""Promise P1 through the whole engine: one answer, bit for bit, whatever else is served and however
it is scheduled.

benchmarks/one_answer.py runs the same with ten thousand schedules.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch

import moebius
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.ops.reference import ReferenceOps
from moebius.schedule.request import SamplingParams
from oracle import FAMILY, save_tiny
from random_schedules import (
    MAX_MODEL_LEN,
    WINDOWED,
    Answer,
    Schedule,
    Wish,
    alone,
    answers,
    random_schedule,
    wishes,
)

cpu = pytest.importorskip("moebius.ops.cpu")
BUNDLED = Path(moebius.__file__).parent / "bundled"
KERNELS = {threads: cpu.CpuOps(threads) for threads in (1, 2)}


@cache
def bundled(threads: int) -> Decoder:
    return load_decoder(BUNDLED, torch.bfloat16, ops=KERNELS[threads])


@cache
def bundled_answers() -> tuple[list[Wish], dict[str, Answer]]:
    asked = wishes(64, bundled(1).config.vocab_size, random.Random(0))
    return asked, {wish.id: alone(bundled(1), wish) for wish in asked}


@pytest.mark.parametrize("seed", range(10))
def test_the_bundled_model_gives_one_answer(seed: int) -> None:
    rng = random.Random(seed)
    asked, expected = bundled_answers()
    some = rng.sample(asked, rng.choice((1, 7, 64)))
    schedule = random_schedule(len(some), rng)
    for found in answers(bundled(rng.choice((1, 2))), some, schedule).rounds:
        for wish in some:
            assert found[wish.id] == expected[wish.id], f"{wish} under {schedule}"


def test_preemption_and_warm_caches_are_among_the_schedules() -> None:
    """The comparison above means something: small caches do preempt, and warm ones do hit."""
    asked, expected = bundled_answers()
    seen = answers(bundled(2), asked, Schedule(8, MAX_MODEL_LEN // 8, 64, 300, True, (0,) * 64, 2))
    assert seen.preemptions > 0 and seen.prefix_hits > 0
    assert all(found == expected for found in seen.rounds)


def _differs(decoder: Decoder, asked: list[Wish], schedule: Schedule) -> bool:
    expected = {wish.id: alone(decoder, wish) for wish in asked}
    return any(found != expected for found in answers(decoder, asked, schedule).rounds)


def test_plain_pytorch_does_not_pass_and_so_the_comparison_can_fail() -> None:
    decoder = load_decoder(BUNDLED, torch.bfloat16, ops=ReferenceOps())
    asked = wishes(12, decoder.config.vocab_size, random.Random(1))
    assert _differs(decoder, asked, Schedule(16, 400, 12, 300, True, (0,) * 12, 1))


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_windows_that_give_blocks_back_give_one_answer(name: str, tmp_path: Path) -> None:
    """Whole prompts in a roomy cache hold all their blocks for most of the time; chunks in a small
    one hardly any. And transformers, which keeps everything, draws the same tokens."""
    model_type, changes = WINDOWED[name]
    sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
    theirs = save_tiny(tmp_path, model_type, **sizes, **changes)
    decoders = [load_decoder(tmp_path, torch.float32, ops=ops) for ops in KERNELS.values()]
    rng = random.Random(name)
    asked = wishes(16, 300, rng)
    expected = {wish.id: alone(decoders[0], wish) for wish in asked}
    for schedule in (
        random_schedule(len(asked), rng),
        Schedule(8, MAX_MODEL_LEN // 8 + 2, 16, 17, True, (0,) * 16, 2),
    ):
        for found in answers(rng.choice(decoders), asked, schedule).rounds:
            assert found == expected, schedule
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    wish = Wish("greedy", tuple(rng.randrange(300) for _ in range(120)), greedy, 0)
    tokens, _, _ = alone(decoders[0], wish)
    whole = theirs.generate(
        torch.tensor([wish.prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    assert tokens == whole[0, 120:].tolist()


@pytest.mark.parametrize("model_type", sorted(FAMILY))
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=["bfloat16", "float32", "float16 in place"],
)
def test_every_architecture_gives_one_answer(
    model_type: str, dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
    save_tiny(tmp_path, model_type, **sizes).to(stored).save_pretrained(tmp_path)
    decoders = [load_decoder(tmp_path, dtype, ops=ops) for ops in KERNELS.values()]
    rng = random.Random(model_type)
    asked = wishes(24, decoders[0].config.vocab_size, rng)
    expected = {wish.id: alone(decoders[0], wish) for wish in asked}
    for _ in range(3):
        schedule = random_schedule(len(asked), rng)
        for found in answers(rng.choice(decoders), asked, schedule).rounds:
            assert found == expected, schedule
