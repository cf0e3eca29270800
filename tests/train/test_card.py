"""recipes/stdlib/card.py: the 5-gram model against counts in dictionaries, and by hand; the
card."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from moebius import LLM, SamplingParams
from moebius.errors import ConfigError
from moebius.train.data import PreparedData
from moebius.train.export import export, measure
from moebius.train.recipe import Recipe
from moebius.train.trainer import Trainer
from stdlib import card as script
from stdlib.card import NGrams, beside_twin, card


def test_hand_worked() -> None:
    """Trained on 0 0 1 over 4 words, asked for a 1 after a 0.

    Unigrams: c(1) = 1 of 3, 2 kinds: (1 + 2/4) / 5 = .3. After a 0 came 0 and 1, once each: (1 + 2
    * .3) / 4 = .4.
    """
    grams = NGrams([np.array([0, 0, 1])], 4)
    assert grams.nats(np.array([0, 1])) == pytest.approx(-math.log(0.4))


def test_against_dictionaries() -> None:
    generator = np.random.default_rng(0)
    train, test = generator.integers(0, 6, 400), generator.integers(0, 7, 60)
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for i in range(len(train)):
        for n in range(min(i, 4) + 1):
            counts[tuple(train[i - n : i])][int(train[i])] += 1

    def probability(word: int, context: tuple[int, ...]) -> float:
        below = 1 / 7 if not context else probability(word, context[1:])
        found = counts[context] if context in counts else Counter()
        if not context:
            found = Counter(train.tolist())
        total, kinds = sum(found.values()), len(found)
        return (found[word] + kinds * below) / (total + kinds) if total else below

    nats = 0.0
    for i in range(1, len(test)):
        nats -= math.log(probability(int(test[i]), tuple(int(t) for t in test[max(0, i - 4) : i])))
    assert NGrams([train], 7).nats(test) == pytest.approx(nats)


def test_the_card_has_all_figures(recipe: Recipe, data: PreparedData, tmp_path: Path) -> None:
    trainer = Trainer(recipe, data)
    export(trainer, tmp_path)
    figures = measure(trainer.decoder, recipe, data)
    (tmp_path / "training").mkdir()
    summary = {"figures": figures, "tokens_per_second": 1234, "seconds": 120}
    (tmp_path / "training" / "figures.json").write_text(json.dumps(summary))
    text = card(recipe, tmp_path, data)
    row = re.search(r"\| all \| [\d,]+ \| (.*) \|", text)
    assert row is not None
    mine, zipped, xz, grams = (float(x.strip("*")) for x in row[1].split(" | "))
    assert mine == pytest.approx(figures["all"]["bits_per_byte"], abs=1e-3)
    held_out = data.tokenizer.decode(data.heldout["library"].tolist()).encode()
    assert zipped == pytest.approx(8 * len(gzip.compress(held_out, 9)) / len(held_out), abs=1e-3)
    assert 0 < xz < zipped * 1.5 < 8 and 1 < grams < 6
    assert "dense twin" not in text.split("## Figures")[1]
    said = LLM(str(tmp_path), kv_cache_memory_bytes=2**24).generate(
        "class Stack:", SamplingParams(temperature=0.7, seed=1, max_tokens=64)
    )
    assert f"```\nclass Stack:{said[0].outputs[0].text}\n```" in text
    assert "PSF-2.0" in text and "2 minutes at 1,234 tokens/s" in text
    assert (
        "4 experts of width 16 in every layer, top-2" in text and "40 short\nconversations" in text
    )


def test_the_twin_stands_beside_it_as_far_as_it_went(tmp_path: Path) -> None:
    for name, speed, heldout in (
        ("out", 1000, {500: 1.75, 1000: 1.5, 1500: 1.25}),
        ("twin", 1500, {500: 1.5, 1000: 1.75}),
    ):
        lines = [
            {"step": step, "tokens_per_second": speed} for step in range(250, max(heldout) + 1, 250)
        ]
        lines = [
            x
            | (
                {"heldout_bits_per_byte": {"all": heldout[x["step"]]}}
                if x["step"] in heldout
                else {}
            )
            for x in lines
        ]
        (tmp_path / name / "training").mkdir(parents=True)
        (tmp_path / name / "training" / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    text = beside_twin(tmp_path / "out", tmp_path / "twin")
    assert text.endswith("| 500 | 1.750 | **1.500** |\n| 1,000 | **1.500** | 1.750 |")
    assert "1,000 steps of it" in text and "1,000 and 1,500 tokens/s" in text


def test_a_directory_without_a_run_keeps_its_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("of something else")
    with pytest.raises(ConfigError, match="holds no training run"):
        script.main([str(tmp_path)])
    assert readme.read_text() == "of something else"
