"""SamplingParams: every value is checked, and a wrong one named."""

from __future__ import annotations

import math

import pytest

from moebius.errors import RequestError
from moebius.request.params import SamplingParams


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
        ("logit_bias", dict.fromkeys(range(1025), 0)), ("stop", 3), ("stop_token_ids", 3), ("logit_bias", 3),
        ("logit_bias", [1, 2]), ("logit_bias", "bias"), ("logit_bias", {"a": 1}), ("stop_token_ids", "12"),
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
