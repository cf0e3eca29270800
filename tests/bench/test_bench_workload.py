"""Requests and their arrival: exact where they are exact, statistics where they are drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moebius.bench.workload import Dataset, arrival_times
from moebius.errors import ConfigError
from moebius.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    count, rate = 40_000, 5.0
    times = np.array(arrival_times(count, rate, burstiness, seed=3))
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all() and times[-1] == pytest.approx(count / rate)
    assert gaps.mean() == pytest.approx(1 / rate)
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.02)


def test_burstiness_one_is_a_poisson_process() -> None:
    times = np.array(arrival_times(40_000, 10.0, seed=1))
    gaps = np.diff(times, prepend=0.0)
    for t in (0.02, 0.1, 0.3):
        assert (gaps > t).mean() == pytest.approx(math.exp(-10.0 * t), abs=0.01)
    counts = np.bincount(times.astype(int), minlength=4000)
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.08), (
        "arrivals in a second: variance = mean"
    )


def test_arrivals_repeat_with_their_seed() -> None:
    assert (
        arrival_times(50, 2.0, seed=1)
        == arrival_times(50, 2.0, seed=1)
        != arrival_times(50, 2.0, seed=2)
    )
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]
    for count, rate, burstiness in (
        (5, 0.0, 1.0),
        (5, math.nan, 1.0),
        (5, 1.0, 0.0),
        (5, 1.0, math.inf),
        (0, 1.0, 1.0),
    ):
        with pytest.raises(ConfigError, match="it must be"):
            arrival_times(count, rate, burstiness)


def test_random_lengths_reach_both_ends_of_their_range(tokenizer: Tokenizer) -> None:
    dataset = Dataset(input_len=10, output_len=4, range_ratio=0.5)
    samples = dataset.samples(2000, 1, tokenizer)
    assert {s.input_tokens for s in samples} == set(range(5, 16))
    assert {s.output_tokens for s in samples} == set(range(2, 7))
    assert all(len(s.prompt) == s.input_tokens for s in samples)
    used = {token for s in samples for token in s.prompt}
    assert used == set(range(tokenizer.vocab_size)) - tokenizer.special_ids
    assert samples == dataset.samples(2000, 1, tokenizer)
    fixed = Dataset(input_len=10, output_len=4).samples(9, 0, tokenizer)
    assert {(s.input_tokens, s.output_tokens) for s in fixed} == {(10, 4)} and len(
        {s.prompt for s in fixed}
    ) == 9


def test_random_texts_without_a_tokenizer() -> None:
    samples = Dataset(input_len=12, output_len=4).samples(5)
    assert all(
        isinstance(s.prompt, str) and len(s.prompt.split()) == s.input_tokens == 12 for s in samples
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--num-prompts is 0"),
        ({"input_len": 0}, "--input-len is 0"),
        ({"output_len": -1}, "--output-len is -1"),
        ({"range_ratio": 1.0}, r"--random-range-ratio is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_bad_random_requests(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        count = options.pop("count", 1)
        Dataset(**options).samples(count)  # type: ignore[arg-type]


def test_files_in_both_shapes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = {"prompt": "def f(", "output_tokens": 9}
    talk = {
        "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "return n"}]
    }
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (plain, talk, plain)) + "\n")
    first, second = Dataset("jsonl", path).samples(2, 0, tokenizer)
    assert (first.prompt, first.output_tokens, first.input_tokens) == (
        "def f(",
        9,
        len(tokenizer.encode("def f(")),
    )
    assert (second.prompt, second.output_tokens) == ("hello", len(tokenizer.encode("return n")))
    assert [s.output_tokens for s in Dataset("jsonl", path, output_len=5).samples(99)] == [5, 5, 5]
    path.write_text(json.dumps([talk, plain]))
    assert [s.prompt for s in Dataset("jsonl", path, output_len=1).samples(9)] == [
        "hello",
        "def f(",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{", "does not hold one JSON object a line"),
        ("[" * 100_000, "does not hold one JSON object a line"),
        ('{"prompt": "x", "output_tokens": 1}\n"x"', "entry 2: no `prompt` text"),
        ('{"prompt": ""}', "entry 1: no `prompt` text"),
        ('{"conversations": []}', "entry 1: no `prompt` text"),
        ('{"prompt": "x"}', "entry 1: how many tokens to answer with"),
        ('{"prompt": "x", "output_tokens": "9"}', "entry 1: how many tokens to answer with"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Dataset("jsonl", path).samples(9)
    with pytest.raises(ConfigError, match="cannot be read"):
        Dataset("jsonl", tmp_path / "none").samples(9)
