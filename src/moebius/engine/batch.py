"""StepPlan to StepInputs: the one place where requests become tensors."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.engine.prompt_reading import read_by_encoder
from moebius.engine.prompt_scores import PromptRows
from moebius.engine.verify import ahead
from moebius.ops.steps import StateInputs, StepInputs
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's inputs; `sampled[i]` draws from its row `sampled_rows[i]`, `prompts` are scored."""

    inputs: StepInputs
    sampled: list[Request]
    sampled_rows: list[int]
    prompts: list[PromptRows]


def build_batch(
    plan: StepPlan,
    requests: Mapping[str, Request],
    block_size: int,
    device: torch.device | str = "cpu",
    drawn: Tensor | None = None,
) -> Batch:
    """Translate a plan; what is sampled comes in its order.

    drawn: the tokens of a plan of one a request that only the device knows.
    """
    token_ids: list[list[int]] = []
    starts: list[int] = []
    tables: list[tuple[array[int], ...]] = []
    sampled: list[Request] = []
    sampled_rows: list[int] = []
    prompts: list[PromptRows] = []
    row = 0
    reading, chunks = read_by_encoder(plan.chunks, requests)
    for request_id, start, num_tokens, samples, blocks, _, drafts in chunks:
        request = requests[request_id]
        stop = start + num_tokens
        known = request.tokens(start, stop) if drawn is None else (0,)
        token_ids.append([*known, *drafts])
        starts.append(start)
        tables.append(blocks)
        if request.params.prompt_logprobs is not None:
            scored = PromptRows.of(request, row, start, stop)
            if scored is not None:
                prompts.append(scored)
        row += num_tokens
        if samples:
            sampled += ahead(request, drafts)
            sampled_rows += range(row - 1, row + len(drafts))
            row += len(drafts)
    groups = range(len(tables[0]) if tables else 0)
    by_group = [[each[group] for each in tables] for group in groups]
    inputs = StepInputs.build(
        token_ids,
        starts,
        by_group[0] if by_group else None,
        block_size,
        device,
        others=by_group[1:],
        states=_states(chunks),
        drawn=drawn,
    )
    if reading is not None:
        reading.join(inputs, block_size)
    return Batch(inputs, sampled, sampled_rows, prompts)


def _states(chunks: Sequence[Chunk]) -> StateInputs | None:
    """What the step does with recurrent states; None where the model has none."""
    if not chunks or chunks[0].states is None:
        return None
    placed = [(chunk.start, chunk.states) for chunk in chunks if chunk.states is not None]
    return StateInputs(
        slots=[own.slot for _, own in placed],
        cleared=[own.slot for start, own in placed if not start],
        restores=[(own.restore, own.slot) for _, own in placed if own.restore is not None],
        saves=[(own.slot, own.save) for _, own in placed if own.save is not None],
    )
