"""Captured steps that call the host in the middle: graphs in pieces, with experts of the host or of
other ranks between them. The same bits as without, and nobody's rows go nowhere."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

import random_schedules
from covering import rest
from gpu_kernels.conftest import DEVICE
from gpu_kernels.standing_in import StandIn
from gpu_kernels.test_captured import FLOAT32, _pairs, runner_of, steps_of
from moebius.engine.runner import Runner
from moebius.engine.shared_head import SHARED_ROWS
from moebius.engine.workspace import StepRows
from moebius.models.config import ModelConfig
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.crossing import CrossingRows, OneMemory
from moebius.moe.dispatch import LocalDispatcher
from moebius.moe.on_host import HostDispatcher, HostExperts
from moebius.moe.placement import Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops import Ops
from moebius.ops.host import HostResult
from moebius.ops.program import Rows
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton.captured import CapturedOps, captured_rows
from moebius.ops.triton.checked import CheckedOps
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.process_group import join_process_group
from moebius.request.params import SamplingParams
from oracle import save_tiny
from random_schedules import Schedule, Wish, answers

pytestmark = [
    pytest.mark.usefixtures("sums_in_order"),
    pytest.mark.skipif(DEVICE == "cuda", reason="a stand-in plays the card"),
]
ROWS = StepRows(16, 4, sequences=4, context=12)
LAYERS = 2


def top_k(config: ModelConfig) -> int:
    return max(part.router.top_k for part in config.feed_forward if part.router is not None)


def host_experts(directory: Path, left: int, ops: Ops | None = None) -> HostExperts:
    """All but the first `left` of each layer, computed by plain PyTorch."""
    config = open_checkpoint(directory).config
    held = {layer: range(left, count) for layer, count in config.experts.items()}
    most = CrossingRows(64, top_k(config), config.hidden_size, FLOAT32)
    return HostExperts(ops or ReferenceOps(), held, config.experts, most)


class Seen(ReferenceOps):
    """The host's operations, and of each call for experts how many rows it was given."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def expert_rows(self, x_RD: Tensor, *args: Any) -> Tensor:
        self.rows.append(len(x_RD))
        return super().expert_rows(x_RD, *args)


class Early(OneMemory):
    """Reads a layer's input as it was when it began: on a card nothing that is launched after that
    is waited for."""

    def begin(self, ids_TK: Tensor, x_TD: Tensor) -> None:
        super().begin(ids_TK, x_TD.clone())


