"""What experts compute, before it is summed: for ranks that hold some of them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from moebius.ops import ExpertWeights
from moebius.ops.cpu import CpuOps
from moebius.ops.host import HostResult
from moebius.ops.interface import Ops
from moebius.ops.program import Rows
from moebius.ops.reference import ReferenceOps
from moebius.ops.sources import RowSource
from ops.levels import LEVELS, ROUNDOFF, bits, level

pytestmark = pytest.mark.usefixtures("seeded")

E, K, F, D = 7, 3, 45, 70
ROWS = 70


def random_experts(dtype: torch.dtype, *, bias: bool = False) -> ExpertWeights:
    def some(*shape: int) -> tuple[Tensor, ...]:
        return tuple((torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for _ in range(E))

    biases = (some(F), some(F), some(D)) if bias else ()
    return ExpertWeights(some(F, D), some(F, D), some(D, F), *biases)


def only(weights: ExpertWeights, held: set[int]) -> ExpertWeights:
    """The same experts with holes for all that are not held."""
    return ExpertWeights(
        *([x if e in held else None for e, x in enumerate(kind)] for kind in weights)
    )


def random_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their weights, and the experts that each chose, all different."""
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(ROWS)])
    return torch.randn(ROWS, D).to(dtype), torch.rand(ROWS, K), ids


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("isa", [*LEVELS, "reference"])
def test_the_sum_of_the_rows_is_what_experts_give(isa: str, dtype: torch.dtype, bias: bool) -> None:
    weights = random_experts(dtype, bias=bias)
    for threads in (1, 2):
        ops: Ops = ReferenceOps() if isa == "reference" else level(isa, threads)
        prepared = ops.prepare_experts(weights, "silu", dtype)
        x, share, ids = random_rows(dtype)
        for rows in (0, 1, 2, 17, ROWS):
            whole = ops.experts(x[:rows], share[:rows], ids[:rows], prepared)
            pairs = ops.expert_rows(x[:rows], ids[:rows], prepared)
            assert pairs.shape == (rows, K, D) and pairs.dtype == dtype
            assert torch.equal(bits(ops.combine(pairs, share[:rows])), bits(whole))


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("isa", [*LEVELS, "reference"])
def test_ranks_compute_the_pairs_of_their_own_experts(isa: str, dtype: torch.dtype) -> None:
    """Three that hold some each: every pair has, bit for bit, the row that it has where all are."""
    ops: Ops = ReferenceOps() if isa == "reference" else level(isa, 2)
    weights = random_experts(dtype, bias=True)
    x, _, ids = random_rows(dtype)
    whole = ops.expert_rows(x, ids, ops.prepare_experts(weights, "gelu", dtype))
    found = torch.zeros_like(whole)
    for held in ({0, 2, 6}, {1}, {3, 4, 5}):
        here = sum((ids == e for e in held), torch.zeros_like(ids)).bool()
        rows = here.any(1)
        prepared = ops.prepare_experts(only(weights, held), "gelu", dtype)
        pairs = ops.expert_rows(x[rows], ids.masked_fill(~here, E)[rows], prepared)
        found[here] = pairs[here[rows]]
    if isa == "reference":
        torch.testing.assert_close(found, whole)
    else:
        assert torch.equal(bits(found), bits(whole))


@pytest.mark.parametrize("ops", [CpuOps(1), ReferenceOps()], ids=["kernels", "reference"])
def test_ids_that_name_nothing_here(ops: Ops) -> None:
    weights = random_experts(torch.float32)
    prepared = ops.prepare_experts(only(weights, {1, 2}), "silu", torch.float32)
    x, share, _ = random_rows(torch.float32)
    nowhere = torch.full((ROWS, K), E)
    assert ops.expert_rows(x, nowhere, prepared).shape == (ROWS, K, D)
    for wrong in (0, E - 1):
        ids = torch.full((ROWS, K), 1)
        ids[3, 1] = wrong
        with pytest.raises(IndexError, match=f"expert {wrong} is not held here"):
            ops.expert_rows(x, ids, prepared)
        with pytest.raises(IndexError, match=f"expert {wrong} is not held here"):
            ops.experts(x, share, ids, prepared)


def test_the_kernels_refuse_other_ids() -> None:
    ops = CpuOps(1)
    prepared = ops.prepare_experts(random_experts(torch.float32), "silu", torch.float32)
    x, share, _ = random_rows(torch.float32)
    for wrong in (-1, E + 1):
        with pytest.raises(IndexError, match=f"expert id {wrong} is none of {E}"):
            ops.expert_rows(x, torch.full((ROWS, K), wrong), prepared)
    with pytest.raises(IndexError, match=f"expert id {E} is none of {E}"):
        ops.experts(x, share, torch.full((ROWS, K), E), prepared)
    with pytest.raises(ValueError, match="needs at least one"):
        ops.prepare_experts(only(random_experts(torch.float32), set()), "silu", torch.float32)


def test_rows_of_experts_of_two_matrices() -> None:
    ops = CpuOps(1)
    three = random_experts(torch.float32)
    two = ExpertWeights(three.gate_FD, (), three.down_DF)
    x, _, ids = random_rows(torch.float32)
    found, exact = (
        each.expert_rows(x, ids, each.prepare_experts(two, "relu", torch.float32))
        for each in (ops, ReferenceOps())
    )
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_recorded_on_as_many_rows_as_come() -> None:
    """Rows go elsewhere and are summed at home, in a program; twice, as in a decoder's layers."""
    ops = CpuOps(2)
    table = torch.randn(8, D)
    prepared = ops.prepare_experts(random_experts(torch.float32), "silu", torch.float32)
    received = Rows("received", 12)
    places: list[Tensor] = []

    def send(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        """Row t goes to t % 3 places, for one of its choices in turn."""
        (x,) = inputs
        rows, ids = outputs
        order = torch.tensor([t for t in range(len(x)) for _ in range(t % 3)], dtype=torch.int64)
        places[:] = [order]
        rows[: len(order)] = x[order]
        ids[: len(order)] = (order.unsqueeze(1) + torch.arange(K)) % (E + 1)
        return {"received": len(order)}

    def bring_back(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        (pairs,), (back, weights) = inputs, outputs
        (order,) = places
        keep = (order.unsqueeze(1) + torch.arange(K)) % (E + 1) < E
        back.zero_().index_add_(0, order, pairs.nan_to_num() * keep.unsqueeze(2))
        weights.fill_(0.5)
        return {}

    def layer(x: Tensor) -> Tensor:
        rows, ids = ops.host(
            send,
            [x],
            [HostResult(received, (D,), x.dtype), HostResult(received, (K,), torch.int64)],
        )
        pairs = ops.expert_rows(rows, ids, prepared)
        back, weights = ops.host(
            bring_back,
            [pairs],
            [HostResult(x, (K, D), x.dtype), HostResult(x, (K,), torch.float32)],
        )
        return ops.combine(back, weights)

    def compute(ids: Tensor) -> Tensor:
        return layer(layer(ops.embed(ids, table)))

    program = ops.record(compute, RowSource("rows", 6), torch.device("cpu"))
    assert program.trace.reason == ""
    for ids in ([3], [1, 2, 3, 4, 5], [], [7, 7], [0, 1, 2, 3, 4, 5]):
        exact = compute(torch.tensor(ids, dtype=torch.int64))
        assert torch.equal(bits(program.run(array("q", ids))), bits(exact))
