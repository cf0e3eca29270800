"""StepPlan to StepInputs: the one place where requests become tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moebius.ops.steps import StepInputs
from moebius.schedule.request import Request
from moebius.schedule.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a step's wanted hidden states that score prompt tokens: from `first`, one for each of `token_ids`.

    start is the position of the first scored token.
    """

    request: Request
    first: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs for the runner; `sampled[i]` draws from wanted row i; `prompts` are scored from the rows behind."""

    inputs: StepInputs
    sampled: tuple[Request, ...]
    prompts: tuple[PromptRows, ...]


def build_batch(
    plan: StepPlan, requests: Mapping[str, Request], block_size: int, device: torch.device | str = "cpu"
) -> Batch:
    """Translate a plan. Wanted rows come first for what is sampled, in the plan's order, then for prompts scored."""
    token_ids, starts, blocks, sampled_rows, sampled = [], [], [], [], []
    scored: list[tuple[Request, int, int, int]] = []
    row = 0
    for request_id, start, num_tokens, samples, block_ids, _ in plan.chunks:
        request = requests[request_id]
        stop = start + num_tokens
        token_ids.append(request.tokens(start, stop))
        starts.append(start)
        blocks.append(block_ids)
        row += num_tokens
        if samples:
            sampled.append(request)
            sampled_rows.append(row - 1)
        if request.params.prompt_logprobs is not None:
            last_scored = min(stop, len(request.prompt_ids) - 1)
            if start < last_scored:
                scored.append((request, row - num_tokens, start, last_scored))
    prompts: list[PromptRows] = []
    prompt_rows: list[int] = []
    for request, first_row, start, stop in scored:
        first = len(sampled_rows) + len(prompt_rows)
        prompts.append(PromptRows(request, first, start + 1, request.prompt_ids[start + 1 : stop + 1]))
        prompt_rows.extend(range(first_row, first_row + stop - start))
    inputs = StepInputs.build(token_ids, starts, blocks, [*sampled_rows, *prompt_rows], block_size, device)
    return Batch(inputs, tuple(sampled), tuple(prompts))