@pytest.mark.parametrize("left", [rest(0), 2])
def test_a_step_with_experts_of_the_host_is_the_step(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph a layer and one more; where the device has experts, too, one for these. The host sees
    as many rows as without graphs."""
    monkeypatch.setattr("moebius.moe.on_host.crossing", lambda *_: Early())
    save_tiny(tmp_path, "qwen3_moe", num_hidden_layers=LAYERS)
    card = StandIn()
    seen = [Seen(), Seen()]
    captured, plain = (
        runner_of(tmp_path, ops, rows, host=host_experts(tmp_path, left, host))
        for ops, rows, host in (
            (CapturedOps(card), ROWS, seen[0]),
            (CheckedOps(), StepRows(16, 4), seen[1]),
        )
    )
    graphs = 1 + LAYERS * (2 if left else 1)
    assert captured.programs.step.trace.segments == graphs
    assert captured.programs.step.sizes == [4, 1]
    for step, same in zip(steps_of(captured), steps_of(plain), strict=True):
        before = card.replays
        assert torch.equal(captured.execute(step), plain.execute(same))
        decodes = len(step.seq_lens_host) == len(step.input_ids_host)
        assert card.replays == before + decodes * graphs
        rows = range(min(4, len(step.input_ids_host)))
        assert torch.equal(captured.logits(rows), plain.logits(rows))
    assert _pairs(captured) == _pairs(plain)
    assert seen[0].rows == seen[1].rows


def mixed(count: int, blocks: int) -> tuple[list[Wish], Schedule]:
    """Requests that come and end at different steps, with a cache that is too small for all."""
    rng = random.Random(0)
    asked = [
        Wish(
            str(i),
            tuple(rng.randrange(60) for _ in range(rng.choice((2, 3)))),
            SamplingParams(temperature=1.0, logprobs=2, ignore_eos=True, max_tokens=4 + i % 3),
            i,
        )
        for i in range(count)
    ]
    return asked, Schedule(4, blocks, count, 24, True, (0,) * (count - 1) + (1,), 1)


@pytest.mark.parametrize("left", [0, rest(2)])
def test_mixed_batches_beside_the_host(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole engines. Of one layer: the interpreter takes minutes for more."""
    save_tiny(tmp_path, "qwen3_moe", num_hidden_layers=1, max_position_embeddings=256)
    asked, schedule = mixed(4, 5)
    rows = StepRows(24, 8, sequences=4, context=256)
    monkeypatch.setattr(random_schedules, "Runner", partial(Runner, rows=rows))
    card = StandIn()
    seen = []
    for ops in (CapturedOps(card), CheckedOps()):
        host = host_experts(tmp_path, left)
        seen.append(answers(load_decoder(tmp_path, FLOAT32, ops=ops, host=host), asked, schedule))
    assert seen[0].rounds == seen[1].rounds
    assert seen[0].preemptions == seen[1].preemptions > 0
    assert card.replays > 3 * (2 + bool(left)), "more than three steps"


# Ranks.


@pytest.fixture
def one_launch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has one place for where a program is, and ranks are threads here."""
    lock = threading.Lock()
    run = InterpretedFunction.run

    def alone(self: Any, *args: Any, **kwargs: Any) -> None:
        with lock, np.errstate(all="ignore"):  # which is a thread's own
            run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", alone)


@contextmanager
def over_gloo(file: Path, spec: ExchangeSpec) -> Iterator[list[Exchange]]:
    """Each rank's exchange."""
    epoch = Epoch("pieces", 1)
    device = torch.device("cpu")
    with ThreadPoolExecutor(spec.size) as pool:
        made = [
            pool.submit(join_process_group, file, spec, rank, epoch, timeout=60, device=device)
            for rank in range(spec.size)
        ]
        exchanges = [each.result() for each in made]
    try:
        yield exchanges
    finally:
        for each in exchanges:
            each.close()


def test_mixed_batches_over_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_launch_at_a_time: None
) -> None:
    """Engines of two ranks over gloo, each with a card: one takes a prompt while the other decodes,
    and is still there when the other has nothing to do. Alone in one process is the same."""
    pytest.importorskip("moebius._cpu", reason="ranks of one host share memory by it")
    import random_ranks

    model = tmp_path / "model"
    save_tiny(model, "qwen3_moe", num_hidden_layers=1, max_position_embeddings=256)
    config = open_checkpoint(model).config
    asked, schedule = mixed(5, 5)
    most = 24
    monkeypatch.setattr(random_ranks, "MOST_TOKENS", most)
    placement = Placement.linear(config.experts, 2)
    rows = StepRows(most, 8, sequences=4, context=256)
    monkeypatch.setattr(random_schedules, "Runner", partial(Runner, rows=rows))
    cards = [StandIn(), StandIn()]
    decoders = [
        load_decoder(model, FLOAT32, ops=CapturedOps(card), ranks=ExpertRank(placement, rank, most))
        for rank, card in enumerate(cards)
    ]
    spec = ExchangeSpec(
        2,
        most,
        config.hidden_size,
        top_k(config),
        FLOAT32,
        gathered=SHARED_ROWS,
        width=config.vocab_size,
    )
    schedules = [schedule, Schedule(8, 12, 3, 16, False, (0,) * 5, 1)]
    homes = [0, 0, 0, 0, 1]
    with over_gloo(tmp_path / "store", spec) as exchanges:
        monkeypatch.setattr(
            random_ranks, "SharedMemoryExchange", lambda _, spec, rank, *a, **k: exchanges[rank]
        )
        seen = random_ranks.answers_of_ranks(decoders, asked, homes, schedules)
    assert seen.preemptions > 0
    assert all(card.replays > 3 * 2 for card in cards), "more than three steps of two graphs"
    plain = load_decoder(model, FLOAT32, ops=CheckedOps())
    assert seen.rounds == answers(plain, asked, schedule).rounds


def test_logits_that_ranks_make_together_are_no_graphs(tmp_path: Path) -> None:
    """And a rank that has no group yet can be captured: nobody is called then."""
    save_tiny(tmp_path, "qwen3_moe", num_hidden_layers=1)
    placement = Placement.linear(open_checkpoint(tmp_path).config.experts, 2)
    part = ExpertRank(placement, 1, 16)
    programs = runner_of(tmp_path, CapturedOps(StandIn()), ROWS, ranks=part).programs
    assert programs.step.trace.segments == 2 and programs.head.trace.segments == 1
    assert programs.shared_head is not None
    assert "the host is called for logits" in programs.shared_head.trace.reason


# What is no graph is not taken for one.


