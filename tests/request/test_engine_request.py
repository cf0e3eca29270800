"""EngineRequest: what a front asks is checked once, before an engine has it."""

from __future__ import annotations

import enum
import itertools
import math

import pytest

from moebius.errors import ContextLengthError, RequestError
from moebius.front.choices import ChoiceOpener, choice_seed
from moebius.request import engine_request as asked_module
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.text import EncodedPrompt, Tokenizer

LIMITS = ServingLimits(vocab_size=1000, max_model_len=4096, priorities=True)


def make(prompt=(1, 2), params=None, **fields):
    return EngineRequest.create(
        "a", prompt, params or SamplingParams(), LIMITS, arrival=0.0, **fields
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["1"]}, "prompt"),
        ({"output_ids": [1000]}, "prompt"),
        ({"params": SamplingParams(logit_bias={1000: 1})}, "logit_bias"),
        ({"params": SamplingParams(stop_token_ids=(1000,))}, "stop_token_ids"),
        ({"priority": 2**31}, "priority"),
        ({"salt": bytes(257)}, "cache_salt"),
        ({"salt": "tenant"}, "cache_salt"),
    ],
)
def test_a_wrong_request_names_its_field(fields, param):
    with pytest.raises(RequestError) as error:
        make(**fields)
    assert error.value.param == param


def test_where_all_are_served_in_order_a_priority_is_refused():
    limits = ServingLimits(vocab_size=1000, max_model_len=4096)
    with pytest.raises(RequestError, match="must be 0, unless scheduling_policy") as error:
        EngineRequest.create("a", [1], SamplingParams(), limits, arrival=0.0, priority=1)
    assert error.value.param == "priority"


@pytest.mark.case("C5")
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (4096, None, r"you requested 4097 tokens \(4096 in the prompt, 1 in the completion\)"),
        (
            4097,
            None,
            "your prompt resulted in 4097 tokens. Please reduce the length of the prompt.",
        ),
        (4090, 7, r"you requested 4097 tokens \(4090 in the prompt, 7 in the completion\)"),
        (4097, 0, "your prompt resulted in 4097 tokens"),
    ],
)
def test_a_request_beyond_the_context_is_refused_with_the_numbers(prompt, max_tokens, message):
    with pytest.raises(ContextLengthError, match=message) as error:
        make([1] * prompt, SamplingParams(max_tokens=max_tokens))
    assert error.value.code == "context_length_exceeded"
    assert str(error.value).startswith(
        "This model's maximum context length is 4096 tokens. However, "
    )


def test_defaults_are_resolved_when_it_is_made():
    request = make(
        [1] * 96,
        SamplingParams(max_tokens=None, seed=-1, stop_token_ids=(3,)),
        eos_ids=frozenset({2}),
    )
    assert (request.max_tokens, request.seed, request.stop_ids) == (4000, 2**64 - 1, {2, 3})
    assert make(seed=5).seed == 5 and make().seed == 0
    assert (
        make(params=SamplingParams(ignore_eos=True), eos_ids=frozenset({2})).stop_ids == frozenset()
    )
    assert make([1] * 4096, SamplingParams(max_tokens=0)).max_tokens == 0


class CountedIds(list):
    """Token ids that count how often somebody walks through them."""

    walks = 0

    def __iter__(self):
        self.walks += 1
        return super().__iter__()


def test_a_prompt_is_checked_once_for_all_its_choices_and_held_once(monkeypatch, tiny_model):
    class Info:
        limits = LIMITS
        eos_ids = frozenset({2})
        start_ids = ()

    checks = []
    honest = asked_module.check_tokens
    monkeypatch.setattr(
        asked_module,
        "check_tokens",
        lambda ids, *rest: checks.append(len(ids)) or honest(ids, *rest),
    )
    ids = CountedIds([5, 6, 7] * 1000)
    params = SamplingParams(n=16, seed=3, max_tokens=8, stop_token_ids=(9,), logit_bias={4: 1.0})
    tokenizer, names = Tokenizer.load(tiny_model), map(str, itertools.count())
    fields = {"arrival": 1.0, "priority": 3, "deadline": 7.0, "salt": b"tenant"}
    opener = ChoiceOpener(tokenizer, Info)
    opened = opener.open(EncodedPrompt(ids), params, names, continues=False, **fields)
    made = [choice.request for choice in opened]
    assert ids.walks == 1 and checks == [3000, 0, 2]
    assert all(request.prompt_ids is made[0].prompt_ids for request in made)
    assert [request.id for request in made] == [str(i) for i in range(16)]
    for i, request in enumerate(made):
        seed = choice_seed(3, i)
        alone = EngineRequest.create(
            str(i), ids, params, LIMITS, eos_ids=Info.eos_ids, seed=seed, **fields
        )
        assert request == alone


def test_a_sibling_begins_anew():
    first = EngineRequest.create(
        "a", [1, 2, 3], SamplingParams(), LIMITS, arrival=0.0, output_ids=[4]
    )
    other = first.sibling("b", -1)
    assert (other.id, other.seed, other.output_ids) == ("b", 2**64 - 1, ())
    assert other.prompt_ids is first.prompt_ids and other.params is first.params


@pytest.mark.parametrize(
    "ids", [[1, 2, -1], [1, 2, 1000], [1, 2.0], [1, None], [1, True], [1, "2"]]
)
def test_one_wrong_id_among_many_is_named(ids):
    with pytest.raises(RequestError, match=f"token id {ids[-1]!r} is not an integer from 0 to 999"):
        make([5] * 100 + ids)


@pytest.mark.parametrize("when", [math.nan, math.inf, "now"])
def test_times_that_no_order_can_hold_are_refused(when):
    with pytest.raises(RequestError, match="arrival"):
        EngineRequest.create("a", [1], SamplingParams(), LIMITS, arrival=when)
    with pytest.raises(RequestError, match="deadline"):
        make(deadline=when)


def test_ids_may_be_integers_of_a_kind_of_their_own():
    class Special(enum.IntEnum):
        END = 3

    assert make(prompt=(1, Special.END)).prompt_ids == (1, 3)
