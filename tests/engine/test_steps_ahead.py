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
from typing import Any

import pytest
import torch
from torch import Tensor

import moebius
from covering import chosen
from moebius.engine import sampler, steps_ahead
from moebius.engine.client import StepOutput
from moebius.engine.engine import Engine
from moebius.engine.sampler import Sampled, begin, needs_host, sample
from moebius.engine.trace import TraceWriter, replay
from moebius.errors import ConstraintError, NumericalError
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.ops.steps import StepInputs
from moebius.request.constraint import Constraint
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import ServingLimits
from moebius.schedule.request import Request, SamplingParams
from oracle import save_tiny
from random_schedules import (
    CONSTRAINTS,
    MAX_MODEL_LEN,
    Schedule,
    Seen,
    Wish,
    answers,
    build,
    each_alone,
    groups_of,
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


def drawn_ahead(wish: Wish, rng: random.Random) -> Wish:
    """What a device draws by itself: in each way, under any of what changes logits before, and with
    log-probabilities."""

    def maybe(*values: float) -> float | None:
        return rng.choice(values) if rng.random() < 0.3 else None

    max_tokens = rng.choice((1, 3, 8, 40, 60))
    wanted = {
        "top_k": maybe(3),
        "top_p": maybe(0.8),
        "presence_penalty": maybe(-1.5, 0.7),
        "frequency_penalty": maybe(-0.4, 0.3),
        "repetition_penalty": maybe(0.6, 1.4),
        "logit_bias": {id: rng.uniform(-5, 5) for id in rng.sample(range(256), rng.choice((0, 9)))},
        "logprobs": maybe(0, 3, 20),
        "min_tokens": maybe(1, max_tokens),
        "stop_token_ids": tuple(rng.sample(range(256), rng.choice((0, 0, 9)))),
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.3)),
        max_tokens=max_tokens,
        ignore_eos=True,
        **given,  # type: ignore[arg-type]
    )
    banned = Constraint(bad_words=tuple((id,) for id in range(0, 250, 3)))
    return replace(wish, params=params, constraint=banned if rng.random() < 0.2 else None)


