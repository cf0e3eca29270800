"""Drafts change no bit: tokens, log-probabilities, ends and errors are those of drawing one token
a step. What is drafted here comes of what each request says alone, so that much of it is right."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from covering import rest
from engine.test_one_answer import KERNELS, bundled, growing, tight, windowed
from moebius.engine.client import StepOutput
from moebius.engine.sampler import Sampled
from moebius.engine.verify import accepted, ahead
from moebius.errors import NumericalError
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.request.constraint import Constraint, Grammar, ReasoningBudget
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from oracle import save_tiny
from random_schedules import (
    MAX_MODEL_LEN,
    Answer,
    Schedule,
    Wish,
    alone,
    answers,
    build,
    each_alone,
    groups_of,
    mixed,
    random_schedule,
    request_of,
    wishes,
)
from schedule.making import make_request


class Foresight:
    """Knows what each request says, and is wrong now and then."""

    share = 0.95
    rest = 0

    def __init__(self, known: Mapping[str, Sequence[int]], wrong: float = 0.1) -> None:
        self._known = known
        self._wrong = wrong

    def guess(self, request: Request, most: int) -> list[int]:
        rng = random.Random(request.num_tokens)
        coming = list(self._known[request.id][len(request.output_ids) :][:most])
        coming += [0] * (most - len(coming))
        return [token ^ (rng.random() < self._wrong) for token in coming]


def foresight(expected: Mapping[str, Answer], schedule: Schedule) -> Schedule:
    known = {id: answer[0] for id, answer in expected.items()}
    return replace(schedule, guesser=lambda: Foresight(known))


def check(
    decoders: list[Decoder], asked: list[Wish], schedules: Sequence[Schedule], rng: random.Random
) -> None:
    kv_dtype = schedules[0].kv_dtype
    expected = each_alone(decoders[0], asked, kv_dtype)
    preemptions = right = wrong = 0
    for schedule in schedules:
        schedule = replace(schedule, arrivals=schedule.arrivals[: len(asked)])
        seen = answers(rng.choice(decoders), asked, foresight(expected, schedule))
        for found in seen.rounds:
            assert found == expected, schedule
        preemptions += seen.preemptions
        right += seen.right_drafts
        wrong += seen.drafts - seen.right_drafts
    assert preemptions and right > 50 and wrong > 50, "or else nothing was compared"


# Dense; experts; experts in one form and latent attention; windows, with a table and with several.
# Every run has four of them; the bundled model's drafts are those of the tests below.
DRAFTED = {
    ("qwen3_moe", torch.bfloat16),
    ("deepseek_v3", torch.float32),
    ("mistral-window", torch.bfloat16),
    ("gpt-oss", torch.float32),
}
MODELS = ("bundled", "qwen3", "qwen3_moe", "deepseek_v3", "mistral-window", "gpt-oss", "mixed")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        case if case in DRAFTED else rest(*case)
        for case in product(MODELS, [torch.bfloat16, torch.float32])
    ],
    ids=str,
)
def test_drafts_change_no_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Chunks, caches of hardly more than a sequence's blocks, prefixes, preemptions: all beside
    steps that verify."""
    if name == "bundled":
        decoders = [bundled(1), bundled(2)]
    elif name in ("qwen3", "qwen3_moe", "deepseek_v3"):
        save_tiny(tmp_path, name, max_position_embeddings=MAX_MODEL_LEN, vocab_size=300)
        decoders = [load_decoder(tmp_path, dtype, ops=ops) for ops in KERNELS.values()]
    else:
        decoders = windowed(name, tmp_path, dtype)
    rng = random.Random(name)
    groups = groups_of(decoders[0])
    schedules = [random_schedule(10, rng, groups), tight(groups), tight(groups, 4)]
    check(decoders, growing(10, rng), schedules, rng)


