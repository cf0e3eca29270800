"""Drafts where tokens are drawn: each row draws as if the drafts before it had been drawn.

A draft is accepted where the row before it draws this very token, by the same sampler, with the
request's own seed and the position's number: so tokens and log-probabilities are those of decoding
without drafts. What a draw depends on beside its logits (penalties, min_tokens, grammars, the
random number) are functions of the tokens before it, and a row has its own copy of these.
"""

from collections.abc import Sequence
from copy import copy
from itertools import groupby

from moebius.engine.sampler import Sampled
from moebius.errors import MoebiusError
from moebius.schedule.request import Request


def ahead(request: Request, drafts: Sequence[int]) -> list[Request]:
    """The request as it is, and as it would be behind each of its drafts: one for each row."""
    found = [request]
    for count in range(1, len(drafts) + 1):
        later = copy(request)
        later.output_ids = [*request.output_ids, *drafts[:count]]
        found.append(later)
    return found


def accepted(
    rows: Sequence[Request], outcomes: Sequence[Sampled | MoebiusError | None]
) -> tuple[dict[str, list[Sampled]], dict[str, MoebiusError]]:
    """What each request has drawn, in order, and why its first row could not draw.

    A row counts where the one before it has drawn the token that it stands behind, and no grammar
    is complete with that. What fails at a later row, or is not ready there, is left for the step
    that comes to it.
    """
    drawn: dict[str, list[Sampled]] = {}
    failed: dict[str, MoebiusError] = {}
    for request_id, own in groupby(zip(rows, outcomes, strict=True), lambda pair: pair[0].id):
        taken: list[Sampled] = []
        for row, outcome in own:
            if taken and (taken[-1].complete or taken[-1].token_id != row.output_ids[-1]):
                break
            if not isinstance(outcome, Sampled):
                if outcome is not None and not taken:
                    failed[request_id] = outcome
                break
            taken.append(outcome)
        if taken:
            drawn[request_id] = taken
    return drawn, failed
