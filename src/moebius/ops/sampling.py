"""The operations from logits to tokens: what a sampler asks of a backend.

Each names the rows that it is about, so that rows with other wishes stay where they are: none is
copied, and none pays for another's.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebius.ops.draws import Draw, draw_from_candidates, kinds_of
from moebius.ops.transfer import send_numbers

# In place of minus infinity, which means a broken model.
LOWEST = torch.finfo(torch.float32).min
# In place of an id, where none is drawn: a logit is NaN or infinite, or all are LOWEST.
NOT_FINITE = -1
ALL_BANNED = -2
# In place of an id, where a draw needs to look at more candidates.
UNDECIDED = -3
# An id that is looked up takes up to 64 bytes, one of a row that is copied 4: a word of 32 ids.
_WORD_IDS = 2
# What a row takes whose newest id comes beside its shaping.
_NEWEST_IDS = 3
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
        words = 0 if self.allowed is None else len(self.allowed)
        return self.named + _NEWEST_IDS + _WORD_IDS * words

    @property
    def named(self) -> int:
        """At least as many as ids are named one by one."""
        return len(self.bias) + len(self.seen) + len(self.drawn) + len(self.banned)


class SamplerOps(ABC):
    """The part of `Ops` from logits (L, V) to tokens.

    logits_LV is float32, V the vocabulary; ties go to the lowest id everywhere.

    first_look: how many candidates a draw looks at first where it does not say how many there are:
    enough for most; eight times as many where they were not.
    """

    first_look = 256

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

    def draw_candidates(
        self, logits_LV: Tensor, rows: Sequence[int], draws: Sequence[Draw]
    ) -> list[int]:
        """Of each of `rows` an id from its most likely ones, as its Draw says, whose width is not
        0; NOT_FINITE, or ALL_BANNED, or UNDECIDED where that needs more of them."""
        vocab = logits_LV.shape[-1]
        widths = [min(draw.width, vocab) for draw in draws]
        found = self.log_softmax_top_k(
            logits_LV, rows, widths, [draw.temperature for draw in draws]
        )
        values = found.values.cpu().numpy()
        ids = found.ids.cpu().numpy()
        drawn: list[int] = []
        stop = 0
        for draw, width, log_sum in zip(draws, widths, found.log_sums_R.tolist(), strict=True):
            start = stop
            stop += width
            if math.isnan(log_sum):
                drawn.append(NOT_FINITE)
            elif values[start] == LOWEST:
                drawn.append(ALL_BANNED)
            else:
                own = slice(start, stop)
                id = draw_from_candidates(draw, values[own], ids[own], log_sum, vocab)
                drawn.append(UNDECIDED if id is None else id)
        return drawn

    def choose(self, logits_LV: Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> Tensor:
        """Of each of `rows` what `argmax`, `draw` or `draw_candidates` gives, whichever its Draw
        asks for: (R,) int64 beside the logits. A device that works by itself is not waited for,
        unless a row has more candidates than `first_look`."""
        kinds = kinds_of(draws)
        found = [NOT_FINITE] * len(rows)

        def put(places: Sequence[int], tokens: Sequence[int]) -> None:
            for place, token in zip(places, tokens, strict=True):
                found[place] = token

        if kinds.greedy:
            put(kinds.greedy, self.argmax(logits_LV, [rows[place] for place in kinds.greedy]))
        if kinds.free:
            free = [rows[place] for place in kinds.free]
            heats = [draws[place].temperature for place in kinds.free]
            uniforms = [draws[place].uniform for place in kinds.free]
            put(kinds.free, self.draw(logits_LV, free, heats, uniforms))
        if kinds.narrow:
            narrow = [rows[place] for place in kinds.narrow]
            own = [draws[place] for place in kinds.narrow]
            put(kinds.narrow, self.draw_candidates(logits_LV, narrow, own))
        return send_numbers(found, torch.int64, logits_LV.device)

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
    def ranks(self, logits_LV: Tensor, rows: Sequence[int], ids_R: Tensor) -> Tensor:
        """The place of one id a row among all of the vocabulary, 1 for the most likely: (R,) int64.

        ids_R: int64, of the vocabulary, beside the logits, as the result is. A device that works by
        itself is not waited for; the CPU's kernels raise IndexError for what is no such id.
        """

    @abstractmethod
    def shaped(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        shapings: Sequence[Shaping],
        newest_R: Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Within the context rows[i] of logits_LV is as shapings[i] says, for the operations above;
        each row once.

        newest_R: (R,) int64 beside the logits, ids of the vocabulary: of each row one more of
        `drawn`, which the device alone may know. The bits are those of a Shaping that names it.

        After it all is as it was, bit for bit. What a shaping names is written in place; whether
        what is not allowed is, too, is the backend's own. One context at a time. Raises IndexError
        for an id that is not in the vocabulary.
        """


def with_newest(shapings: Sequence[Shaping], newest_R: Tensor | None) -> Sequence[Shaping]:
    """The shapings with these ids among what was drawn; waits for the device that knows them."""
    if newest_R is None:
        return shapings
    newest = newest_R.tolist()
    return [
        shaping._replace(drawn=[*shaping.drawn, id])
        for shaping, id in zip(shapings, newest, strict=True)
    ]
