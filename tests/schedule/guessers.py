"""What guesses drafts in the simulation: at random, always right, nearly right, and as served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from moebius.schedule.drafts import Lookup
from moebius.schedule.request import Request

Expected = Callable[[Request], Sequence[int]]
"""All tokens that a request will ever draw."""


class Wild:
    """Any tokens, any number of them, of any worth."""

    def __init__(self, rng: Random, expected: Expected, vocab: int) -> None:
        self.rng = rng
        self.expected = expected
        self.vocab = vocab

    @property
    def share(self) -> float:
        return self.rng.random()

    @property
    def rest(self) -> int:
        return self.rng.randrange(4)

    def guess(self, request: Request, most: int) -> list[int]:
        return [self.rng.randrange(self.vocab) for _ in range(self.rng.randint(0, most + 2))]


class Oracle(Wild):
    """Always right, as long as there is anything to draw; behind that it guesses on."""

    @property
    def share(self) -> float:
        return 1.0

    def guess(self, request: Request, most: int) -> list[int]:
        coming = list(self.expected(request)[len(request.output_ids) :][:most])
        return coming + [self.rng.randrange(self.vocab) for _ in range(most - len(coming))]


class NearlyRight(Oracle):
    """Wrong at one place."""

    def guess(self, request: Request, most: int) -> list[int]:
        found = super().guess(request, most)
        if found:
            place = self.rng.randrange(len(found))
            found[place] = (found[place] + 1) % self.vocab
        return found


class Served(Wild):
    """What an engine has."""

    def __init__(self, rng: Random, expected: Expected, vocab: int) -> None:
        super().__init__(rng, expected, vocab)
        self._lookup = Lookup()

    @property
    def share(self) -> float:
        return self._lookup.share

    @property
    def rest(self) -> int:
        return self._lookup.rest

    def guess(self, request: Request, most: int) -> list[int]:
        return list(self._lookup.guess(request, most))


KINDS = (Wild, Oracle, NearlyRight, Served)
