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
    for chunk in plan.chunks:
        request = requests[chunk.request_id]
        stop = chunk.start + chunk.num_tokens
        token_ids.append(request.tokens(chunk.start, stop))
        starts.append(chunk.start)
        blocks.append(chunk.block_ids)
        if chunk.samples:
            sampled.append(request)
            sampled_rows.append(row + chunk.num_tokens - 1)
        last_scored = 0 if request.params.prompt_logprobs is None else min(stop, len(request.prompt_ids) - 1)
        if chunk.start < last_scored:
            scored.append((request, row, chunk.start, last_scored))
        row += chunk.num_tokens
    prompts: list[PromptRows] = []
    prompt_rows: list[int] = []
    for request, first_row, start, stop in scored:
        first = len(sampled_rows) + len(prompt_rows)
        prompts.append(PromptRows(request, first, start + 1, request.prompt_ids[start + 1 : stop + 1]))
        prompt_rows.extend(range(first_row, first_row + stop - start))
    inputs = StepInputs.build(token_ids, starts, blocks, [*sampled_rows, *prompt_rows], block_size, device)
    return Batch(inputs, tuple(sampled), tuple(prompts))