def asked_of(count: int, vocab: int, rng: random.Random, share: float = 1.0) -> list[Wish]:
    """Wishes, a share of which a device draws by itself. Every third is also there with another
    seed, as with n = 2."""
    found = wishes(count, vocab, rng)
    found = [drawn_ahead(wish, rng) if rng.random() < share else wish for wish in found]
    for first in range(0, count - 1, 3):
        second = found[first + 1]
        found[first + 1] = replace(found[first], id=second.id, seed=second.seed)
    return found


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
    assert watched.begun > 100


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
    groups = groups_of(one)
    check(one, asked, [random_schedule(len(asked), rng, groups, least=2) for _ in range(4)])
    assert watched.begun > 40


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in an engine: a step is handed over, and tokens are waited for."""
    seen: list[str] = []
    fetch = sampler.fetch

    def fetched(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        wait = fetch(*tensors)

        def waited() -> tuple[Tensor, ...]:
            seen.append("wait")
            return wait()

        return waited

    monkeypatch.setattr(sampler, "fetch", fetched)
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
    """One request is enough: the others would wait for it anyway."""
    engine = engine_of(2)
    engine.add(request_of(wish_of("few", allowed_token_ids=(3, 4, 5)), engine))
    run(engine)
    assert order == ["step", "wait"] * 12


AHEAD_OF_TOKENS: tuple[dict[str, object], ...] = (
    {"logprobs": 0},
    {"logprobs": 20, "temperature": 0.0},
    {"min_tokens": 9, "stop_token_ids": tuple(range(100))},
    {"logit_bias": {3: 100.0}},
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.5, "top_k": 3},
    {"repetition_penalty": 1.2, "temperature": 0.0},
    {"repetition_penalty": 0.5, "logprobs": 2, "top_p": 0.9},
)


@pytest.mark.parametrize("params", AHEAD_OF_TOKENS, ids=str)
def test_log_probabilities_and_penalties_need_no_host(
    params: dict[str, object], order: list[str]
) -> None:
    """Not even one token is read before the step behind it has begun."""
    wish = wish_of("r0", **params)
    expected = each_alone(decoder(), [wish])[wish.id]
    order.clear()
    engine = engine_of(2)
    engine.abort("r0")
    engine.add(request_of(wish, engine))
    found = run(engine)["r0"]
    steps = len(expected[0])
    assert order[: 2 * steps - 1] == ["step", *["ahead", "wait"] * (steps - 1)]
    assert order.count("step") == 1
    assert tokens(found) == expected[0]
    assert [each for output in found for each in output.logprobs] == expected[1]


def test_banned_ids_need_no_host(order: list[str]) -> None:
    """Words of one token; where they are longer it depends on what was drawn."""
    for words, ahead in ((((3,), (4,)), True), (((3,), (4, 5)), False)):
        order.clear()
        engine = engine_of(1)
        held = replace(wish_of("held"), constraint=Constraint(bad_words=words))
        engine.add(request_of(held, engine))
        found = run(engine)
        assert ("ahead" in order) == ahead
        assert tokens(found["held"]) == each_alone(decoder(), [held])["held"][0]


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


@pytest.mark.parametrize(
    ("params", "broken_id"),
    [
        ({}, slice(None)),
        ({"logprobs": 1, "repetition_penalty": 1.2}, slice(None)),
        ({"presence_penalty": 1.0, "top_k": 5}, 7),
        # Banned, and so seen by none but the log-probabilities.
        ({"logprobs": 1, "min_tokens": 12, "stop_token_ids": (7,)}, 7),
    ],
    ids=str,
)
def test_numbers_that_are_not_finite_end_their_request_alone(
    params: dict[str, object], broken_id: int | slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no id of none is looked up in the step behind."""
    one = engine_of(2, **params)
    for _ in range(3):
        one.step()
    logits = steps_ahead.Runner.logits
    looked_up: list[list[int]] = []
    execute = steps_ahead.Runner.execute

    def broken(self: steps_ahead.Runner, rows: Sequence[int], shared: bool = False) -> Tensor:
        found = logits(self, rows, shared)
        found[0, broken_id] = torch.nan
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
    assert tokens(found["r1"]) == alone("r1", **params)[4:]


def test_who_has_nothing_left_to_draw_ends_alone() -> None:
    """With the error that it has where the host draws."""
    model = decoder("qwen3_moe")
    everything = Constraint(bad_words=tuple((id,) for id in range(300)))
    expected = each_alone(model, [wish_of("r1")])["r1"][0]
    errors = []
    for ahead in (True, False):
        one = build(model, replace(AHEAD, ahead=ahead))
        one.add(request_of(replace(wish_of("banned"), constraint=everything), one))
        one.add(request_of(wish_of("r1"), one))
        found = run(one)
        errors.append(found["banned"][-1].error)
        assert tokens(found["banned"]) == [] and tokens(found["r1"]) == expected
    assert all(isinstance(error, ConstraintError) for error in errors)
    assert str(errors[0]) == str(errors[1])


def test_ends_that_are_all_there_is_leave_nothing_to_draw() -> None:
    """Where min_tokens bans them; behind the token that the device alone knows they are drawn."""
    wish = {"min_tokens": 3, "stop_token_ids": tuple(range(200))}
    requests = [behind([1], [2], **wish), behind([1], [2, 2], **wish), behind([1], [2], top_k=1)]
    logits_LV = torch.zeros(3, 200)
    found = begin(logits_LV, requests, [3, 4, 3], decoder().ops, torch.tensor([2, 2, 2])).outcomes
    assert isinstance(found[0], NumericalError) and "min_tokens" in str(found[0])
    assert isinstance(found[1], Sampled) and found[2] == Sampled(0)


