"""A draw from the most likely ids: what top_k, top_p and min_p leave of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Draw(NamedTuple):
    """How a row's token is drawn.

    temperature   0: the most likely id is taken
    uniform       a number between 0 and 1 that decides
    width         how many of the most likely ids are looked at; 0: all are drawn from
    whole         no others are to be drawn (top_k); else more may have to be looked at
    top_p         of these, the most likely ones of this mass (nucleus: Holtzman et al., arXiv
                  1904.09751)
    min_p         and those that are at least so likely beside the most likely one
    """

    temperature: float
    uniform: float
    width: int = 0
    whole: bool = False
    top_p: float = 1.0
    min_p: float = 0.0


class Kinds(NamedTuple):
    """The places of draws among others, by what they draw from: the most likely id alone, the whole
    vocabulary, or candidates."""

    greedy: list[int]
    free: list[int]
    narrow: list[int]


def kinds_of(draws: Sequence[Draw]) -> Kinds:
    kinds = Kinds([], [], [])
    for place, draw in enumerate(draws):
        if not draw.temperature:
            kinds.greedy.append(place)
        elif not draw.width:
            kinds.free.append(place)
        else:
            kinds.narrow.append(place)
    return kinds


def draw_from_candidates(
    draw: Draw, values_K: NDArray[np.float32], ids_K: NDArray[np.int64], log_sum: float, vocab: int
) -> int | None:
    """The id that is drawn; None where more candidates are needed.

    values_K, ids_K: the most likely logits and their ids. log_sum: logsumexp(logits / temperature)
    over the whole vocabulary.
    """
    values: NDArray[np.float64] = values_K.astype(np.float64)
    weights = np.exp((values - values[0]) / draw.temperature)
    # What is behind the last weighs no more than it.
    if draw.whole or len(ids_K) == vocab or weights[-1] == 0:
        total = weights.sum()
    else:
        # Between 1 and V, whatever the rounding of two large quotients leaves.
        total = math.exp(min(max(log_sum - values[0] / draw.temperature, 0.0), math.log(vocab)))
    in_nucleus = np.cumsum(weights) - weights < draw.top_p * total
    kept = in_nucleus & (weights >= draw.min_p * weights[0])
    if kept[-1] and not draw.whole and len(ids_K) < vocab:
        return None
    cumulative = np.cumsum(weights[kept])
    index = int(np.searchsorted(cumulative, draw.uniform * cumulative[-1], side="right"))
    return int(ids_K[min(index, len(cumulative) - 1)])
