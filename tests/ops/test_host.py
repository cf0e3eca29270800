"""Calls to the host between the kernels: on the rows of each run, and on those that it decides."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius.ops import ExpertWeights
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.host import HostResult
from moebius.ops.interface import Ops
from moebius.ops.program import Rows
from moebius.ops.reference import ReferenceOps
from moebius.ops.sources import RowSource
from ops.levels import bits

TABLE = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
GAIN = torch.ones(4)
IDS = [5, 1, 7]


def record(ops: Ops, compute: Callable[[Tensor], Tensor], most: int = 8) -> Any:
    return ops.record(compute, RowSource("rows", most), torch.device("cpu"))


@pytest.mark.parametrize("failing", [False, True])
@torch.inference_mode()
def test_calls_to_the_host_between_the_kernels(failing: bool) -> None:
    """Each run calls anew, on the rows of that run, and what it raises ends the run alone."""
    ops = CpuOps(1)
    calls = []
    broken = [failing]

    def twice(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        calls.append([len(x) for x in (*inputs, *outputs)])
        if broken.pop() if broken else False:
            raise RuntimeError("a peer is gone")
        outputs[0].copy_(inputs[0] * 2)
        return {}

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        (doubled,) = ops.host(twice, [x], [HostResult(x, (4,), x.dtype)])
        return ops.add_gated(x, ops.rms_norm(doubled, GAIN, 1e-6))

    program = record(ops, compute)
    assert calls == [] and program.trace.segments == 2
    if failing:
        with pytest.raises(RuntimeError, match="a peer is gone"):
            program.run(array("q", [4, 4]))
    broken.clear()
    for ids in ([3], IDS, [], [1, 2]):
        found = program.run(array("q", ids)).clone()
        assert calls[-1] == [len(ids)] * 2
        assert torch.equal(bits(found), bits(compute(torch.tensor(ids, dtype=torch.int64))))


@torch.inference_mode()
def test_the_host_decides_how_many_rows_come() -> None:
    """As an exchange of tokens does: what is computed on them has as many, and what goes back has
    the step's again."""
    ops = CpuOps(1)
    received = Rows("received", 20)

    def scatter(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        """Row i goes to i places."""
        (x,), (pairs,) = inputs, outputs
        rows = torch.repeat_interleave(x, torch.arange(len(x)), dim=0)
        pairs[: len(rows)] = rows
        return {"received": len(rows)}

    def gather(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        (pairs,), (x,) = inputs, outputs
        of = torch.repeat_interleave(torch.arange(len(x)), torch.arange(len(x)))
        x.zero_().index_add_(0, of, pairs)
        return {}

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        (pairs,) = ops.host(scatter, [x], [HostResult(received, (4,), x.dtype)])
        pairs = ops.rms_norm(pairs, GAIN, 1e-6)
        (back,) = ops.host(gather, [pairs], [HostResult(x, (4,), x.dtype)])
        return ops.add_gated(x, back)

    program = record(ops, compute, most=6)
    assert program.trace.segments == 3
    for ids in ([3], [1, 2, 3, 4, 5], [], [7, 7]):
        exact = compute(torch.tensor(ids, dtype=torch.int64))
        assert torch.equal(bits(program.run(array("q", ids))), bits(exact))


@torch.inference_mode()
def test_the_host_sees_the_shapes_that_it_is_given() -> None:
    ops = CpuOps(1)
    seen: list[tuple[int, ...]] = []

    def turned(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        seen.extend(tuple(x.shape) for x in (*inputs, *outputs))
        outputs[0].copy_(inputs[0].transpose(1, 2))
        return {}

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE).view(-1, 2, 2)
        return ops.host(turned, [x, x.view(-1, 2)], [HostResult(x, (2, 2), x.dtype)])[0]

    program = record(ops, compute)
    assert program.trace.recorded
    for ids in (IDS, []):
        seen.clear()
        found = program.run(array("q", ids))
        assert torch.equal(found, TABLE[ids].view(-1, 2, 2).transpose(1, 2))
        assert seen == [(len(ids), 2, 2), (2 * len(ids), 2), (len(ids), 2, 2)]


@pytest.mark.parametrize("at", ["the host", "the end"])
@torch.inference_mode()
def test_rows_in_another_order_are_not_recorded_as_they_lie(at: str) -> None:
    ops = CpuOps(1)

    def copied(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        outputs[0].copy_(inputs[0])
        return {}

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        turned = x.view(-1, 2, 2).transpose(1, 2)
        return (
            ops.host(copied, [turned], [HostResult(x, (2, 2), x.dtype)])[0]
            if at == "the host"
            else turned
        )

    program = record(ops, compute)
    assert program.trace.reason == "a step's rows are wanted in another order"
    assert torch.equal(program.run(array("q", IDS)), TABLE[IDS].view(-1, 2, 2).transpose(1, 2))


@torch.inference_mode()
def test_the_host_sees_the_dtype_that_it_is_given() -> None:
    ops = CpuOps(1)
    seen: list[torch.dtype] = []

    def copied(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        seen.append(inputs[0].dtype)
        outputs[0].copy_(inputs[0])
        return {}

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE).view(torch.int32)
        return ops.host(copied, [x], [HostResult(x, (4,), x.dtype)])[0].view(torch.float32)

    program = record(ops, compute)
    assert program.trace.recorded
    assert torch.equal(program.run(array("q", IDS)), TABLE[IDS]) and seen == [torch.int32]


def test_the_host_computes_no_gradients() -> None:
    """As where it is not recorded: a graph would grow from step to step."""
    ops = CpuOps(1)
    weight = torch.nn.Parameter(torch.ones(4, 4))

    def times(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        outputs[0].copy_(inputs[0] @ weight)
        return {}

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        return ops.host(times, [x], [HostResult(x, (4,), x.dtype)])[0]

    with torch.inference_mode():
        program = record(ops, compute)
    found = program.run(array("q", IDS))
    assert program.trace.recorded and not found.requires_grad
    assert torch.equal(found, TABLE[IDS] @ weight.detach())


@torch.inference_mode()
def test_a_program_may_be_nothing_but_a_call_to_the_host() -> None:
    ops = CpuOps(1)

    def negated(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        torch.neg(inputs[0], out=outputs[0])
        return {}

    program = record(ops, lambda ids: ops.host(negated, [ids], [HostResult(ids, (), ids.dtype)])[0])
    assert program.trace.recorded
    assert program.run(array("q", IDS)).tolist() == [-5, -1, -7]


def some(rows: Rows, dtype: torch.dtype = TABLE.dtype) -> HostResult:
    return HostResult(rows, (4,), dtype)


def first(count: Callable[[int], int], name: str) -> Any:
    """A call to the host that brings the first `count(n)` of its n rows."""

    def bring(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        number = count(len(inputs[0]))
        outputs[0][:number] = inputs[0][:number]
        return {name: number}

    return bring


@torch.inference_mode()
def test_rows_of_two_counts_are_not_taken_for_each_other() -> None:
    """Though there may be as many at most: what a run did not write would be read."""
    ops = CpuOps(1)
    received = Rows("received", 8)

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        (fewer,) = ops.host(first(lambda n: n // 2, "received"), [x], [some(received)])
        return ops.add_gated(x, fewer)

    reason = record(ops, compute).trace.reason
    assert reason == "add_gated is called on as many rows as received, which may differ"


@torch.inference_mode()
def test_rows_of_a_count_that_was_decided_anew_are_not_taken_for_its_own() -> None:
    ops = CpuOps(1)
    received = Rows("received", 8)

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        (early,) = ops.host(first(lambda n: n, "received"), [x], [some(received)])
        (late,) = ops.host(first(lambda n: n // 2, "received"), [x], [some(received)])
        return ops.add_gated(late, early)

    reason = record(ops, compute).trace.reason
    assert reason == "it was written before the number of received changed"


@torch.inference_mode()
def test_a_call_that_decides_a_count_anew_is_given_what_there_was() -> None:
    ops = CpuOps(1)
    received = Rows("received", 8)

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        for fewer in range(1, 3):
            call = first(lambda n, fewer=fewer: max(n - fewer, 0), "received")
            (x,) = ops.host(call, [x], [some(received)])
            x = ops.rms_norm(x, GAIN, 1e-6)
        return x

    program = record(ops, compute)
    for ids in ([1, 2, 3, 4, 5], [6, 7], []):
        found = program.run(array("q", ids))
        assert len(found) == max(len(ids) - 3, 0)
        assert torch.equal(bits(found), bits(compute(torch.tensor(ids, dtype=torch.int64))))


@pytest.mark.parametrize("rows", [Rows("rows", 8), Rows("received", 9)], ids=str)
@torch.inference_mode()
def test_a_name_means_one_count(rows: Rows) -> None:
    ops = CpuOps(1)

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        ops.host(first(lambda n: n, "received"), [x], [some(Rows("received", 8))])
        return ops.host(first(lambda n: n, rows.name), [x], [some(rows)])[0]

    with pytest.raises(ValueError, match=f"decides .*'{rows.name}'.*, but there are"):
        record(ops, compute)


@pytest.mark.parametrize("ops", [CpuOps(1), ReferenceOps()], ids=["recorded", "reference"])
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, r"decided \[\]; it must decide \['received'\]"),
        ({"recieved": 1}, "'recieved'"),
        ({"received": 1, "sent": 1}, "'sent'"),
        ({"received": 9}, "there are 9 received; there must be between 0 and 8"),
        ({"received": -1}, "there are -1 received"),
    ],
)
@torch.inference_mode()
def test_a_count_that_cannot_be_ends_the_run(ops: Ops, said: Any, message: str) -> None:
    wanted = [some(Rows("received", 8))]
    program = record(ops, lambda ids: ops.host(lambda *_: said, [ids], wanted)[0])
    with pytest.raises(ValueError, match=message):
        program.run(array("q", [1]))


class Ranks:
    """Experts behind two exchanges, as they lie on several ranks: how many tokens and pairs of
    (token, expert) come is known only when they do, and has nothing to do with the step's rows."""

    def __init__(self, ops: Ops, most: int, experts: int, k: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> list[Tensor]:
            return [torch.randn(shape, generator=generator) for _ in range(experts)]

        self.ops = ops
        self.k = k
        self.held = ExpertWeights(weights(6, 4), weights(6, 4), weights(4, 6))
        self.router = torch.randn(experts, 4, generator=generator)
        # Tokens that come from others and go back to them, this time.
        self.others = torch.empty(0, 4)
        self.received = Rows("received tokens", 2 * most)
        self.pairs = Rows("received pairs", 2 * most * k)
        self.counts: list[tuple[int, int, int]] = []

    def count(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        """Of its own tokens the even ones stay here."""
        (ids_TK,), (from_R, row_P, expert_P1) = inputs, outputs
        here = torch.arange(0, len(ids_TK), 2)
        tokens = len(here) + len(self.others)
        pairs = tokens * self.k
        from_R[:tokens] = torch.cat((here, -1 - torch.arange(len(self.others))))
        row_P[:pairs] = torch.arange(pairs) // self.k
        chosen = torch.cat((ids_TK[here], torch.zeros(len(self.others), self.k).long()))
        expert_P1[:pairs] = chosen.view(-1, 1)
        self.counts.append((len(ids_TK), tokens, pairs))
        return {"received tokens": tokens, "received pairs": pairs}

    def send(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        x_TD, from_R, row_P = inputs
        x_PD, ones_P1 = outputs
        both = torch.cat((x_TD, self.others.flip(0)))  # -1 is the first of the others
        x_PD.copy_(both[from_R][row_P])
        ones_P1.fill_(1.0)
        return {}

    def back(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        out_PD, (home_TD,) = inputs[0], outputs
        kept = -(-len(home_TD) // 2)
        home_TD.zero_()
        home_TD[::2] = out_PD[: kept * self.k].view(kept, self.k, 4).sum(1)
        return {}

    def __call__(self, x_TD: Tensor) -> Tensor:
        ops = self.ops
        router = ops.prepare_linear((self.router, None))
        experts = ops.prepare_experts(self.held, "silu")
        routing = RouterConfig(len(self.router), self.k)
        _, ids_TK = ops.route(ops.logits(x_TD, router), routing)
        index = torch.int64
        from_R, row_P, expert_P1 = ops.host(
            self.count,
            [ids_TK],
            [
                HostResult(self.received, (), index),
                HostResult(self.pairs, (), index),
                HostResult(self.pairs, (1,), index),
            ],
        )
        x_PD, ones_P1 = ops.host(
            self.send,
            [x_TD, from_R, row_P],
            [HostResult(row_P, (4,), x_TD.dtype), HostResult(row_P, (1,), torch.float32)],
        )
        out_PD = ops.experts(x_PD, ones_P1, expert_P1, experts)
        (home_TD,) = ops.host(self.back, [out_PD], [HostResult(x_TD, (4,), x_TD.dtype)])
        return ops.add_gated(x_TD, home_TD)


@torch.inference_mode()
def test_counts_that_are_decided_in_the_middle_of_each_layer() -> None:
    """None, as many as may be, fewer and more than the step's own, anew in each layer and run."""
    most, k = 6, 2
    ops = CpuOps(2)
    layers = [Ranks(ops, most, experts=3, k=k, seed=seed) for seed in range(3)]

    def compute(ids: Tensor) -> Tensor:
        x = ops.embed(ids, TABLE)
        for layer in layers:
            x = layer(x)
        return x

    program = record(ops, compute, most)
    assert program.trace.recorded and program.trace.segments == 1 + 2 * len(layers)
    rng = random.Random(0)
    cases = [(0, 0), (0, most), (1, 0), (most, most + most // 2), (most, 0)]
    cases += [(rng.randint(0, most), rng.randint(0, most)) for _ in range(8)]
    for own, others in cases:
        ids = [rng.randrange(8) for _ in range(own)]
        for layer in layers:
            layer.others = torch.randn(rng.randint(0, others), 4)
        layers[0].others = torch.randn(others, 4)
        found = program.run(array("q", ids)).clone()
        counted = [layer.counts[-1] for layer in layers]
        exact = compute(torch.tensor(ids, dtype=torch.int64))
        assert torch.equal(bits(found), bits(exact))
        assert counted == [layer.counts[-1] for layer in layers]
        assert counted[0] == (own, -(-own // 2) + others, k * (-(-own // 2) + others))
