"""Log-probabilities of tokens: the model's own log-softmax, before any sampler.

Legend: L rows of logits, V vocabulary, R rows that are asked about.
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from moebius.engine.client import TokenLogprob
from moebius.ops.sampling import SamplerOps
from moebius.ops.transfer import fetch, send_numbers


def token_logprobs(
    logits_LV: Tensor, token_ids: Sequence[int], top: int, ops: SamplerOps
) -> list[TokenLogprob] | None:
    """Log-probabilities of given tokens, one a row: what prompt log-probabilities are. None if not
    finite."""
    ids_R = send_numbers(token_ids, torch.int64, logits_LV.device)
    tops = [top] * len(token_ids)
    found = begin_logprobs(logits_LV, range(len(token_ids)), ids_R, tops, ops)()
    return None if any(math.isnan(each.logprob) for each in found) else found


def begin_logprobs(
    logits_LV: Tensor, rows: Sequence[int], ids_R: Tensor, tops: Sequence[int], ops: SamplerOps
) -> Callable[[], list[TokenLogprob]]:
    """Begin to score the token ids_R[i] in rows[i], and the tops[i] most likely ones there; what is
    returned waits for that.

    ids_R: int64, beside the logits. A logarithm is NaN in a row that is not finite.
    """
    rows_R = send_numbers(rows, torch.int64, logits_LV.device)
    ranks_R = ops.ranks(logits_LV, rows, ids_R)
    best = ops.log_softmax_top_k(logits_LV, rows, tops)
    wait = fetch(ids_R, logits_LV[rows_R, ids_R], ranks_R, *best)
    widths = [min(top, logits_LV.shape[-1]) for top in tops]

    def read() -> list[TokenLogprob]:
        *of_rows, values, ids = wait()
        most_likely = zip(ids.tolist(), values.tolist(), strict=True)
        return [
            TokenLogprob(
                token_id=token_id,
                logprob=logit - log_sum,
                rank=rank,
                top=tuple((id, value - log_sum) for id, value in islice(most_likely, width)),
            )
            for token_id, logit, rank, log_sum, width in zip(
                *(each_R.tolist() for each_R in of_rows), widths, strict=True
            )
        ]

    return read
