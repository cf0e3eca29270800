"""Steps that begin before the host has read the tokens of the ones before: the same answers, in any
company, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

import moebius
from covering import chosen
from moebius.engine import steps_ahead
from moebius.engine.client import StepOutput
from moebius.engine.engine import Engine
from moebius.engine.sampler import draw_of, drawn_from_logits, outcome, sample
from moebius.engine.trace import TraceWriter, replay
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.ops.steps import StepInputs
from moebius.request.finish import FinishReason
from moebius.schedule.request import SamplingParams
from oracle import save_tiny
from random_schedules import (
    MAX_MODEL_LEN,
    Schedule,
    Seen,
    Wish,
    answers,
    build,
    each_alone,
    parts,
    random_schedule,
    request_of,
    wishes,
)

cpu = pytest.importorskip("moebius.ops.cpu")
BUNDLED = Path(moebius.__file__).parent / "bundled"
AHEAD = Schedule(16, 400, 16, 64, True, (), 2, ahead=True)
# With windows, states or latents; and experts or not. Every run has one of each.
FAMILIES = ("gpt_oss", "qwen3_next", "deepseek_v3", "gemma4_text", "nemotron_h")


@cache
def decoder(model_type: str = "") -> Decoder:
    if not model_type:
        return load_decoder(BUNDLED, torch.bfloat16, ops=cpu.CpuOps(1))
    with TemporaryDirectory() as directory:
        sizes = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": 300}
        save_tiny(Path(directory), model_type, **sizes)
        return load_decoder(Path(directory), torch.bfloat16, ops=cpu.CpuOps(1), mapped=False)


def plain(wish: Wish, rng: random.Random) -> Wish:
    """What a device draws by itself."""
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.3)),
        top_k=rng.choice((0, 0, 3)),
        top_p=rng.choice((1.0, 1.0, 0.8)),
        max_tokens=rng.choice((1, 2, 3, 8, 40)),
        min_tokens=rng.choice((0, 0, 1)),
        ignore_eos=True,
    )
    return replace(wish, params=params, constraint=None)


def asked_of(count: int, vocab: int, rng: random.Random, share: float = 1.0) -> list[Wish]:
    """Wishes, a share of them plain."""
    found = wishes(count, vocab, rng)
    return [plain(wish, rng) if rng.random() < share else wish for wish in found]


class Watched:
    """Counts the steps that were begun ahead, of an engine under a schedule."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        whole = steps_ahead.build_batch

        def counted(*args: object, **kwargs: object) -> object:
            self.begun += 1
            return whole(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(steps_ahead, "build_batch", counted)


def check(one: Decoder, asked: list[Wish], schedules: Sequence[Schedule]) -> Seen:
    expected = each_alone(one, asked)
    for schedule in schedules:
        seen = answers(one, asked, replace(schedule, ahead=True))
        for found in seen.rounds:
            for wish in asked:
                assert found[wish.id] == expected[wish.id], f"{wish} under {schedule}"
    return seen


@pytest.mark.parametrize("share", chosen([1.0, 0.8], lambda share: share < 1))
def test_answers_are_the_same(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In random batches, caches and chunks; where a request wants what only the host can do, too,
    and with drafts."""
    rng = random.Random(7)
    one = decoder("qwen3_moe")
    asked = asked_of(24, 300, rng, share)
    watched = Watched(monkeypatch)
    schedules = [random_schedule(len(asked), rng) for _ in range(6)]
    check(one, asked, schedules)
    assert watched.begun > 30


def test_small_and_warm_caches_are_among_them() -> None:
    rng = random.Random(8)
    one = decoder("qwen3_moe")
    asked = asked_of(24, 300, rng)
    tight = Schedule(8, MAX_MODEL_LEN // 8, 24, 300, True, (0,) * 24, 2)
    seen = check(one, asked, [tight])
    assert seen.preemptions and seen.prefix_hits


@pytest.mark.parametrize("model_type", chosen(FAMILIES, lambda name: name in FAMILIES[:3]))
def test_answers_are_the_same_with_windows_and_states(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(9)
    one = decoder(model_type)
    asked = asked_of(12, 300, rng)
    watched = Watched(monkeypatch)
    check(one, asked, [random_schedule(len(asked), rng, least=2) for _ in range(4)])
    assert watched.begun > 10


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in an engine: a step is handed over, and tokens are waited for."""
    seen: list[str] = []
    fetch = steps_ahead.fetch

    def fetched(ids_R: Tensor) -> Callable[[], list[int]]:
        wait = fetch(ids_R)

        def waited() -> list[int]:
            seen.append("wait")
            return wait()

        return waited

    monkeypatch.setattr(steps_ahead, "fetch", fetched)
    execute = steps_ahead.Runner.execute

    def executed(self: steps_ahead.Runner, inputs: StepInputs) -> Tensor:
        seen.append("step" if inputs.drawn is None else "ahead")
        return execute(self, inputs)

    monkeypatch.setattr(steps_ahead.Runner, "execute", executed)
    return seen


def engine_of(count: int, schedule: Schedule = AHEAD, **params: object) -> Engine:
    """Serving so many requests of the bundled model, of 12 tokens each."""
    one = build(decoder(), replace(schedule, ahead=True))
    for number in range(count):
        one.add(request_of(wish_of(f"r{number}", **params), one))
    return one


def wish_of(id: str, **params: object) -> Wish:
    rng = random.Random(id)
    prompt = tuple(rng.randrange(250) for _ in range(5))
    wanted = {"temperature": 0.9, "max_tokens": 12, "ignore_eos": True, **params}
    return Wish(id, prompt, SamplingParams(**wanted), 3)  # type: ignore[arg-type]


def run(one: Engine) -> dict[str, list[StepOutput]]:
    found: dict[str, list[StepOutput]] = {}
    while one.has_work:
        for output in one.step():
            found.setdefault(output.request_id, []).append(output)
    return found


def tokens(outputs: Sequence[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def alone(id: str, **params: object) -> list[int]:
    wish = wish_of(id, **params)
    return each_alone(decoder(), [wish])[id][0]


def test_a_step_is_handed_over_before_the_last_ones_tokens_are_read(order: list[str]) -> None:
    """One step that is no decode, then each ahead of the wait; none that nobody can want."""
    one = engine_of(3)
    run(one)
    assert order == ["step", *["ahead", "wait"] * 11, "wait"]


def test_what_needs_the_host_is_computed_as_it_was(order: list[str]) -> None:
    engine = engine_of(2)
    engine.add(request_of(wish_of("top", logprobs=1), engine))
    run(engine)
    assert order == ["step"] * 12


def test_who_comes_meanwhile_is_computed_beside(order: list[str]) -> None:
    """What was computed ahead of its coming is not computed again."""
    one = engine_of(2)
    one.step()
    one.add(request_of(wish_of("late"), one))
    found = run(one)
    assert order[:6] == ["step", "ahead", "wait", "step", "ahead", "wait"]
    # The last wait but one is for two drawings: those of the two, and the other's.
    assert (order.count("step"), order.count("ahead")) == (2, 12)
    assert tokens(found["late"]) == alone("late")


def test_a_request_that_ends_by_its_token_leaves_nothing() -> None:
    """The step ahead of its end was for nothing; others, and who comes next, do not notice."""
    drawn = alone("r0")
    end = next(i for i in range(2, 11) if drawn[i] not in drawn[:i])
    one = engine_of(2)
    wish = wish_of("r0", stop_token_ids=(drawn[end],))
    one.abort("r0")
    one.add(request_of(replace(wish, id="r0"), one))
    found = run(one)
    assert tokens(found["r0"]) == drawn[: end + 1]
    assert found["r0"][-1].finish_reason is FinishReason.STOP
    assert tokens(found["r1"]) == alone("r1")
    assert one.scheduler.drained


def test_an_id_that_comes_again_is_another_request() -> None:
    """Aborted while its next token is computed, and asked for anew at once."""
    one = engine_of(2)
    for _ in range(4):
        one.step()
    one.abort("r0")
    one.add(request_of(wish_of("r0", temperature=0.0), one))
    found = run(one)
    assert tokens(found["r0"]) == alone("r0", temperature=0.0)


EXECUTE = steps_ahead.Runner.execute


def interrupted(at: int) -> Callable[[steps_ahead.Runner, StepInputs], Tensor]:
    """What computes a step, but for one call of it."""
    calls = count(1)

    def execute(self: steps_ahead.Runner, inputs: StepInputs) -> Tensor:
        if next(calls) == at:
            raise KeyboardInterrupt
        return EXECUTE(self, inputs)

    return execute


def test_a_step_that_failed_takes_the_one_behind_it_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted at any call to the runner, the engine goes on to the same answers."""
    expected = {f"r{i}": alone(f"r{i}") for i in range(3)}
    for fails_at in range(1, 13):
        one = engine_of(3)
        monkeypatch.setattr(steps_ahead.Runner, "execute", interrupted(fails_at))
        found: dict[str, list[int]] = {id: [] for id in expected}
        interrupts = 0
        while one.has_work:
            try:
                outputs = one.step()
            except KeyboardInterrupt:
                interrupts += 1
                continue
            for output in outputs:
                found[output.request_id] += output.token_ids
        assert interrupts == 1 and found == expected
        assert one.scheduler.drained


@pytest.mark.parametrize("model_type", ["", "qwen3_next"])
def test_a_failed_step_ends_its_requests_alone(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(decoder(model_type), replace(AHEAD, ahead=True))
    one.add(request_of(wish_of("r0"), one))
    for _ in range(3):
        one.step()
    execute = steps_ahead.Runner.execute
    broken = True

    def executed(self: steps_ahead.Runner, inputs: StepInputs) -> Tensor:
        if broken:
            raise RuntimeError("out of everything")
        return execute(self, inputs)

    monkeypatch.setattr(steps_ahead.Runner, "execute", executed)
    ended = one.step()
    assert [output.finish_reason for output in ended] == [FinishReason.ERROR]
    broken = False
    one.add(request_of(wish_of("r1"), one))
    expected = each_alone(decoder(model_type), [wish_of("r1")])["r1"][0]
    assert tokens(run(one)["r1"]) == expected
    assert one.scheduler.drained


def test_numbers_that_are_not_finite_end_their_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no id of none is looked up in the step behind."""
    one = engine_of(2)
    for _ in range(3):
        one.step()
    logits = steps_ahead.Runner.logits
    looked_up: list[list[int]] = []
    execute = steps_ahead.Runner.execute

    def broken(self: steps_ahead.Runner, rows: Sequence[int], shared: bool = False) -> Tensor:
        found = logits(self, rows, shared)
        found[0] = torch.nan
        return found

    def executed(self: steps_ahead.Runner, inputs: StepInputs) -> Tensor:
        looked_up.append(inputs.input_ids.tolist())
        return execute(self, inputs)

    monkeypatch.setattr(steps_ahead.Runner, "logits", broken)
    monkeypatch.setattr(steps_ahead.Runner, "execute", executed)
    one.step()
    monkeypatch.setattr(steps_ahead.Runner, "logits", logits)
    found = run(one)
    assert found["r0"][-1].finish_reason is FinishReason.ERROR
    assert "NaN" in str(found["r0"][-1].error)
    assert found["r1"][-1].finish_reason is FinishReason.LENGTH
    assert min(map(min, looked_up)) >= 0


def test_what_a_device_draws_is_what_the_sampler_draws() -> None:
    """For each of the kinds, at the position that a request's next token has."""
    one = engine_of(0)
    kinds: tuple[dict[str, object], ...] = (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"top_k": 1},
        {"temperature": 1e-30},
        {"top_k": 5, "top_p": 0.9},
        {"top_p": 0.5},
        {"min_p": 0.2},
    )
    requests = [
        request_of(wish_of(str(number), **params), one) for number, params in enumerate(kinds)
    ]
    assert all(map(drawn_from_logits, requests))
    logits_LV = torch.randn(len(requests), 300, generator=torch.Generator().manual_seed(0))
    ops = one.runner.ops
    draws = [draw_of(request, ops, request.num_tokens) for request in requests]
    chosen = ops.choose(logits_LV, draws).tolist()
    drawn = [outcome(each, token) for each, token in zip(requests, chosen, strict=True)]
    assert drawn == sample(logits_LV, requests, ops)


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 0},
        {"min_tokens": 2},
        {"logit_bias": {3: 1.0}},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"allowed_token_ids": (3, 4)},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.0, "min_tokens": 2},
    ],
    ids=str,
)
def test_what_a_device_does_not_draw_by_itself(params: dict[str, object]) -> None:
    request = request_of(wish_of("w", **params), engine_of(0))
    assert not drawn_from_logits(request)