def test_keys_and_values_in_int8_are_the_same_behind_drafts() -> None:
    """Codes of a block that wrong drafts have written to are written again."""
    rng = random.Random(8)
    groups = groups_of(bundled(1))
    schedules = [
        replace(schedule, kv_dtype=torch.int8) for schedule in (tight(groups), tight(groups, 4))
    ]
    check([bundled(1), bundled(2)], growing(10, rng), schedules, rng)


WAYS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0, "logprobs": 5},
    "drawn": {"temperature": 1.0, "logprobs": 0},
    "candidates": {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "logprobs": 20},
    "min_p": {"temperature": 0.9, "min_p": 0.05},
    "repetition": {"temperature": 0.7, "repetition_penalty": 1.3, "logprobs": 2},
    "presence": {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 2},
    "frequency": {"temperature": 0.0, "frequency_penalty": 0.7},
    "bias": {"temperature": 0.8, "logit_bias": {5: 4.0, 7: -100.0}},
    "min_tokens": {"temperature": 1.0, "min_tokens": 17, "stop_token_ids": tuple(range(150))},
    "stops": {"temperature": 1.2, "stop_token_ids": tuple(range(0, 300, 9))},
    "allowed": {"temperature": 1.0, "allowed_token_ids": tuple(range(40, 60)), "logprobs": 1},
}
HELD: dict[str, Constraint] = {
    "grammar": Constraint(Grammar("start: /([a-f]{2,5},){3}[0-9]{2,9};/")),
    "short grammar": Constraint(Grammar("start: /[a-z]{1,4};/")),
    "reasoning": Constraint(
        Grammar("start: /(ab|cd){3};/", after=((70, 71),)),
        budget=ReasoningBudget(6, start=(), end=(70, 71), begun=True),
    ),
    "bad words": Constraint(bad_words=(*((token,) for token in range(0, 200, 2)), (1, 3), (5,))),
}


def all_ways(rng: random.Random) -> list[Wish]:
    """Each way to draw by itself, and each constraint with some of them."""
    made = []
    for name, fields in WAYS.items():
        params = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **fields})  # type: ignore[arg-type]
        prompt = tuple(rng.randrange(300) for _ in range(rng.choice((1, 9, 40))))
        made.append(Wish(name, prompt, params, rng.getrandbits(60)))
    for name, constraint in HELD.items():
        for way in ("greedy", "repetition", "candidates", "stops"):
            wish = next(each for each in made if each.id == way)
            made.append(replace(wish, id=f"{name}, {way}", constraint=constraint))
    return made


Told = dict[str, tuple[list[object], ...]]


def told(decoder: Decoder, asked: list[Wish], schedule: Schedule) -> tuple[Told, int]:
    """All that clients are told of each request, and how many drafts were right."""
    engine = build(decoder, schedule)
    for wish in asked:
        engine.add(request_of(wish, engine))
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    found: Told = {}
    for wish in asked:
        own = [each for each in outputs if each.request_id == wish.id]
        errors = [(type(each.error), str(each.error)) for each in own if each.error]
        found[wish.id] = (
            [token for each in own for token in each.token_ids],
            [logprob for each in own for logprob in each.logprobs],
            [each.finish_reason for each in own if each.finish_reason],
            list(errors),
        )
        assert own[-1].finish_reason and [each.finish_reason for each in own].count(None) == (
            len(own) - 1
        )
    return found, engine.stats().accepted_tokens


def test_every_way_to_draw_is_the_same_behind_drafts() -> None:
    """Penalties, bans, grammars and budgets are functions of the tokens before a row, drafts among
    them; a request ends where it would, and in the same way."""
    decoder = mixed(KERNELS[2], torch.bfloat16)
    asked = all_ways(random.Random(4))
    plain = Schedule(16, 400, 64, 2048, False, (0,), 1)
    expected, none = told(decoder, asked, plain)
    known = {id: answer[0] for id, answer in expected.items()}
    assert not none
    ends = {reason for answer in expected.values() for reason in answer[2]}
    assert {each.value for each in ends if each} >= {"stop", "length", "complete"}  # type: ignore[attr-defined]
    for wrong in (0.0, 0.1, 0.5):
        schedule = replace(plain, guesser=lambda wrong=wrong: Foresight(known, wrong))
        found, right = told(decoder, asked, schedule)
        for id, answer in expected.items():
            assert found[id] == answer, id
        assert right > 100


