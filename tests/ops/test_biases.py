"""What an encoder and its decoder ask of attention and of experts beside the others: biases by
distance, keys before which a row sees none, rows that see all keys, and a capacity."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.ops import Ops
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from ops.levels import LEVELS, ROUNDOFF, bits, level
from ops.paged import as_is, empty_cache

H, N, REACH = 3, 20, 9
# (keys, rows, first key): one row and many, keys before the first, beyond a tile and a split.
CAUSAL = [(1, 1, 0), (7, 7, 0), (90, 1, 0), (90, 1, 67), (200, 40, 130), (1500, 3, 20), (66, 2, 64)]
WHOLE = [(1, 1, 0), (5, 5, 0), (70, 70, 0), (9, 1, 0), (3, 30, 0), (1100, 2, 0)]


def drawn(lengths: list[tuple[int, int, int]], dtype: torch.dtype) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(len(lengths))

    def some(count: int) -> Tensor:
        return torch.randn(count, H, N, generator=generator).to(dtype)

    q = [some(rows) for _, rows, _ in lengths]
    k = [some(keys) for keys, _, _ in lengths]
    v = [some(keys) for keys, _, _ in lengths]
    return q, k, v


def attend(
    ops: Ops,
    lengths: list[tuple[int, int, int]],
    tensors: tuple[list[Tensor], ...],
    bias: Tensor | None,
    *,
    whole: bool,
    block_size: int,
    spoilt: bool = False,
) -> list[Tensor]:
    """Each sequence's rows, in a cache that holds NaN wherever nothing was written; spoilt: before
    its first block that a row sees, too."""
    q, k, v = tensors
    counts = [-(-len(each) // block_size) for each in k]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    cache = empty_cache(ops, sum(counts) + 2, block_size, H, N, q[0].dtype)
    written = StepInputs.build([[0] * len(each) for each in k], [0] * len(k), tables, block_size)
    as_is(ops, cache, torch.cat(k), torch.cat(v), written.slot_mapping)
    firsts = [first for _, _, first in lengths]
    if spoilt:
        for table, first in zip(tables, firsts, strict=True):
            for i in range(first // block_size):
                for part in ops.block_memory(cache, table[i]):
                    part.view(-1).view(torch.uint8).fill_(255)
    rows = [len(each) for each in q]
    query_start = array("i", [sum(rows[:i]) for i in range(len(rows) + 1)])
    step = replace(
        written,
        input_ids_host=array("q", [0] * sum(rows)),
        positions_host=array("q", [0] * sum(rows)),
        query_start_host=query_start,
        seq_lens_host=array("i", [len(each) for each in k]),
        first_keys_host=None if whole else array("i", firsts),
        whole=whole,
    )
    plan = ops.plan_attention(step, block_size)
    out = ops.paged_attention(torch.cat(q), cache, plan, 1.0, bias_HR=bias)
    return list(out.split(rows))


def naive(
    lengths: list[tuple[int, int, int]],
    tensors: tuple[list[Tensor], ...],
    bias: Tensor | None,
    *,
    whole: bool,
) -> list[Tensor]:
    """Row by row, in float64."""
    found = []
    for (keys, rows, first), q, k, v in zip(lengths, *tensors, strict=True):
        out = torch.zeros(rows, H, N, dtype=torch.float64)
        for row in range(rows):
            position = keys - rows + row
            seen = range(first, keys if whole else position + 1)
            for h in range(H):
                scores = k[seen.start : seen.stop, h].double() @ q[row, h].double()
                if bias is not None:
                    near = [max(-REACH, min(REACH, key - position)) + REACH for key in seen]
                    scores = scores + bias[h, near].double()
                weights = torch.softmax(scores, 0)
                out[row, h] = weights @ v[seen.start : seen.stop, h].double()
        found.append(out)
    return found


@cache
def cased(whole: bool, biased: bool, dtype: torch.dtype) -> tuple[Any, Tensor | None, list[Tensor]]:
    """Queries, keys and values, biases, and what a loop makes of them."""
    lengths = WHOLE if whole else CAUSAL
    tensors = drawn(lengths, dtype)
    bias = None
    if biased:
        bias = torch.randn(H, 2 * REACH + 1, generator=torch.Generator().manual_seed(0)) * 2
    return tensors, bias, naive(lengths, tensors, bias, whole=whole)


@pytest.mark.parametrize("isa", ["reference", *LEVELS])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_attention_is_that_of_a_loop(
    isa: str, whole: bool, biased: bool, dtype: torch.dtype
) -> None:
    ops = ReferenceOps() if isa == "reference" else level(isa, 2)
    lengths = WHOLE if whole else CAUSAL
    tensors, bias, exact = cased(whole, biased, dtype)
    bound = 0.08 if dtype == torch.bfloat16 else 2e-5
    for block_size in (16, 5):
        found = attend(ops, lengths, tensors, bias, whole=whole, block_size=block_size)
        for one, other in zip(found, exact, strict=True):
            assert (one.double() - other).abs().max() < bound


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_a_row_has_the_same_bits_alone(isa: str, whole: bool, dtype: torch.dtype) -> None:
    """Beside others, on any number of threads, in blocks of any size; and whatever lies before the
    blocks that it sees."""
    lengths = WHOLE if whole else CAUSAL
    q, k, v = drawn(lengths, dtype)
    bias = torch.randn(H, 2 * REACH + 1)
    together = attend(level(isa, 2), lengths, (q, k, v), bias, whole=whole, block_size=16)
    for i, one in enumerate(together):
        own = ([q[i]], [k[i]], [v[i]])
        for block_size, spoilt in ((16, True), (5, False), (64, False)):
            alone = attend(
                level(isa, 1), lengths[i : i + 1], own, bias, whole=whole,
                block_size=block_size, spoilt=spoilt and not whole,
            )  # fmt: skip
            assert torch.equal(bits(alone[0]), bits(one))


def test_steps_that_mean_nothing_are_refused() -> None:
    ops = CpuOps(1)
    step = StepInputs.build([[0, 0]], [3], [[0, 1]], 4)
    for firsts in ([4], [-1]):
        wrong = replace(step, first_keys_host=array("i", firsts))
        with pytest.raises(ValueError, match="a sequence of 5 tokens, 2 of them new"):
            ops.plan_attention(wrong, 4)
    with pytest.raises(ValueError, match="first keys of 2 sequences, where there are 1"):
        ops.plan_attention(replace(step, first_keys_host=array("i", [0, 0])), 4)
    cache = empty_cache(ops, 2, 4, H, N, torch.float32)
    q = torch.zeros(2, H, N)
    plan = ops.plan_attention(step, 4)
    for bias, words in ((torch.zeros(H, 4), "both sides of 0"), (torch.zeros(H + 1, 5), "biases")):
        with pytest.raises(ValueError, match=words):
            ops.paged_attention(q, cache, plan, 1.0, bias_HR=bias)


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps(2)], ids=lambda ops: ops.name)
def test_an_expert_takes_the_first_tokens_of_each_sequence(ops: Ops) -> None:
    generator = torch.Generator().manual_seed(3)
    starts = [0, 9, 9, 10, 31]
    rows = starts[-1]
    for top_k, capacity in ((1, 1), (1, 3), (2, 4), (2, 100)):
        ids = torch.randint(0, 4, (rows, top_k), generator=generator)
        weights = torch.rand(rows, top_k, generator=generator)
        expected = weights.clone()
        for start, stop in pairwise(starts):
            taken: Counter[int] = Counter()
            for row in range(start, stop):
                for k in range(top_k):
                    taken[int(ids[row, k])] += 1
                    if taken[int(ids[row, k])] > capacity:
                        expected[row, k] = 0
        plan = ops.plan_documents(starts)
        assert torch.equal(ops.within_capacity(weights, ids, 4, capacity, plan), expected)


def test_a_capacity_is_of_the_sequences_that_were_planned() -> None:
    ops = CpuOps(1)
    weights, ids = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 rows, where sequences of 4 were planned"):
        ops.within_capacity(weights, ids, 2, 1, ops.plan_documents([0, 4]))
    with pytest.raises(IndexError):
        ops.within_capacity(weights, ids + 2, 2, 1, ops.plan_documents([0, 3]))
