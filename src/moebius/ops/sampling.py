"""The operations from logits to tokens: what a sampler asks of a backend.

Each names the rows that it is about, so that rows with other wishes stay where they are: none is
copied, and none pays for another's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# In place of minus infinity, which means a broken model.
LOWEST = torch.finfo(torch.float32).min
# In place of an id, where none is drawn: a logit is NaN or infinite, or all are LOWEST.
NOT_FINITE = -1
ALL_BANNED = -2
# An id that is looked up takes up to 64 bytes, one of a row that is copied 4: a word of 32 ids.
_WORD_IDS = 2
# Rows whose vocabulary is widened to float64 at a time.
ROWS_AT_ONCE = 8


class TopK(NamedTuple):
    """What `log_softmax_top_k` found: log_sums (R,) float64; values float32 and ids int64, row
    after row."""

    log_sums_R: Tensor
    values: Tensor
    ids: Tensor


class Shaping(NamedTuple):
    """What becomes of one row's logits before temperature, in this order, in float64, rounded to
    float32 once.

    bias         id -> added to its logit
    seen, drawn  ids of the prompt and of the output, as often as they occur
    repetition   divides a positive logit of an id in either, multiplies a negative one (CTRL, arXiv
                 1909.05858)
    presence     subtracted from the logit of an id in `drawn`; frequency as often as it was drawn
                 (OpenAI's)
    banned       ids that become LOWEST
    allowed      where there are any, all others that are finite become LOWEST: id i is bit i % 32
                 of word i // 32
    """

    bias: Mapping[int, float]
    seen: Sequence[int]
    drawn: Sequence[int]
    repetition: float
    presence: float
    frequency: float
    banned: Sequence[int]
    allowed: NDArray[np.uint32] | None = None

    @property
    def num_ids(self) -> int:
        """At least as many as ids are looked up; a row that may be copied counts by its bytes."""
        return self.named if self.allowed is None else self.named + _WORD_IDS * len(self.allowed)

    @property
    def named(self) -> int:
        """At least as many as ids are named one by one."""
        return len(self.bias) + len(self.seen) + len(self.drawn) + len(self.banned)


class SamplerOps(ABC):
    """The part of `Ops` from logits (L, V) to tokens.

    logits_LV is float32, V the vocabulary; ties go to the lowest id everywhere.
    """

    @abstractmethod
    def argmax(self, logits_LV: Tensor, rows: Sequence[int] | None = None) -> list[int]:
        """The most likely id of each of `rows` (None: all), NOT_FINITE or ALL_BANNED."""

    @abstractmethod
    def draw(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[float],
    ) -> list[int]:
        """Of each of `rows` an id drawn from softmax(logits / temperature).

        It is the first whose exp(logit / temperature), summed with those of all ids before it,
        exceeds uniform (between 0 and 1) times the whole sum; or NOT_FINITE, or ALL_BANNED.
        Temperatures are rounded to float32; sums are float64.
        """

    def choose(
        self, logits_LV: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]
    ) -> Tensor:
        """Of all rows what `argmax` finds where the temperature is 0, and else what `draw` draws:
        (L,) int64 beside the logits. A backend whose device works by itself does not wait for it.
        """
        found = torch.empty(len(logits_LV), dtype=torch.int64)
        greedy = [row for row, heat in enumerate(temperatures) if heat == 0]
        others = [row for row, heat in enumerate(temperatures) if heat != 0]
        if greedy:
            found[greedy] = torch.tensor(self.argmax(logits_LV, greedy))
        if others:
            heats = [temperatures[row] for row in others]
            drawn = self.draw(logits_LV, others, heats, [uniforms[row] for row in others])
            found[others] = torch.tensor(drawn)
        return found.to(logits_LV.device)

    @abstractmethod
    def log_softmax_top_k(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
        temperatures: Sequence[float] | None = None,
    ) -> TopK:
        """Of each of `rows` logsumexp(logits / temperature) and the most likely ids.

        The former is NaN where a logit is not finite; of the latter there are min(count, V) with
        their logits, largest first, which mean nothing in a row that is not finite. Temperatures
        are rounded to float32; None stands for 1.
        """

    @abstractmethod
    def ranks(self, logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        """The place of one token a row among all of the vocabulary: 1 for the most likely."""

    @abstractmethod
    def shaped(
        self, logits_LV: Tensor, rows: Sequence[int], shapings: Sequence[Shaping]
    ) -> AbstractContextManager[None]:
        """Within the context rows[i] of logits_LV is as shapings[i] says, for the operations above;
        each row once.

        After it all is as it was, bit for bit. What a shaping names is written in place; whether
        what is not allowed is, too, is the backend's own. One context at a time. Raises IndexError
        for an id that is not in the vocabulary.
        """
