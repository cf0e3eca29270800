"""What tokens are held to, against loops that look at all of them anew."""

from __future__ import annotations

import random

import pytest

from moebius.errors import RequestError
from moebius.request.constraint import (
    BudgetWatch,
    Constraint,
    Finder,
    Grammar,
    ReasoningBudget,
    completing,
)
from moebius.request.params import LIMITS, SamplingParams
from moebius.request.structured import StructuredOutput


def ids(rng: random.Random, most: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3) for _ in range(rng.randrange(1, most + 1)))


def naive_end(sequences: list[tuple[int, ...]], output: list[int], start: int) -> int | None:
    """Where the first of the sequences ends, each end tried with each sequence."""
    for end in range(start, len(output) + 1):
        for each in sequences:
            if end - len(each) >= start and tuple(output[end - len(each) : end]) == each:
                return end
    return None


def test_a_finder_finds_the_first_end_however_the_tokens_come() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(500):
        sequences = [ids(rng, 3) for _ in range(rng.randrange(1, 3))]
        start = rng.randrange(3)
        finder = Finder(sequences, start)
        output: list[int] = []
        end = None
        while end is None and len(output) < 20:
            output += ids(rng, 4)
            end = finder.end_in(output)
            assert end == naive_end(sequences, output, start)
        found += end is not None
    assert found > 200


def naive_forced(budget: ReasoningBudget, output: list[int]) -> int | None:
    """The blocks one after the other, from the first token on."""
    at = 0 if budget.begun else naive_end([budget.start], output, 0) if budget.start else None
    while at is not None:
        end = naive_end([budget.end], output, at)
        if end is None:
            beyond = len(output) - at - budget.tokens
            return budget.closing[beyond] if 0 <= beyond < len(budget.closing) else None
        at = naive_end([budget.start], output, end) if budget.start else None
    return None


def test_a_budget_forces_the_end_id_by_id_and_only_in_a_block_of_reasoning() -> None:
    rng = random.Random(1)
    forcings = 0
    for _ in range(300):
        start = ids(rng, 2) if rng.random() < 0.7 else ()
        end = ids(rng, 2)
        forced = (*ids(rng, 2), *end) if rng.random() < 0.3 else ()
        budget = ReasoningBudget(rng.randrange(5), start, end, forced, rng.random() < 0.5)
        watch = BudgetWatch(budget)
        output: list[int] = []
        for _ in range(25):
            wanted = watch.forced(output)
            assert wanted == naive_forced(budget, output) == BudgetWatch(budget).forced(output)
            forcings += wanted is not None
            output.append(rng.randrange(3) if wanted is None else wanted)
    assert forcings > 300


def test_no_block_is_longer_than_its_budget() -> None:
    budget = ReasoningBudget(3, start=(1,), end=(8, 9), begun=True)
    watch = BudgetWatch(budget)
    output: list[int] = []
    for _ in range(12):
        wanted = watch.forced(output)
        output.append(5 if wanted is None else wanted)
    assert output[:5] == [5, 5, 5, 8, 9] and output[5:] == [5] * 7


def test_bad_words_are_completed_by_their_last_token_alone() -> None:
    words = ((1, 2, 3), (4,), (2, 5), (1, 2, 3, 7))
    assert set(completing(words, [])) == {4}
    assert set(completing(words, [1, 2])) == {3, 4, 5}
    assert set(completing(words, [0, 1, 2, 3])) == {4, 7}


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint(Grammar("")), "0 bytes"),
        (Constraint(Grammar("x" * (LIMITS.grammar_bytes + 1))), "bytes"),
        (Constraint(Grammar("x", after=((),))), "0 tokens"),
        (Constraint(Grammar("x", after=((10,),))), "10"),
        (Constraint(Grammar("x", openers=(-1,))), "-1"),
        (Constraint(bad_words=((1,),) * (LIMITS.bad_sequences + 1)), "bad_words"),
        (Constraint(bad_words=((),)), "0 tokens"),
        (Constraint(budget=ReasoningBudget(-1, (1,), (2,))), "-1"),
        (Constraint(budget=ReasoningBudget(1, (1,), ())), "0 tokens"),
        (Constraint(budget=ReasoningBudget(1, (1,), (2,), forced=(2, 3))), "does not end"),
    ],
)
def test_bounds_name_what_is_wrong(constraint: Constraint, says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        constraint.check(10)
    assert raised.value.param


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "is empty"),
        ({"json": {}, "regex": "a"}, "json and regex"),
        ({"regex": ""}, "regex"),
        ({"regex": 3}, "regex"),
        ({"choice": "ab"}, "choice"),
        ({"choice": [1]}, "choice"),
        ({"json": {"a": {1, 2}}}, "no JSON"),
        ({"json_object": 1}, "json_object"),
        ({"json": {}, "strict": None}, "strict"),
    ],
)
def test_structured_output_is_of_one_kind(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says) as raised:
        StructuredOutput(**fields, param="here")
    assert raised.value.param == "here"


def test_parameters_hold_what_they_are_given() -> None:
    wanted = StructuredOutput(choice=["a", "b"])
    params = SamplingParams(structured=wanted, bad_words="no", allowed_token_ids=[3, 4])
    assert (params.structured, params.bad_words, params.allowed_token_ids) == (
        wanted,
        ("no",),
        (3, 4),
    )
    for fields in ({"bad_words": [""]}, {"bad_words": [1]}, {"allowed_token_ids": [-1]}):
        with pytest.raises(RequestError) as raised:
            SamplingParams(**fields)
        assert raised.value.param in fields
    with pytest.raises(RequestError, match="StructuredOutput"):
        SamplingParams(structured={"json": {}})  # type: ignore[arg-type]
