"""Log-probabilities of a prompt's own tokens, for the requests that ask for them."""

from dataclasses import dataclass
from typing import Self

from moebius.engine.client import TokenLogprob
from moebius.engine.logprobs import token_logprobs
from moebius.engine.runner import Runner
from moebius.engine.step_memory import PROMPT_LOGIT_ROWS
from moebius.schedule.request import Request


@dataclass(frozen=True, slots=True)
class PromptRows:
    """A step's rows from `first` on score `token_ids` of a prompt, which begin at `start` in it."""

    request: Request
    first: int
    start: int
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, request: Request, row: int, start: int, stop: int) -> Self | None:
        """Of a chunk of positions `start` to `stop` - 1, from `row` on; None if it scores none.

        A row scores the token behind its own: the last one scores what is drawn.
        """
        scored = request.prompt_ids[start + 1 : stop + 1]
        return cls(request, row, start + 1, scored) if scored else None


def score(runner: Runner, rows: PromptRows) -> list[TokenLogprob] | None:
    """Each token's, by the logits of the runner's last step; None where one is not finite.

    A few rows at a time: the logits of one long prompt would take gigabytes.
    """
    most_likely = rows.request.params.prompt_logprobs or 0
    scored: list[TokenLogprob] = []
    for offset in range(0, len(rows.token_ids), PROMPT_LOGIT_ROWS):
        tokens = rows.token_ids[offset : offset + PROMPT_LOGIT_ROWS]
        first = rows.first + offset
        logits_LV = runner.logits(range(first, first + len(tokens)))
        part = token_logprobs(logits_LV, tokens, most_likely, runner.ops)
        if part is None:
            return None
        scored += part
    return scored
