"""The choices of a prompt: what each asks for, and what they share."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from moebius.engine.client import EngineInfo
from moebius.errors import RequestError
from moebius.front.choices import Choice, ChoiceOpener, choice_seed
from moebius.request.params import SamplingParams, ServingLimits
from moebius.text import EncodedPrompt
from server.serving import tokenizer

KEY = bytes(range(32))
INFO = EngineInfo(ServingLimits(400, 512), frozenset({1}), 4, 64, "fp")


def opened(opener: ChoiceOpener, prompt: EncodedPrompt, **params: Any) -> list[Choice]:
    ids = (f"r{i}" for i in count())
    return list(
        opener.open(prompt, SamplingParams(**params), ids, continues=True, arrival=1.0, salt=b"s")
    )


def test_choice_seeds_differ_and_repeat() -> None:
    seeds = {choice_seed(7, i) for i in range(100)} | {choice_seed(8, i) for i in range(100)}
    assert len(seeds) == 200 and all(0 <= seed < 2**64 for seed in seeds)
    assert choice_seed(-1, 3) == choice_seed(2**64 - 1, 3)


def test_choices_differ_in_id_and_seed_alone() -> None:
    hasher = INFO.hasher(KEY)
    assert hasher is not None
    opener = ChoiceOpener(tokenizer(), INFO, hasher)
    prompt = EncodedPrompt(list(range(10, 20)), generation_start=7)
    first, *others = [choice.request for choice in opened(opener, prompt, n=3, seed=9)]
    assert first.prompt_hashes == hasher.of_prompt(first.prompt_ids, b"s")
    assert len(first.prompt_hashes.hashes) == 2
    assert (first.generation_start, first.salt, first.output_ids) == (7, b"s", ())
    for i, other in enumerate(others, 1):
        assert (other.id, other.seed) == (f"r{i}", choice_seed(9, i))
        assert other.prompt_hashes is first.prompt_hashes and other.prompt_ids is first.prompt_ids
        assert other.generation_start == 7


def test_without_a_launchs_key_the_engine_hashes() -> None:
    (choice,) = opened(ChoiceOpener(tokenizer(), INFO), EncodedPrompt([10, 11, 12, 13, 14]))
    assert choice.request.prompt_hashes is None and choice.request.generation_start is None


def test_each_prompt_draws_a_seed_where_none_is_given() -> None:
    opener = ChoiceOpener(tokenizer(), INFO)
    seeds = {
        choice.request.seed for _ in range(3) for choice in opened(opener, EncodedPrompt([10]), n=2)
    }
    assert len(seeds) == 6


def test_a_wrong_prompt_is_refused_before_any_choice() -> None:
    with pytest.raises(RequestError, match="token id 400"):
        opened(ChoiceOpener(tokenizer(), INFO), EncodedPrompt([400]), n=2)
