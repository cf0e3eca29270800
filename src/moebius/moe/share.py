"""A batch whose tokens several processes hold: what a router needs to know of the others' tokens.

Shape legend: T tokens here, E experts, K choices a token.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class BatchShare:
    """All of a batch, which is this process's alone.

    A subclass is for some of its tokens. What depends on all of them, noise and places in an
    expert's queue, is then what it would be if one process held them.
    """

    def total(self, tokens: int) -> int:
        """How many tokens the batch has, of which so many are here."""
        return tokens

    def drawn(self, like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        """Noise for rows like these (T, ...), which `fill` draws for all rows of the batch."""
        return fill(torch.empty_like(like, memory_format=torch.contiguous_format))

    def ahead(self, counts_KE: Tensor) -> Tensor:
        """How many choices stand in an expert's queue before the first of the K-th ones here.

        counts_KE: how many there are here. First choices of the whole batch go before second ones.
        """
        return counts_KE.cumsum(0) - counts_KE


WHOLE_BATCH = BatchShare()
