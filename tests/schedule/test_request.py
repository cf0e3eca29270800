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
from moebius.schedule.request import Request, RequestStatus
from moebius.text import Tokenizer
from schedule.making import LIMITS, make_request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 17), ("n", True), ("n", 1.0), ("max_tokens", -1), ("min_tokens", -1), ("min_tokens", 17),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("temperature", 10**400), ("presence_penalty", -(10**400)), ("logit_bias", {1: 10**400}),
        ("top_p", -0.1), ("top_p", 1.1), ("top_k", -2), ("min_p", 1.5), ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1), ("repetition_penalty", 0), ("seed", 2**64), ("seed", 1.5),
        ("logprobs", 21), ("prompt_logprobs", -1), ("stop", ["x"] * 17), ("stop", ["x" * 257]), ("stop", [3]),
        ("stop", ["\ud800"]), ("ignore_eos", 1), ("skip_special_tokens", None), ("stop_token_ids", [-1]),
        ("stop_token_ids", [1] * 257), ("logit_bias", {1: 101}), ("logit_bias", {-1: 0}),
        ("logit_bias", dict.fromkeys(range(1025), 0)),
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_field(field, value):
    with pytest.raises(RequestError, match=field.split("_token")[0]) as error:
        SamplingParams(**{field: value})
    assert error.value.param == field


def test_values_at_their_limits_are_fine():
    params = SamplingParams(
        n=16, max_tokens=None, min_tokens=99, temperature=0, top_p=0, top_k=-1, min_p=1, presence_penalty=-2,
        frequency_penalty=2, seed=-(2**63), stop="end", stop_token_ids=[0], logit_bias={5: -100}, logprobs=20,
    )  # fmt: skip
    assert params.greedy and params.stop == ("end",) and params.stop_token_ids == (0,)
    assert SamplingParams(stop=["", "a"]).stop == ("a",) and not SamplingParams().greedy
    with pytest.raises(TypeError):
        params.logit_bias[6] = 1.0
    assert params.with_(n=1).n == 1
    with pytest.raises(RequestError):
        params.with_(n=99)


def make(prompt=(1, 2), params=None, **fields):
    return Request(
        EngineRequest.create("a", prompt, params or SamplingParams(), LIMITS, arrival=0.0, **fields)
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
    assert (
        request.max_tokens == 4000
        and request.asked.seed == 2**64 - 1
        and request.stop_ids == {2, 3}
    )
    assert make(seed=5).asked.seed == 5 and make().asked.seed == 0
    assert (
        make(params=SamplingParams(ignore_eos=True), eos_ids=frozenset({2})).stop_ids == frozenset()
    )
    assert make([1] * 4096, SamplingParams(max_tokens=0)).max_tokens == 0


def test_tokens_spans_prompt_and_output():
    request = make_request("a", [1, 2, 3], output_ids=[4, 5])
    both = [1, 2, 3, 4, 5]
    for start in range(6):
        for stop in range(start, 6):
            assert request.tokens(start, stop) == both[start:stop]
    assert request.num_tokens == 5 and request.order == (0, 0.0, "a")
    assert not request.finished and request.status is RequestStatus.WAITING


@pytest.mark.parametrize(
    ("wish", "shapes"),
    [
        ({"logit_bias": {3: 1.0}}, True),
        ({"presence_penalty": 0.5}, True),
        ({"frequency_penalty": -0.5}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"logprobs": 0}, False),
        ({"min_tokens": 1}, False),
        ({"temperature": 0.5}, False),
    ],
)
def test_a_plain_request_asks_for_the_most_likely_token_only(wish, shapes):
    assert SamplingParams(temperature=0).plain
    asked = SamplingParams(**{"temperature": 0, **wish})
    assert not asked.plain and asked.shapes_logits is shapes


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
    opened = opener.open(ids, params, names, continues=False, **fields)
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


def test_an_engine_changes_nothing_that_the_front_holds():
    asked = EngineRequest.create(
        "a", [1, 2, 3], SamplingParams(), LIMITS, arrival=0.0, output_ids=[4]
    )
    request, again = Request(asked), Request(asked)
    request.output_ids.append(5)
    request.status = RequestStatus.RUNNING
    assert asked.output_ids == (4,) and again.output_ids == [4]
    assert again.status is RequestStatus.WAITING and again.block_hashes == []
    assert again.asked is asked
    for name in EngineRequest.__dataclass_fields__:
        assert name == "output_ids" or getattr(again, name, None) in (None, getattr(asked, name))


@pytest.mark.parametrize(
    "ids", [[1, 2, -1], [1, 2, 1000], [1, 2.0], [1, None], [1, True], [1, "2"]]
)
def test_one_wrong_id_among_many_is_named(ids):
    with pytest.raises(RequestError, match=f"token id {ids[-1]!r} is not an integer from 0 to 999"):
        make([5] * 100 + ids)


@pytest.mark.parametrize("when", [math.nan, math.inf, "now"])
def test_times_that_no_order_can_hold_are_refused(when):
    with pytest.raises(RequestError, match="arrival"):
        Request(EngineRequest.create("a", [1], SamplingParams(), LIMITS, arrival=when))
    with pytest.raises(RequestError, match="deadline"):
        make(deadline=when)


def test_ids_may_be_integers_of_a_kind_of_their_own():
    class Special(enum.IntEnum):
        END = 3

    assert make(prompt=(1, Special.END)).prompt_ids == (1, 3)