@pytest.mark.parametrize("length", [0, 4])
@pytest.mark.parametrize("model_type", ["", "qwen3_next"])
def test_an_unforeseen_failure_is_its_requests_alone(
    length: int, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it while the host knows all tokens or ahead of the last one; but where states have gone on
    it is the step's."""
    model = decoder(model_type)
    expected = each_alone(model, [wish_of("r1")])["r1"][0]
    shaping = sampler._shaping

    def explode(request: Request, *args: Any) -> Any:
        if request.id == "bad" and len(request.output_ids) >= length:
            raise RuntimeError("boom")
        return shaping(request, *args)

    monkeypatch.setattr(sampler, "_shaping", explode)
    one = build(model, AHEAD)
    one.add(request_of(wish_of("r1"), one))
    one.add(request_of(wish_of("bad", presence_penalty=0.5), one))
    found = run(one)
    assert found["bad"][-1].finish_reason is FinishReason.ERROR
    if model_type and length:
        assert found["r1"][-1].finish_reason is FinishReason.ERROR
    else:
        assert tokens(found["r1"]) == expected
    assert one.scheduler.drained


KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"top_k": 1},
    {"temperature": 1e-30},
    {"top_k": 5, "top_p": 0.9},
    {"top_p": 0.5},
    {"min_p": 0.2},
)
CHANGES: tuple[dict[str, object], ...] = (
    {},
    {"logprobs": 3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.25},
    {"frequency_penalty": -0.7, "logprobs": 0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.4, "logit_bias": {7: 2.0, 299: -1.0}},
    {"min_tokens": 6, "stop_token_ids": tuple(range(0, 300, 2))},
    {"min_tokens": 5, "stop_token_ids": tuple(range(0, 300, 2))},
)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_a_device_draws_is_what_the_sampler_draws(change: dict[str, object]) -> None:
    """For each of the kinds, at the position that a request's next token has; whether the host
    knows the last one or the device alone does, be it a new one or drawn before, read, biased or
    banned, the first id or the last."""
    ops = decoder().ops
    newest = [7, 299, 0, 3, 5, 4, 298]
    requests = [
        behind(7 * [3, 5, 5], [*[3, 4, 4, 7], last], **change, **kind)
        for kind, last in zip(KINDS, newest, strict=True)
    ]
    earlier = [behind(7 * [3, 5, 5], [3, 4, 4, 7], **change, **kind) for kind in KINDS]
    assert not any(map(needs_host, requests))
    logits_LV = torch.randn(len(requests), 300, generator=torch.Generator().manual_seed(0))
    expected = sample(logits_LV, requests, ops)
    assert all(isinstance(each, Sampled) for each in expected)
    positions = [request.num_tokens for request in requests]
    assert begin(logits_LV, requests, positions, ops).outcomes == expected
    newest_L = torch.tensor(newest)
    assert begin(logits_LV, earlier, positions, ops, newest_L).outcomes == expected


def behind(prompt: list[int], output: list[int], **params: object) -> Request:
    """A request that has come so far."""
    limits = ServingLimits(300, MAX_MODEL_LEN)
    wanted = SamplingParams(max_tokens=40, **params)  # type: ignore[arg-type]
    asked = EngineRequest.create(
        "r", prompt, wanted, limits, arrival=0.0, seed=11, output_ids=output
    )
    return Request(asked)


def test_a_great_many_ids_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has the newest id that is its own."""
    ops = decoder().ops
    changes = [change for change in CHANGES if "logprobs" not in change]
    earlier = [behind([3, 5, 5], [3, 4], **change) for change in changes]
    requests = [behind([3, 5, 5], [3, 4, row], **change) for row, change in enumerate(changes)]
    logits_LV = torch.randn(len(requests), 300, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sampler, "SAMPLED_IDS", 8)
    found = begin(logits_LV, earlier, [6] * len(earlier), ops, torch.arange(len(earlier)))
    monkeypatch.undo()
    assert found.outcomes == sample(logits_LV, requests, ops)


def test_what_a_device_does_not_draw_by_itself() -> None:
    one = engine_of(0)
    assert needs_host(request_of(wish_of("w", allowed_token_ids=(3, 4)), one))
    for held in CONSTRAINTS:
        # Grammars, behind reasoning too, and words of several tokens.
        if held is not None:
            assert needs_host(request_of(replace(wish_of("w"), constraint=held), one))


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
