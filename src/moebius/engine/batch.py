"""StepPlan to StepInputs: the one place where requests become tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moebius.ops.steps import StepInputs
from moebius.schedule.request import Request
from moebius.schedule.scheduler import StepPlan


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a step, from `first` on, that score a prompt's `token_ids`, the first of them at
    position `start`."""

    request: Request
    first: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs for the runner; `sampled[i]` draws from the step's row `sampled_rows[i]`; `prompts`
    are scored."""

    inputs: StepInputs
    sampled: list[Request]
    sampled_rows: list[int]
    prompts: list[PromptRows]


def build_batch(
    plan: StepPlan,
    requests: Mapping[str, Request],
    block_size: int,
    device: torch.device | str = "cpu",
) -> Batch:
    """Translate a plan; what is sampled comes in its order."""
    token_ids, starts, blocks, sampled_rows, sampled = [], [], [], [], []
    prompts: list[PromptRows] = []
    row = 0
    for request_id, start, num_tokens, samples, block_ids, _ in plan.chunks:
        request = requests[request_id]
        stop = start + num_tokens
        token_ids.append(request.tokens(start, stop))
        starts.append(start)
        blocks.append(block_ids)
        if request.params.prompt_logprobs is not None:
            last_scored = min(stop, len(request.prompt_ids) - 1)
            if start < last_scored:
                prompts.append(
                    PromptRows(
                        request, row, start + 1, request.prompt_ids[start + 1 : last_scored + 1]
                    )
                )
        row += num_tokens
        if samples:
            sampled.append(request)
            sampled_rows.append(row - 1)
    return Batch(
        StepInputs.build(token_ids, starts, blocks, block_size, device),
        sampled,
        sampled_rows,
        prompts,
    )