def test_random_schedules_draft_too() -> None:
    rng = random.Random(6)
    asked = wishes(12, 300, rng)
    one, other = (mixed(ops, torch.bfloat16) for ops in KERNELS.values())
    expected = each_alone(one, asked)
    drafts = 0
    for _ in range(4):
        schedule = random_schedule(len(asked), rng, groups_of(one))
        seen = answers(other, asked, schedule)
        drafts += seen.drafts
        assert all(found == expected for found in seen.rounds), schedule
    assert drafts > 50


def test_a_row_whose_logits_are_not_finite_ends_its_request_where_it_would() -> None:
    """With an error, and the tokens before it: not at the step that verified it as a draft's row."""
    decoder = bundled(2)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    wish = Wish("one", (5, 6, 7), params, 0)
    tokens = alone(decoder, wish)[0]
    schedule = Schedule(16, 400, 4, 2048, False, (0,), 1)

    def ended(schedule: Schedule) -> tuple[list[int], list[str]]:
        engine = build(decoder, schedule)
        logits = engine.runner.logits

        def broken(rows: Sequence[int], shared: bool = False) -> torch.Tensor:
            found = logits(rows, shared)
            request = engine.scheduler.requests["one"]
            row = 12 - len(request.output_ids)  # of the 13th token, if it is among these
            if 0 <= row < len(found):
                found[row, 3] = torch.nan
            return found

        engine.runner.logits = broken  # type: ignore[method-assign, assignment]
        engine.add(request_of(wish, engine))
        outputs = [output for _ in range(40) for output in engine.step()]
        said = [token for output in outputs for token in output.token_ids]
        return said, [type(output.error).__name__ for output in outputs if output.error]

    assert ended(schedule) == (tokens[:12], ["NumericalError"])
    always_right = replace(schedule, guesser=lambda: Foresight({"one": tokens}, 0.0))
    assert ended(always_right) == (tokens[:12], ["NumericalError"])


# ----------------------------------------------------------------------------------- row by row


def rows(drafts: Sequence[int]) -> list[Request]:
    request = make_request("one", [1, 2], max_tokens=30)
    request.output_ids = [3]
    return ahead(request, drafts)


def test_each_row_is_the_request_behind_its_drafts() -> None:
    found = rows([4, 5])
    assert [row.output_ids for row in found] == [[3], [3, 4], [3, 4, 5]]
    assert [row.num_tokens for row in found] == [3, 4, 5]
    assert found[0].asked is found[2].asked


DONE = Sampled(5, complete=True)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([Sampled(4), Sampled(5), Sampled(6)], [4, 5, 6]),
        ([Sampled(9), Sampled(5), Sampled(6)], [9]),
        ([Sampled(4), Sampled(9), Sampled(6)], [4, 9]),
        ([Sampled(4), DONE, Sampled(6)], [4, 5]),
        ([Sampled(4), None, Sampled(6)], [4]),
        ([Sampled(4), NumericalError("not finite"), Sampled(6)], [4]),
        ([Sampled(9), NumericalError("not finite"), Sampled(6)], [9]),
        ([None, Sampled(5), Sampled(6)], []),
        ([NumericalError("not finite"), Sampled(5), Sampled(6)], []),
    ],
)
def test_rows_count_up_to_the_first_that_drew_something_else(
    outcomes: list[Sampled | NumericalError | None], expected: list[int]
) -> None:
    other = make_request("two", [8])
    drawn, failed = accepted([*rows([4, 5]), other], [*outcomes, Sampled(1)])
    assert [each.token_id for each in drawn.get("one", [])] == expected
    assert [each.token_id for each in drawn["two"]] == [1]
    assert list(failed) == (["one"] if isinstance(outcomes[0], NumericalError) else [])
