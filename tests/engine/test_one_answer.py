"""Promise P1 through the whole engine: one answer, bit for bit, whatever else is served and however
it is scheduled.

benchmarks/one_answer.py runs the same with ten thousand schedules.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import moebius
from covering import chosen, rest
from moebius.engine.client import StepOutput
from moebius.engine.engine import Engine
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.nn.packed import PackedPast
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from moebius.request.constraint import Constraint, Grammar
from moebius.schedule.groups import CacheGroups
from moebius.schedule.request import SamplingParams
from ops.formats.blocks import BLOCKS
from oracle import FAMILY, load_theirs, save_tiny, saved_tiny
from random_schedules import (
    MAX_MODEL_LEN,
    WINDOWED,
    Answer,
    Schedule,
    Wish,
    alone,
    answers,
    each_alone,
    groups_of,
    in_blocks,
    mixed,
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
    asked = wishes(24, bundled(1).config.vocab_size, random.Random(0))
    return asked, each_alone(bundled(1), asked)


@pytest.mark.parametrize("seed", chosen(range(10), lambda seed: seed < 4))
def test_the_bundled_model_gives_one_answer(seed: int) -> None:
    rng = random.Random(seed)
    asked, expected = bundled_answers()
    some = rng.sample(asked, rng.choice((1, 7, 24)))
    schedule = random_schedule(len(some), rng)
    for found in answers(bundled(rng.choice((1, 2))), some, schedule).rounds:
        for wish in some:
            assert found[wish.id] == expected[wish.id], f"{wish} under {schedule}"


def test_preemption_and_warm_caches_are_among_the_schedules() -> None:
    """The comparison above means something: small caches do preempt, and warm ones do hit."""
    asked, expected = bundled_answers()
    seen = answers(bundled(2), asked, Schedule(8, MAX_MODEL_LEN // 8, 24, 300, True, (0,) * 24, 2))
    assert seen.preemptions > 0 and seen.prefix_hits > 0
    for found in seen.rounds:
        assert found == expected


def test_answers_that_end_with_their_grammars_are_one_answer() -> None:
    """Wherever in a batch, a chunk or a cache a request's grammar comes to its end."""
    word = Constraint(Grammar("start: /[a-z]{1,6};/"))
    decoder = mixed(KERNELS[2], torch.bfloat16)
    rng = random.Random(3)
    asked = [
        replace(wish, constraint=word if i % 2 else wish.constraint)
        for i, wish in enumerate(wishes(14, decoder.config.vocab_size, rng))
    ]
    expected = each_alone(decoder, asked)
    ended = [wish for wish in asked if len(expected[wish.id][0]) < (wish.params.max_tokens or 0)]
    assert len(ended) > 2
    for _ in range(3):
        schedule = random_schedule(len(asked), rng)
        for found in answers(decoder, asked, schedule).rounds:
            assert found == expected, schedule


def _differs(decoder: Decoder, asked: list[Wish], schedule: Schedule) -> bool:
    expected = each_alone(decoder, asked)
    return any(found != expected for found in answers(decoder, asked, schedule).rounds)


def test_plain_pytorch_does_not_pass_and_so_the_comparison_can_fail() -> None:
    decoder = mixed(ReferenceOps(), torch.bfloat16)
    asked = wishes(3, 300, random.Random(1), free=True)
    assert _differs(decoder, asked, Schedule(16, 400, 3, 300, True, (0,) * 3, 1))


def windowed(name: str, directory: Path, dtype: torch.dtype) -> list[Decoder]:
    """A model with windows on one thread and on two."""
    if name == "mixed":
        return [mixed(ops, dtype) for ops in KERNELS.values()]
    model_type, changes = WINDOWED[name]
    sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
    save_tiny(directory, model_type, **sizes, **changes)
    return [load_decoder(directory, dtype, ops=ops) for ops in KERNELS.values()]