def test_what_is_held_to_a_grammar_is_not_either() -> None:
    wish = next(wish for wish in wishes(9, 300, random.Random(0)) if wish.constraint is not None)
    held = replace(wish_of("w", temperature=0.0), constraint=wish.constraint)
    assert not drawn_from_logits(request_of(held, engine_of(0)))


@pytest.mark.parametrize(
    ("model_type", "params", "drawn"),
    [
        ("", {"top_k": 5}, True),
        ("", {"top_k": 300}, False),
        ("", {"top_p": 0.9}, True),
        ("qwen3_next", {"top_k": 5, "top_p": 0.9}, True),
        ("qwen3_next", {"top_p": 0.9}, False),
    ],
    ids=str,
)
def test_which_candidates_a_device_draws_from(
    model_type: str, params: dict[str, object], drawn: bool, order: list[str]
) -> None:
    """No more than it looks at first; and of a model with states, which cannot be taken back,
    none that may turn out to be too few."""
    one = build(decoder(model_type), AHEAD)
    one.add(request_of(wish_of("w", **params), one))
    run(one)
    assert ("ahead" in order) == drawn


def test_a_draw_that_needs_more_candidates_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    """By the host, once; others keep what was computed ahead of theirs."""
    params: dict[str, object] = {"temperature": 3.0, "top_p": 0.95}
    expected = {f"r{i}": alone(f"r{i}", **params) for i in range(3)}
    order.clear()
    monkeypatch.setattr(type(decoder().ops), "first_look", 32)
    one = engine_of(3, **params)
    found = run(one)
    assert {id: tokens(outputs) for id, outputs in found.items()} == expected
    assert order.count("step") > 2 and order.count("ahead") > 5
    assert one.scheduler.drained


def test_a_trace_has_what_was_begun_ahead(tmp_path: Path) -> None:
    """It takes blocks before the next plan would, so that decisions come out otherwise without."""
    path = tmp_path / "trace.jsonl"
    schedule = replace(AHEAD, block_size=4, num_blocks=24, ahead=True)
    one = traced(path, schedule)
    for number in range(16):
        stops = tuple(range(0, 256, 9))
        one.add(request_of(wish_of(f"r{number}", max_tokens=40, stop_token_ids=stops), one))
    run(one)
    one.close()
    assert one.stats().preemptions > 0
    assert replay(path).difference is None
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "following" not in line))
    assert replay(path).difference is not None


def traced(path: Path, schedule: Schedule) -> Engine:
    runner, scheduler, info = parts(decoder(), schedule)
    writer = TraceWriter(path, scheduler.config, scheduler.pool)
    ahead = steps_ahead.DeviceStepsAhead(runner, scheduler, info.block_size)
    return Engine(runner, scheduler, info, ahead=ahead, trace=writer)
