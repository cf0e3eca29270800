"""The sampler against naive loops, the documented order of its steps, and the statistics of its
draws."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebius.engine import sampler
from moebius.engine.logprobs import token_logprobs
from moebius.engine.sampler import Sampled, uniform
from moebius.engine.step_memory import sampling_bytes
from moebius.errors import EngineError, NumericalError
from moebius.ops import Ops, select_ops
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.schedule.request import Request
from scipy_free import chi_square_limit

OPS: Ops = select_ops("cpu", torch.float32)
VOCAB = 50


def request(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    seed: int = 0,
    vocab: int = VOCAB,
    **params: Any,
) -> Request:
    return Request(
        EngineRequest.create(
            "r",
            prompt or [min(1, vocab - 1)],
            SamplingParams(**params),
            ServingLimits(vocab, max_model_len=10_000),
            arrival=0.0,
            seed=seed,
            output_ids=output or [],
            eos_ids=frozenset({0}),
        )
    )


def sample(logits: torch.Tensor, requests: list[Request], ops: Ops = OPS) -> list[Any]:
    return sampler.sample(logits.contiguous(), requests, ops)


def draw(logits: torch.Tensor, one: Request) -> int:
    outcome = sample(logits[None], [one])[0]
    assert isinstance(outcome, Sampled)
    return outcome.token_id


def naive_shares(logits: list[float], one: Request) -> dict[int, float]:
    """Ids that can be drawn and their probabilities, in the order in which a draw adds them up.

    The documented order of the samplers, step by step, on Python floats; ties to the lowest id.
    """
    p, x = one.params, list(logits)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in set(one.prompt_ids) | set(one.output_ids):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(one.output_ids):
        x[token] -= p.presence_penalty + p.frequency_penalty * one.output_ids.count(token)
    if len(one.output_ids) < p.min_tokens:
        for token in one.stop_ids:
            x[token] = -math.inf
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if p.temperature == 0:
        return {order[0]: 1.0}
    x = [v / p.temperature for v in x]
    if p.top_k > 0:
        order = order[: p.top_k]
    top = x[order[0]]
    weights = {i: math.exp(x[i] - top) for i in order}
    total, mass, kept = sum(weights.values()), 0.0, []
    for i in order:
        if mass >= p.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= p.min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    whole = p.top_k <= 0 and p.top_p == 1 and p.min_p == 0
    return {i: weights[i] / total for i in (sorted(kept) if whole else kept)}


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"top_k": 7, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
    {"repetition_penalty": 1.8, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"repetition_penalty": 0.6, "frequency_penalty": -1.0},
    {"logit_bias": {5: 3.0, 7: -100.0}, "top_k": 5},
    {"min_tokens": 10, "logit_bias": {0: 50.0}},
]


@pytest.mark.parametrize("params", CASES)
def test_draws_follow_the_naive_distribution(params: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, generator=generator) * 2
    logits[4] = logits[9]
    count = 3000
    ones = [
        request([1, 2, 2], [3, 3, 4], seed=seed, max_tokens=20, **params) for seed in range(count)
    ]
    drawn = sample(logits.expand(count, 12), ones)
    few = sample(
        logits.expand(300, 12), ones[:300], ReferenceOps()
    )  # which take fifty times as long
    assert [one.token_id for one in few] == [one.token_id for one in drawn[:300]]
    shares = naive_shares(logits.tolist(), ones[0])
    expected = [shares.get(token, 0.0) for token in range(12)]
    observed = np.bincount([s.token_id for s in drawn if isinstance(s, Sampled)], minlength=12)
    assert observed.sum() == count
    assert all(observed[i] == 0 for i in range(12) if expected[i] == 0.0)
    cells = [i for i in range(12) if expected[i] > 0]
    statistic = sum((observed[i] - count * expected[i]) ** 2 / (count * expected[i]) for i in cells)
    assert statistic < chi_square_limit(len(cells) - 1)


def random_row(rng: random.Random, vocab: int) -> torch.Tensor:
    """Normal, tied, all equal, or with one logit that is not finite."""
    logits = torch.tensor([rng.gauss(0, 3) for _ in range(vocab)])
    kind = rng.random()
    if kind < 0.3:
        logits = logits.round()
    elif kind < 0.35:
        logits[:] = 0.0
    elif kind < 0.45:
        logits[rng.randrange(vocab)] = rng.choice((math.nan, math.inf, -math.inf))
    return logits


def random_request(rng: random.Random, vocab: int) -> Request:
    """Any kind of row, with or without penalties; values that no sum of ties meets exactly."""

    def maybe(share: float, *values: Any) -> Any:
        return rng.choice(values) if rng.random() < share else None

    wishes = {
        "temperature": maybe(0.6, 0, 0, 0.3, 0.71, 1.9),
        "top_k": maybe(0.4, 1, 2, 5, 300, vocab, vocab + 1, 100_000),
        "top_p": maybe(0.4, 1e-9, 0.123, 0.613, 0.977),
        "min_p": maybe(0.2, 0.0123, 0.321),
        "repetition_penalty": maybe(0.3, 0.43, 1.37),
        "presence_penalty": maybe(0.2, -1.03, 0.77),
        "frequency_penalty": maybe(0.2, -0.31, 1.13),
        "logit_bias": maybe(0.2, {rng.randrange(vocab): 1.7}, {vocab - 1: -100, 0: 3.1}),
        "min_tokens": maybe(0.2, 1, 3),
        "logprobs": maybe(0.3, 0, 1, 20),
    }
    tokens = [rng.randrange(vocab) for _ in range(30)]
    cut = rng.randrange(1, 30)
    return request(
        tokens[:cut],
        tokens[cut : cut + rng.choice((0, 1, 20))],
        rng.randrange(2**63),
        vocab,
        max_tokens=100,
        **{name: value for name, value in wishes.items() if value is not None},
    )


@pytest.mark.case("B4")
@pytest.mark.case("B5")
@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
def test_each_draw_is_the_one_that_the_uniform_number_picks(ops: Ops) -> None:
    """Rows of all kinds in one batch; float32 sums of the kernels leave a seam of 1e-5 between two
    shares."""
    rng = random.Random(4)
    for vocab in (1, 2, 3, 16, 17, 50, 257, 700) * 3:
        ones = [random_request(rng, vocab) for _ in range(25)]
        rows = [random_row(rng, vocab) for _ in ones]
        for outcome, logits, one in zip(
            sample(torch.stack(rows), ones, ops), rows, ones, strict=True
        ):
            if not logits.isfinite().all() and not (len(one.output_ids) < one.params.min_tokens):
                assert isinstance(outcome, NumericalError), one.params
                continue
            if isinstance(
                outcome, NumericalError
            ):  # every id is banned, or one that is not finite is not
                assert vocab == 1 or not logits.isfinite().all(), one.params
                continue
            shares = naive_shares(logits.tolist(), one)
            ends = dict(zip(shares, accumulate(shares.values()), strict=True))
            end, u = ends[outcome.token_id], uniform(one.asked.seed, one.num_tokens)
            assert end - shares[outcome.token_id] - 1e-5 <= u <= end + 1e-5, one.params


def seconds(call: Callable[[], object]) -> float:
    """Processor time of this thread, the least of a few."""
    found = []
    for _ in range(4):
        start = time.thread_time()
        call()
        found.append(time.thread_time() - start)
    return min(found)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"top_k": 100_000}, marks=pytest.mark.case("B4")),
        pytest.param({"top_p": 0.99, "temperature": 3}, marks=pytest.mark.case("B4")),
        pytest.param({"temperature": 0, "logprobs": 20}, marks=pytest.mark.case("B4")),
        pytest.param({"temperature": 0, "presence_penalty": 1.0}, marks=pytest.mark.case("B5")),
        pytest.param({"temperature": 0, "logit_bias": {7: 2.0}}, marks=pytest.mark.case("B5")),
        pytest.param({"temperature": 0, "min_tokens": 9}, marks=pytest.mark.case("B5")),
        pytest.param({}, id="whole vocabulary"),
    ],
)
def test_one_requests_parameters_cost_that_request(params: dict[str, Any]) -> None:
    """Beside 31 greedy rows it takes what it takes alone and what they take alone, with room for
    twice that."""
    vocab, ops = 100_000, CpuOps(threads=1)
    logits = torch.randn(32, vocab, generator=torch.Generator().manual_seed(0))
    one = request(output=[3, 5], vocab=vocab, max_tokens=20, **params)
    others = [request(temperature=0, vocab=vocab)] * 31
    alone = seconds(lambda: sample(logits[:1], [one], ops)) + seconds(
        lambda: sample(logits[1:], others, ops)
    )
    assert seconds(lambda: sample(logits, [one, *others], ops)) < 3 * alone


@pytest.mark.case("B4")
@pytest.mark.case("B5")
@pytest.mark.parametrize(
    ("ops", "count"), [(OPS, 128), (ReferenceOps(), 24)], ids=["kernels", "reference"]
)
def test_sampling_takes_no_more_memory_than_the_plan_says(ops: Ops, count: int) -> None:
    vocab = 60_000
    rng = random.Random(0)
    prompt = [rng.randrange(vocab) for _ in range(2000)]
    wishes: list[dict[str, Any]] = [
        {"top_k": 50_000},
        {"repetition_penalty": 1.3, "top_k": 50_000, "logprobs": 20},
    ]
    ones = [request(prompt, vocab=vocab, seed=i, **wishes[i % 2]) for i in range(count)]
    logits = torch.randn(count, vocab)
    sample(logits[:2], ones[:2], ops)
    grown = peak_growth(lambda: sample(logits, ones, ops))
    assert grown < sampling_bytes(vocab, 10_000)


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the process' resident memory at its highest is above what it was before."""

    def resident(name: str) -> int:
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )
        return 1024 * int(line.split()[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not reset the highest resident memory")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
def test_rows_of_all_kinds_together_and_alone(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the ids that they ask for are too many for one part, and the logits are in the end
    what they were."""
    rng = random.Random(5)
    for vocab in (17, 700):
        ones = [random_request(rng, vocab) for _ in range(40)]
        logits = torch.stack([random_row(rng, vocab) for _ in ones])
        before = logits.clone().view(torch.int32)
        together = [str(outcome) for outcome in sample(logits, ones, ops)]
        alone = [
            str(sample(logits[i : i + 1].clone(), [one], ops)[0]) for i, one in enumerate(ones)
        ]
        assert together == alone
        monkeypatch.setattr(sampler, "SAMPLED_IDS", 300)
        assert [str(outcome) for outcome in sample(logits, ones, ops)] == together
        monkeypatch.undo()
        assert torch.equal(logits.view(torch.int32), before)


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.zeros(50)
    logits[[30, 17, 41]] = 5.0
    assert draw(logits, request(temperature=0)) == 17
    assert draw(logits, request(temperature=0, logit_bias={2: 1.0})) == 17
    assert draw(logits, request(top_k=1)) == 17
    assert draw(logits, request(temperature=100, top_p=0)) == 17
    assert draw(logits, request(temperature=100, top_p=0, top_k=5, logit_bias={2: 6.0})) == 2


@pytest.mark.case("B4")
@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
@pytest.mark.parametrize("temperature", [1e-20, 1e-10, 1e-7, 1e-5])
def test_a_cold_nucleus_holds_as_many_ties_as_its_mass_says(ops: Ops, temperature: float) -> None:
    """Three ids share the mass; a nucleus of half of it is two of them, one of nearly all is all
    three."""
    logits = torch.linspace(-13, 11, 2000)
    logits[[7, 70, 700]] = 12.3
    for top_p, expected in ((0.3, {7}), (0.5, {7, 70}), (0.97, {7, 70, 700})):
        ones = [
            request(vocab=2000, seed=seed, temperature=temperature, top_p=top_p, max_tokens=9)
            for seed in range(40)
        ]
        drawn = sample(logits.expand(40, 2000), ones, ops)
        assert {one.token_id for one in drawn} == expected, top_p


def test_nucleus_beyond_the_first_candidates() -> None:
    """A flat distribution over more ids than the first guess holds: top_p = 0.5 keeps exactly half
    of them."""
    limits = ServingLimits(vocab_size=4096, max_model_len=10)
    seen = set()
    for seed in range(4000):
        one = Request(
            EngineRequest.create(
                "r", [1], SamplingParams(top_p=0.5, max_tokens=1), limits, arrival=0.0, seed=seed
            )
        )
        seen.add(draw(torch.zeros(4096), one))
    assert max(seen) < 2048
    assert len(seen) > 1500


def test_a_draw_depends_on_nothing_but_its_own_request() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    ones = [
        request(seed=seed, output=[4] * seed, max_tokens=20, top_p=0.9, presence_penalty=1.0)
        for seed in range(8)
    ]
    together = sample(logits, ones)
    alone = [sample(logits[i : i + 1], [ones[i]])[0] for i in range(8)]
    assert together == alone


def test_another_position_or_seed_is_another_draw() -> None:
    values = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(values) == 2500
    assert 0.47 < sum(values) / 2500 < 0.53


def test_extreme_temperatures_do_not_overflow() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2)) * 100
    for cold in (1e-300, 1e-19, 1e-9, 1e-5):
        for params in ({}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 9, "top_p": 0.5}):
            assert draw(logits, request(temperature=cold, **params)) == int(logits.argmax())
    assert 0 <= draw(logits, request(temperature=100)) < 50


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_its_own_error_and_no_other(bad: float) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 7] = bad
    first, second, third = sample(
        logits, [request(temperature=0), request(), request(temperature=0)]
    )
    assert isinstance(second, NumericalError)
    assert first == third == Sampled(0)


@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_log_probability_is_nan_where_a_bad_logit_is_banned(ops: Ops, bad: float) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, 0] = bad  # the end token's
    wish = {"temperature": 0, "min_tokens": 3, "logprobs": 2}
    broken, good = sample(logits, [request(**wish), request(**wish)], ops)
    assert isinstance(broken, NumericalError)
    assert isinstance(good, Sampled)


@pytest.mark.case("C14")
@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
def test_the_least_repetition_penalty_repeats_and_is_no_error(ops: Ops) -> None:
    logits = torch.linspace(0.5, 9, VOCAB)
    for penalty in (5e-324, 1e-40, 1e-20, 1e-3):
        outcome = sample(logits[None], [request([4, 9], repetition_penalty=penalty)], ops)[0]
        assert isinstance(outcome, Sampled) and outcome.token_id == 9, penalty


def test_nothing_left_to_draw_is_an_error() -> None:
    one = request(min_tokens=1, max_tokens=2, stop_token_ids=tuple(range(50)))
    assert isinstance(sample(torch.zeros(1, 50), [one])[0], NumericalError)


@pytest.mark.case("C14")
@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
def test_end_ids_beyond_the_vocabulary_are_left_out(ops: Ops) -> None:
    one = Request(
        EngineRequest.create(
            "r",
            [1],
            SamplingParams(temperature=0, min_tokens=1),
            ServingLimits(VOCAB, 100),
            arrival=0.0,
            eos_ids=frozenset({7, VOCAB, 100_000, -1}),
        )
    )
    assert one.stop_ids == {7}
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.0
    assert sample(logits, [one], ops) == [Sampled(8)]


def test_an_unforeseen_failure_stays_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> float:
        raise RuntimeError("boom")

    monkeypatch.setattr("moebius.engine.sampler.uniform", explode)
    logits = torch.zeros(2, 50)
    drawn = sample(logits, [request(logit_bias={4: 1.0}), request(temperature=0)])
    assert not logits.any()
    assert isinstance(drawn[0], EngineError)
    assert drawn[1] == Sampled(0)


def test_logprobs_are_the_models_own_before_any_sampler() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(5))
    logits[10] = logits[20] = logits.max() + 1
    one = request(temperature=0.3, top_k=5, logit_bias={7: 100.0}, logprobs=4)
    outcome = sample(logits[None], [one])[0]
    assert isinstance(outcome, Sampled) and outcome.token_id == 7 and outcome.logprob is not None
    expected = torch.log_softmax(logits.double(), -1)
    assert outcome.logprob.logprob == pytest.approx(float(expected[7]), abs=1e-6)
    assert outcome.logprob.rank == 1 + int((expected > expected[7]).sum())
    best = sorted(range(50), key=lambda i: (-float(expected[i]), i))[:4]
    assert [i for i, _ in outcome.logprob.top] == best
    assert best[:2] == [10, 20]
    assert [v for _, v in outcome.logprob.top] == pytest.approx(
        [float(expected[i]) for i in best], abs=1e-6
    )


def test_prompt_logprobs() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(6))
    scored = token_logprobs(logits, [4, 5, 6], 1, OPS)
    expected = torch.log_softmax(logits.double(), -1)
    assert scored is not None
    assert [s.logprob for s in scored] == pytest.approx(
        [float(expected[i, 4 + i]) for i in range(3)], abs=1e-6
    )
    assert [s.top[0][0] for s in scored] == expected.argmax(-1).tolist()
    logits[1, 1] = math.nan
    assert token_logprobs(logits, [4, 5, 6], 1, OPS) is None