def growing(count: int, rng: random.Random) -> list[Wish]:
    """The first half have short prompts and long answers, for which no room is promised: so that
    several of them run out of blocks together."""
    made = wishes(count, 300, rng, free=True)
    for i in range(count // 2):
        params = made[i].params.with_(max_tokens=60)
        made[i] = replace(made[i], prompt=made[i].prompt[:2], params=params)
    return made


def tight(groups: CacheGroups, sequences: int = 1) -> Schedule:
    """16 at once in chunks of 17 tokens, twice over, in hardly more blocks than so many hold."""
    blocks = sequences * groups.most_blocks(MAX_MODEL_LEN, 17, 4) + 4 * len(groups.blocks)
    return Schedule(4, blocks, 16, 17, True, (0,) * 16, 2)


def check_all_schedules(
    decoders: list[Decoder],
    asked: list[Wish],
    expected: dict[str, Answer],
    rng: random.Random,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """The expected answers in a roomy cache, in tight ones, behind prefixes and preemptions."""
    groups = groups_of(decoders[0])
    preemptions = prefix_hits = 0
    schedules = [random_schedule(len(asked), rng, groups), tight(groups), tight(groups, 4)]
    roomy = tight(groups, 16)  # where nothing was found again in the others, all is in this one
    for schedule in [*schedules, roomy]:
        if schedule is roomy and prefix_hits:
            break
        arrivals = schedule.arrivals[: len(asked)]
        schedule = replace(schedule, arrivals=arrivals, kv_dtype=kv_dtype)
        seen = answers(rng.choice(decoders), asked, schedule)
        for found in seen.rounds:
            assert found == expected, schedule
        preemptions += seen.preemptions
        prefix_hits += seen.prefix_hits
    assert preemptions and prefix_hits, "or else nothing was compared"


# One table, two whose layers keep as much, and two of which one keeps less: the kinds of windows.
# Three tables are those of `mixed`, whose steps are interrupted below.
EVERY_RUN = {
    ("mistral-window", torch.bfloat16),
    ("gpt-oss", torch.float32),
    ("gemma4", torch.bfloat16),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        case if case in EVERY_RUN else rest(*case)
        for case in product([*sorted(WINDOWED), "mixed"], [torch.bfloat16, torch.float32])
    ],
    ids=str,
)
def test_windows_that_give_blocks_back_give_one_answer(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whole prompts in a roomy cache hold all their blocks for most of the time; chunks in a cache
    of hardly more than one sequence's blocks lose them to others, and begin again from a prefix
    that they or others have left behind."""
    decoders = windowed(name, tmp_path, dtype)
    rng = random.Random(name)
    asked = growing(10, rng)
    expected = each_alone(decoders[0], asked)
    check_all_schedules(decoders, asked, expected, rng)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        rest("bundled", torch.bfloat16),
        rest("qwen2-upper-window", torch.bfloat16),
        ("gpt-oss", torch.bfloat16),
        rest("mixed", torch.float32),
    ],
)
def test_keys_and_values_in_int8_give_one_answer(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Quantised once, when they are written: what is read is the same behind a prefix, in other
    blocks and after a preemption. Qwen2's and gpt-oss' keys are held less a part of their biases,
    and scores with sinks and caps get it back. Every run has the bundled model's in
    test_drafts.py."""
    if name == "bundled":
        decoders = [load_decoder(BUNDLED, dtype, ops=ops) for ops in KERNELS.values()]
    else:
        decoders = windowed(name, tmp_path, dtype)
    rng = random.Random(name)
    asked = growing(10, rng)
    expected = each_alone(decoders[0], asked, torch.int8)
    unlike = alone(decoders[0], asked[0])
    assert expected[asked[0].id] != unlike, "nothing was quantised"
    check_all_schedules(decoders, asked, expected, rng, torch.int8)


def test_steps_that_are_interrupted_and_made_again_change_no_bit() -> None:
    """Before anything was computed, or when keys and values were written already."""
    decoder = mixed(KERNELS[2], torch.bfloat16)
    rng = random.Random(1)
    asked = growing(16, rng)
    expected = each_alone(decoder, asked)
    interrupts = {False: 0, True: 0}

    def make_step(engine: Engine) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        if rng.random() < 0.6:
            written = rng.random() < 0.5
            with pytest.MonkeyPatch.context() as patch:
                interrupt(engine, patch, written=written)
                try:
                    outputs = engine.step()
                except KeyboardInterrupt:
                    interrupts[written] += 1
        return outputs + engine.step()

    seen = answers(decoder, asked, tight(groups_of(decoder)), make_step)
    assert all(found == expected for found in seen.rounds)
    assert min(interrupts.values()) > 20 and seen.preemptions and seen.prefix_hits


def interrupt(engine: Engine, patch: pytest.MonkeyPatch, *, written: bool) -> None:
    """Let Ctrl-C come while the next step is computed."""
    execute = engine.runner.execute

    def interrupted(inputs: StepInputs) -> NoReturn:
        if written:
            execute(inputs)
        raise KeyboardInterrupt

    patch.setattr(engine.runner, "execute", interrupted)


# Every run has a window of all layers, one of the upper ones and one that keeps less.
@pytest.mark.parametrize(
    "name",
    chosen(
        sorted(WINDOWED),
        lambda name: name in ("mistral-window", "qwen2-upper-window", "gemma4"),
    ),
)
def test_windows_draw_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    decoder = windowed(name, tmp_path, torch.float32)[0]
    wish = greedy(random.Random(name))
    whole = load_theirs(tmp_path).generate(
        torch.tensor([wish.prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    assert alone(decoder, wish)[0] == whole[0, 120:].tolist()


@torch.no_grad()
def test_layers_of_several_windows_draw_the_tokens_of_a_loop_that_keeps_nothing() -> None:
    """Each token from the whole text before it, on plain PyTorch and without a cache."""
    naive = mixed(ReferenceOps(), torch.float32)
    wish = greedy(random.Random(0))
    ids = list(wish.prompt)
    for _ in range(30):
        hidden_TD, _ = naive(torch.tensor(ids), torch.arange(len(ids)), PackedPast(len(ids)))
        ids.append(int(naive.logits(hidden_TD[-1:]).argmax()))
    for ops in KERNELS.values():
        assert alone(mixed(ops, torch.float32), wish)[0] == ids[120:]


def greedy(rng: random.Random) -> Wish:
    """30 tokens behind a prompt of 120."""
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    return Wish("greedy", tuple(rng.randrange(300) for _ in range(120)), params, 0)


# Every run has one of each size of blocks, and one in float32; tests/ops has the products of each
# type, in any batch.
IN_BLOCKS = [
    (name, torch.bfloat16) if name in ("q5_0", "q6_k") else rest(name, torch.bfloat16)
    for name in BLOCKS
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *IN_BLOCKS,
        rest("q8_0", torch.float32),
        ("q4_k", torch.float32),
    ],
)
def test_weights_in_blocks_give_one_answer(name: str, dtype: torch.dtype) -> None:
    """Every type of GGUF's, in linear layers, experts, embeddings and the head."""
    decoders = [in_blocks(name, ops, dtype) for ops in KERNELS.values()]
    rng = random.Random(name)
    asked = wishes(8, 300, rng, free=True)
    expected = each_alone(decoders[0], asked)
    schedule = random_schedule(len(asked), rng)
    for found in answers(decoders[1], asked, schedule).rounds:
        assert found == expected, schedule


# Of dense families, routed ones, with shared experts, latents, windows, both kinds of layers that
# recur, and an indexer: one each. How each family computes is what tests/models holds against
# transformers, in chunks and beside others, in every run.
KINDS = {
    "granite",
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "gemma3_text",
    "gpt_oss",
    "qwen3_next",
    "nemotron_h",
    "deepseek_v32",
}
# Weights that are computed with in float32 are stored in it, or in float16 and read in place. Each
# kind is in one of three, -m exhaustive has every family in bfloat16 and one of the others, and
# benchmarks/one_answer.py in all.
FAMILIES = sorted(FAMILY)
HELD = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
]


@pytest.mark.parametrize(
    ("model_type", "dtype", "stored"),
    [
        *(
            (name, *HELD[i % 4]) if name in KINDS else rest(name, *HELD[i % 4])
            for i, name in enumerate(FAMILIES)
        ),
        *(rest(name, *HELD[0]) for i, name in enumerate(FAMILIES) if i % 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedules", chosen([2, 5], lambda schedules: schedules == 2))
def test_every_architecture_gives_one_answer(
    model_type: str, dtype: torch.dtype, stored: torch.dtype, schedules: int, tmp_path: Path
) -> None:
    sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
    saved_tiny(tmp_path, model_type, **sizes).to(stored).save_pretrained(tmp_path)
    decoders = [load_decoder(tmp_path, dtype, ops=ops) for ops in KERNELS.values()]
    rng = random.Random(model_type)
    asked = wishes(6, decoders[0].config.vocab_size, rng, free=True)
    expected = each_alone(decoders[0], asked)
    for _ in range(schedules):
        schedule = random_schedule(len(asked), rng, groups_of(decoders[0]))
        for found in answers(rng.choice(decoders), asked, schedule).rounds:
            assert found == expected, schedule
