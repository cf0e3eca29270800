"""The 5-gram model against counts in dictionaries, and by hand."""

from __future__ import annotations

import gzip
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from moebius.train.baseline import NGrams, bits_per_byte, compressed_bits_per_byte


def test_hand_worked() -> None:
    """Trained on 0 0 1 over 4 words, asked for a 1 after a 0.

    Unigrams: c(1) = 1 of 3, 2 kinds: (1 + 2/4) / 5 = .3. After a 0 came 0 and 1, once each: (1 + 2 * .3) / 4 = .4.
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
    assert bits_per_byte(math.log(2) * 8, 4) == pytest.approx(2)


def test_compressors_are_those_of_the_library() -> None:
    text = b"abcabc" * 100
    assert compressed_bits_per_byte(text)["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / 600