def hosts_call(change: Any) -> Any:
    """A dispatcher's, with something that torch does around a call to the host whose rows vary."""
    received = Rows("some rows", 99)

    def call(self: Any, x_TD: Tensor, routing: Any, experts: Any) -> Tensor:
        def bring(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
            outputs[0][: len(inputs[0])] = inputs[0]
            outputs[1][: len(inputs[1])] = inputs[1]
            return {received.name: len(inputs[0])}

        def home(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
            outputs[0].copy_(inputs[0])
            return {}

        ops = experts.ops
        ids_TK = routing.expert_ids_TK
        rows = [
            HostResult(received, x_TD.shape[1:], x_TD.dtype),
            HostResult(received, ids_TK.shape[1:], ids_TK.dtype),
        ]
        x_RD, ids_RK = ops.host(bring, [x_TD, ids_TK], rows)
        return change(ops, x_TD, x_RD, ids_RK, routing.weights_TK, experts, home)

    return call


def brought(
    ops: Any, x: Tensor, x_RD: Tensor, ids_RK: Tensor, w: Tensor, experts: Any, home: Any
) -> Tensor:
    rows_RKD = experts.rows(x_RD, ids_RK)
    (back_TKD,) = ops.host(home, [rows_RKD], [HostResult(x, (w.shape[1], x.shape[1]), x.dtype)])
    return ops.combine(back_TKD, w)


def left(
    ops: Any, x: Tensor, x_RD: Tensor, ids_RK: Tensor, w: Tensor, experts: Any, home: Any
) -> Tensor:
    return ops.clip(x_RD, 1.0)


def kept(ops: Any, x: Tensor, x_RD: Tensor, *others: Any) -> Tensor:
    out = brought(ops, x, x_RD, *others)
    ops.clip(x_RD, 1.0)
    return out


def doubled(ops: Any, x: Tensor, x_RD: Tensor, *others: Any) -> Tensor:
    return brought(ops, x, x_RD * 2, *others)


def part_of(ops: Any, x: Tensor, x_RD: Tensor, ids_RK: Tensor, w: Tensor, *others: Any) -> Tensor:
    return brought(ops, x, x_RD.T, ids_RK, w, *others)


def read(ops: Any, x: Tensor, x_RD: Tensor, ids_RK: Tensor, *others: Any) -> Tensor:
    return brought(ops, x * float(x.sum()), x_RD, ids_RK, *others)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (brought, ""),
        (left, "is given others"),
        (doubled, "is given others"),
        (part_of, "is given others"),
        (kept, "is not brought home"),
        (read, "torch's sum computes among rows whose number the host decides"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_no_graph_is_not_taken_for_one(
    change: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "qwen3_moe", num_hidden_layers=1)
    plain = runner_of(tmp_path, CheckedOps(), StepRows(16, 4))
    wanted = [plain.execute(step).clone() for step in steps_of(plain) if not reason]
    monkeypatch.setattr(LocalDispatcher, "__call__", hosts_call(change))
    card = StandIn()
    captured = runner_of(tmp_path, CapturedOps(card), ROWS)
    trace = captured.programs.step.trace
    assert trace.recorded is not bool(reason) and reason in trace.reason
    assert trace.reason.startswith("they are not captured: ") or not reason
    if not reason:
        for step, expected in zip(steps_of(captured), wanted, strict=True):
            assert torch.equal(captured.execute(step), expected)


def test_a_value_that_is_read_between_two_calls_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the piece behind a call, which is a graph of its own."""
    save_tiny(tmp_path, "qwen3_moe", num_hidden_layers=1)
    dispatch = HostDispatcher.__call__

    def reading(self: Any, x_TD: Tensor, *args: Any) -> Tensor:
        out_TD = dispatch(self, x_TD, *args)
        return out_TD * (1.0 if out_TD.sum().item() else 0.0)

    monkeypatch.setattr(HostDispatcher, "__call__", reading)
    host = host_experts(tmp_path, 2)
    runner = runner_of(tmp_path, CapturedOps(StandIn()), ROWS, host=host)
    assert runner.programs.step.trace.reason == "they are not captured: HostRead: torch's item"
    assert runner.execute(steps_of(runner)[0]).isfinite().all()


def test_steps_in_pieces_have_fewer_graphs() -> None:
    assert captured_rows(1, 4) == [1]
    assert captured_rows(8, 4) == [8, 4, 1]
    assert captured_rows(12, 4) == [12, 4, 1]
    assert captured_rows(256, 4) == [256, 64, 16, 4, 1]
    assert captured_rows(0, 4) == []
    # As engine.step_memory counts them.
    for most in range(1, 600):
        assert len(captured_rows(most)) <= most.bit_length() + 1
        assert len(captured_rows(most, 4)) <= (most.bit_length() + 1) // 2 + 1
