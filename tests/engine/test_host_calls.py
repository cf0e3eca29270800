"""A call to the host in each layer, as an exchange of tokens or an expert in another memory needs:
the recorded step goes on around it, and no bit changes, in any batch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from covering import each_value
from moebius.engine.kv_cache import KVCache
from moebius.engine.runner import Runner
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.moe.experts import Experts
from moebius.moe.router import Routing
from moebius.ops import Ops
from moebius.ops.cpu import CpuOps
from moebius.ops.host import HostResult
from moebius.ops.program import Rows
from oracle import save_tiny
from random_schedules import (
    MAX_MODEL_LEN,
    answers,
    each_alone,
    random_schedule,
    wishes,
)

CPU = torch.device("cpu")


class Elsewhere:
    """The experts are the host's to call: as if they lay in another memory."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.calls = 0

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        def compute(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
            self.calls += 1
            outputs[0].copy_(experts(*inputs))
            return {}

        given = [x_TD, routing.weights_TK, routing.expert_ids_TK]
        return self.ops.host(compute, given, [HostResult(x_TD, x_TD.shape[1:], x_TD.dtype)])[0]


class Exchange:
    """Tokens go out and pairs of (token, expert) come in, in another number and order; what these
    gave goes back, and is summed at home. So experts over ranks work, here with one rank."""

    def __init__(self, ops: Ops, most_tokens: int) -> None:
        self.ops = ops
        self.most_tokens = most_tokens
        self.calls = 0

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        k = routing.expert_ids_TK.shape[1]
        received = Rows("received", self.most_tokens * k)
        home: list[Tensor] = []

        def go(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
            """By expert, as all-to-all would bring them."""
            self.calls += 1
            x, ids = inputs
            rows, chosen, ones = outputs
            order = torch.argsort(ids.flatten(), stable=True)
            count = len(order)
            rows[:count] = x[order // k]
            chosen[:count] = ids.flatten()[order].unsqueeze(1)
            ones[:count] = 1.0
            home[:] = [order]
            return {"received": count}

        def back(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
            outputs[0].flatten(0, 1)[home[0]] = inputs[0]
            return {}

        width = x_TD.shape[1:]
        rows_PD, ids_P1, ones_P1 = self.ops.host(
            go,
            [x_TD, routing.expert_ids_TK],
            [
                HostResult(received, width, x_TD.dtype),
                HostResult(received, (1,), torch.int64),
                HostResult(received, (1,), torch.float32),
            ],
        )
        out_PD = experts(rows_PD, ones_P1, ids_P1)
        (out_TKD,) = self.ops.host(back, [out_PD], [HostResult(x_TD, (k, *width), x_TD.dtype)])
        return self.ops.combine(out_TKD, routing.weights_TK)


def decoder(directory: Path, dtype: torch.dtype, dispatch: str, threads: int = 1) -> Decoder:
    ops = CpuOps(threads)
    made = load_decoder(directory, dtype, ops=ops)
    for layer in made.layers:
        if dispatch == "elsewhere":
            layer.mlp.dispatch = Elsewhere(ops)
        if dispatch == "exchange":
            layer.mlp.dispatch = Exchange(ops, 2048)
    return made


@pytest.mark.parametrize(
    ("dtype", "dispatch"),
    each_value([torch.bfloat16, torch.float32], ["elsewhere", "exchange"]),
    ids=str,
)
def test_a_host_call_in_each_layer_changes_no_bit(
    tmp_path: Path, dtype: torch.dtype, dispatch: str
) -> None:
    save_tiny(tmp_path, "qwen3_moe", max_position_embeddings=MAX_MODEL_LEN, vocab_size=300)
    here = decoder(tmp_path, dtype, "local")
    there = [decoder(tmp_path, dtype, dispatch, threads) for threads in (1, 2)]
    rng = random.Random(dispatch)
    asked = wishes(8, here.config.vocab_size, rng, free=True)
    expected = each_alone(here, asked)
    for one in there:
        schedule = random_schedule(len(asked), rng)
        for found in answers(one, asked, schedule).rounds:
            assert found == expected, schedule
        assert all(layer.mlp.dispatch.calls > 0 for layer in one.layers)


@pytest.mark.parametrize(("dispatch", "calls"), [("local", 0), ("elsewhere", 1), ("exchange", 2)])
def test_the_step_is_recorded_around_its_calls(tmp_path: Path, dispatch: str, calls: int) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    one = decoder(tmp_path, torch.bfloat16, dispatch)
    specs = one.config.caches(torch.bfloat16)
    cache = KVCache(specs, one.ops, num_blocks=4, block_size=4, device=CPU)
    trace = Runner(one, cache, CPU).programs.step.trace
    assert trace.recorded and trace.segments == 1 + calls * len(one.layers)
