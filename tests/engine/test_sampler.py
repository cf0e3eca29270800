"""The sampler against naive loops, the documented order of its steps, and the statistics of its draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from moebius.engine import sampler
from moebius.engine.sampler import Sampled, uniform
from moebius.errors import EngineError, NumericalError
from moebius.ops import Ops, select_ops
from moebius.ops.reference import ReferenceOps
from moebius.schedule.request import Request, SamplingParams, ServingLimits
from scipy_free import chi_square_limit

OPS: Ops = select_ops("cpu", torch.float32)
LIMITS = ServingLimits(vocab_size=50, max_model_len=1000)


def request(prompt: list[int] | None = None, output: list[int] | None = None, seed: int = 0, **params: Any) -> Request:
    return Request.create(
        "r",
        prompt or [1],
        SamplingParams(**params),
        LIMITS,
        arrival=0.0,
        seed=seed,
        output_ids=output or [],
        eos_ids=frozenset({0}),
    )


def sample(logits: torch.Tensor, requests: list[Request], ops: Ops = OPS) -> list[Any]:
    return sampler.sample(logits.contiguous(), requests, ops)


def draw(logits: torch.Tensor, one: Request) -> int:
    outcome = sample(logits[None], [one])[0]
    assert isinstance(outcome, Sampled)
    return outcome.token_id


def naive_distribution(logits: list[float], one: Request) -> list[float]:
    """The documented order, step by step, on Python floats; ties to the lowest id."""
    p, x = one.params, list(logits)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in set(one.prompt_ids) | set(one.output_ids):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(one.output_ids):
        x[token] -= p.presence_penalty + p.frequency_penalty * one.output_ids.count(token)
    if len(one.output_ids) < p.min_tokens:
        for token in one.stop_ids:
            x[token] = -math.inf
    x = [v / p.temperature for v in x]
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
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
    return [weights[i] / total if i in kept else 0.0 for i in range(len(x))]


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


@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
@pytest.mark.parametrize("params", CASES)
def test_draws_follow_the_naive_distribution(params: dict[str, Any], ops: Ops) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, generator=generator) * 2
    logits[4] = logits[9]
    count = 3000
    ones = [request([1, 2, 2], [3, 3, 4], seed=seed, max_tokens=20, **params) for seed in range(count)]
    drawn = sample(logits.expand(count, 12), ones, ops)
    expected = naive_distribution(logits.tolist(), ones[0])
    observed = np.bincount([s.token_id for s in drawn if isinstance(s, Sampled)], minlength=12)
    assert observed.sum() == count
    assert all(observed[i] == 0 for i in range(12) if expected[i] == 0.0)
    cells = [i for i in range(12) if expected[i] > 0]
    statistic = sum((observed[i] - count * expected[i]) ** 2 / (count * expected[i]) for i in cells)
    assert statistic < chi_square_limit(len(cells) - 1)


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.zeros(50)
    logits[[30, 17, 41]] = 5.0
    assert draw(logits, request(temperature=0)) == 17
    assert draw(logits, request(temperature=0, logit_bias={2: 1.0})) == 17
    assert draw(logits, request(top_k=1)) == 17


def test_nucleus_beyond_the_first_candidates() -> None:
    """A flat distribution over more ids than the first guess holds: top_p = 0.5 keeps exactly half of them."""
    limits = ServingLimits(vocab_size=4096, max_model_len=10)
    seen = set()
    for seed in range(4000):
        one = Request.create("r", [1], SamplingParams(top_p=0.5, max_tokens=1), limits, arrival=0.0, seed=seed)
        seen.add(draw(torch.zeros(4096), one))
    assert max(seen) < 2048
    assert len(seen) > 1500


def test_a_draw_depends_on_nothing_but_its_own_request() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(3))
    ones = [request(seed=seed, output=[4] * seed, max_tokens=20, top_p=0.9, presence_penalty=1.0) for seed in range(8)]
    together = sample(logits, ones)
    alone = [sample(logits[i : i + 1], [ones[i]])[0] for i in range(8)]
    assert together == alone


def test_another_position_or_seed_is_another_draw() -> None:
    values = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(values) == 2500
    assert 0.47 < sum(values) / 2500 < 0.53


def test_extreme_temperatures_do_not_overflow() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2)) * 100
    assert draw(logits, request(temperature=1e-300)) == int(logits.argmax())
    assert 0 <= draw(logits, request(temperature=100)) < 50


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_its_own_error_and_no_other(bad: float) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 7] = bad
    first, second, third = sample(logits, [request(temperature=0), request(), request(temperature=0)])
    assert isinstance(second, NumericalError)
    assert first == third == Sampled(0)


def test_nothing_left_to_draw_is_an_error() -> None:
    one = request(min_tokens=1, max_tokens=2, stop_token_ids=tuple(range(50)))
    assert isinstance(sample(torch.zeros(1, 50), [one])[0], NumericalError)


def test_an_unforeseen_failure_stays_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> float:
        raise RuntimeError("boom")

    monkeypatch.setattr("moebius.engine.sampler.uniform", explode)
    drawn = sample(torch.zeros(2, 50), [request(), request(temperature=0)])
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
    assert [v for _, v in outcome.logprob.top] == pytest.approx([float(expected[i]) for i in best], abs=1e-6)


def test_prompt_logprobs() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(6))
    scored = sampler.token_logprobs(logits, [4, 5, 6], 1, OPS)
    expected = torch.log_softmax(logits.double(), -1)
    assert scored is not None
    assert [s.logprob for s in scored] == pytest.approx([float(expected[i, 4 + i]) for i in range(3)], abs=1e-6)
    assert [s.top[0][0] for s in scored] == expected.argmax(-1).tolist()
    logits[1, 1] = math.nan
    assert sampler.token_logprobs(logits, [4, 5, 6], 1, OPS) is None
