"""What the operations from logits to tokens are asked for, and what they find.

Each names the rows that it is about, so that rows with other wishes stay where they are: none is
copied, and none pays for another's.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# In place of minus infinity, which means a broken model.
LOWEST = torch.finfo(torch.float32).min
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
    """

    bias: Mapping[int, float]
    seen: Sequence[int]
    drawn: Sequence[int]
    repetition: float
    presence: float
    frequency: float
    banned: Sequence[int]

    @property
    def num_ids(self) -> int:
        """At least as many as the logits that change."""
        return len(self.bias) + len(self.seen) + len(self.drawn) + len(self.banned)
