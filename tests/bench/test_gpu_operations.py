"""What benchmarks/gpu_operations.py and gpu_costs.py measure on a card, rehearsed without one."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.test_gpu import ROOT, gpu
from moebius.engine.kv_cache import KVCache
from moebius.engine.runner import Runner
from moebius.engine.workspace import StepRows
from moebius.models.store.load import load_decoder
from moebius.ops import ExpertWeights, Matrix
from moebius.ops.reference import ReferenceOps
from oracle import save_tiny

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

from gpu_kernels.conftest import counted  # noqa: E402
from gpu_kernels.interpreting import hurry  # noqa: E402
from gpu_kernels.standing_in import StandIn  # noqa: E402
from gpu_kernels.test_captured import steps_of  # noqa: E402

BANDWIDTH = 2e9
PEAK = 1e9


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The programs, by name, and the folders that they import from."""
    for folder in ("", "peers"):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / folder))
    import gpu as stages
    import gpu_cases
    import gpu_costs
    import gpu_operations
    import gpu_timing
    import torch_products

    return SimpleNamespace(
        stages=stages,
        cases=gpu_cases,
        costs=gpu_costs,
        operations=gpu_operations,
        timing=gpu_timing,
        products=torch_products,
    )


@pytest.fixture
def stage(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of a name, on a machine of known ceilings."""
    ceilings = {"bytes_per_second": BANDWIDTH, "flops_per_second": PEAK}
    (tmp_path / "environment.json").write_text(json.dumps(ceilings))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MOEBIUS_CPU_ISA", "reference")
    return lambda name: modules.stages.Stage(name, tmp_path, "cpu", True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter computes with NumPy, which would warn of what lies beyond a tile."""
    hurry(monkeypatch)
    with np.errstate(all="ignore"):
        yield


def kept(stage: Any) -> dict[str, Any]:
    """The record on the disk."""
    found: dict[str, Any] = json.loads((stage.out / f"{stage.name}.json").read_text())
    return found


# Of the small models: 64 wide, 4 query heads and 2 key heads of 16, 4 experts of 32 (gpt-oss': 64),
# of which 2 are chosen; 4 value heads of 16 that recur; latents of 32 numbers, and 8 that turn.
EXPERT = 3 * 64 * 32
CHOSEN = 2 * 64 * 2 + 2 * (4 + 8)
"""Bytes of a row in and out, of two weights and of two ids."""
HEADS = 2 * (4 * 16) * 2
"""Bytes of a row's queries and of what they find."""
BY_HAND = {
    "qwen3-30b: experts in bfloat16, rows 1": (2 * EXPERT * 2 + CHOSEN, 2 * 2 * EXPERT),
    "qwen3-30b: attention, decodes of 1 x 530 tokens": (
        530 * (2 * 2 * 16) * 2 + HEADS,
        530 * 4 * (2 * 16 + 2 * 16),
    ),
    "qwen3-30b: attention, a prompt of 40 tokens": (
        40 * (2 * 2 * 16) * 2 + 40 * HEADS,
        (40 * 41 // 2) * 4 * (2 * 16 + 2 * 16),
    ),
    "qwen3-30b: queries, keys and values, rows 3": (
        64 * (64 + 32 + 32) * 2 + 3 * (64 + 128) * 2,
        2 * 3 * 64 * 128,
    ),
    "qwen3-30b: logits, rows 3": (64 * 4096 * 2 + 3 * (64 * 2 + 4096 * 4), 2 * 3 * 64 * 4096),
    "qwen3-30b: route, rows 5": (5 * (4 * 4 + 2 * (4 + 8)), 0),
    "qwen3-30b: add_rms_norm, rows 5": (4 * 5 * 64 * 2 + 64 * 2, 0),
    "qwen3-30b: rotate_and_store, rows 5": (2 * 5 * 128 * 2 + 5 * (2 * 8 * 4 + 8), 0),
    "qwen3-30b: choose, greedy, rows 2": (2 * (4096 * 4 + 8), 0),
    "gpt-oss-20b: experts in mxfp4_planes, rows 1": (
        2 * (3 * 64 * (64 // 2 + 64 // 32) + 3 * 64 * 2) + CHOSEN,
        2 * 2 * 3 * 64 * 64,
    ),
    "linear 256 -> 256 in q8_0, rows 1": (256 * 8 * 34 + 2 * 256 * 2, 2 * 256 * 256),
    "linear 256 -> 256 in q4_k, rows 1": (256 * 144 + 2 * 256 * 2, 2 * 256 * 256),
    "linear 256 -> 256 in fp8[128x128,float32], rows 1": (
        256 * 256 + 4 * 4 + 2 * 256 * 2,
        2 * 256 * 256,
    ),
    "qwen3-30b: attention, decodes of 2 x 40 tokens, an int8 cache": (
        2 * 40 * 2 * 2 * (16 + 2) + 2 * HEADS,
        2 * 40 * 4 * (2 * 16 + 2 * 16),
    ),
    "qwen3.5-35b: gated delta rule, 2 sequences": (
        2 * (2 * 4 * 16 * 16 * 4) + 2 * (128 + 8 + 64) * 2,
        2 * 4 * 3 * 2 * 16 * 16,
    ),
    "qwen3.5-35b: convolution, a prompt of 5 tokens": (
        2 * 3 * 128 * 2 + 5 * 2 * 128 * 2 + 128 * 4 * 4,
        5 * 128 * 2 * 4,
    ),
    "glm-4.7-flash: attention, decodes of 2 x 40 tokens, latent": (
        2 * 40 * (32 + 8) * 2 + 2 * 4 * (40 + 32) * 2,
        2 * 40 * 4 * 2 * (40 + 32),
    ),
    "glm-4.7-flash: heads' products of queries, rows 2": (
        4 * 32 * 24 * 2 + 2 * 4 * (24 + 32) * 2,
        2 * 2 * 4 * 32 * 24,
    ),
}


@pytest.mark.usefixtures("quick")
def test_operations_are_rehearsed(modules: Any, stage: Any) -> None:
    """What they move and compute at least is counted by hand for one or two of each kind."""
    here = stage("operations")
    modules.stages.run(here, lambda: modules.operations.operations(here))
    record = kept(here)
    assert record["finished"]
    found = {each["operation"]: each for each in record["operations"]}
    assert len(found) == len(record["operations"]) and found.keys() >= BY_HAND.keys()
    for name, (nbytes, operations) in BY_HAND.items():
        assert (found[name]["bytes"], found[name]["operations"]) == (nbytes, operations), name
    for name, each in found.items():
        assert "failed" not in each, (name, each)
        seconds = each["seconds"]
        floors = {"bytes": each["bytes"] / BANDWIDTH, "operations": each["operations"] / PEAK}
        assert each["bound"] == max(floors, key=floors.__getitem__)
        assert each["floor_s"] == pytest.approx(max(floors.values()))
        assert each["share_of_floor"] == pytest.approx(max(floors.values()) / seconds)
        assert each["bytes_per_second"] == pytest.approx(each["bytes"] / seconds)
        assert each["flops_per_second"] == pytest.approx(each["operations"] / seconds)


def test_cases_of_published_sizes_read_more_than_a_cache_holds(
    modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made on meta, where nothing takes memory; planning states counts rows, which meta cannot."""
    from moebius.ops.triton import TritonOps

    monkeypatch.setattr(TritonOps, "plan_states", lambda *_: None)
    at = modules.cases.Inputs(TritonOps(), "meta", False)
    found = {case.name: case.make() for case in modules.operations.cases(at)}
    assert len(found) > 60
    for name, work in found.items():
        assert 1 <= len(work.calls) <= 128, name
        assert "a prompt of" in name or len(work.calls) * work.bytes > 200 * 2**20, name
    qkv = found["qwen3-30b: queries, keys and values, rows 64"]
    assert qkv.bytes == 2 * (2048 * 5120 + 64 * (2048 + 5120)) and len(qkv.calls) == 13
    assert qkv.operations == 2 * 64 * 2048 * 5120
    experts = found["gpt-oss-20b: experts in mxfp4_planes, rows 2048"]
    one = 3 * 2880 * 2880 * 4.25 / 8 + 3 * 2880 * 2
    assert experts.bytes == 32 * one + 2048 * (2 * 2880 * 2 + 4 * (4 + 8))
    decode = found["qwen3-30b: attention, decodes of 256 x 1024 tokens"]
    assert decode.bytes == 256 * (1024 * 2 * 4 * 128 * 2 + 2 * 32 * 128 * 2)
    for comparison in modules.costs.comparisons(at):
        for name, make in comparison.make().items():
            assert make(), (comparison.name, name)


def test_copies_are_more_than_a_cache_holds(modules: Any) -> None:
    copies = modules.cases.Inputs(ReferenceOps(), "cpu", False).copies
    assert [copies(2**20 * size) for size in (1, 2, 100, 256, 257)] == [128, 128, 3, 1, 1]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("new", "context"), [(1, 7), (4, 7), (7, 7)])
def test_keys_that_rows_see_are_counted(
    modules: Any, new: int, context: int, window: int | None
) -> None:
    """By a loop over rows and keys."""
    asked = modules.cases.Sequences(3, new, context)
    seen = [
        (row, key)
        for row in range(context - new, context)
        for key in range(row + 1)
        if window is None or key > row - window
    ]
    assert asked.pairs(window) == 3 * len(seen)
    assert asked.keys(window) == 3 * len({key for _, key in seen})


def test_experts_are_chosen_evenly_and_a_single_row_meets_others_each_time(modules: Any) -> None:
    router = modules.cases.router_of(modules.cases.model_of("qwen3-30b", False).feed_forward[0])
    alone = modules.cases.choices(1, router, 4)
    assert [tuple(each.shape) for each in alone] == [(1, 8)] * 4
    assert len(torch.cat(alone).unique()) == 4 * 8
    [many] = modules.cases.choices(2048, router, 1)
    assert all(len(row.unique()) == 8 for row in many[:50])
    # 128 of 2,048 on average, whose standard deviation is 11.
    counts = torch.bincount(many.flatten(), minlength=128)
    assert counts.sum() == 2048 * 8 and (counts - 128).abs().max() < 6 * 11


def test_an_operation_that_fails_leaves_its_error_and_the_next_one_is_measured(
    modules: Any, stage: Any
) -> None:
    def refuse() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def work(call: Any) -> Any:
        return lambda: modules.cases.Work([call], 8, 4)

    here = stage("operations")
    named = {"made": refuse, "called": work(lambda: 1 / 0), "fine": work(lambda: None)}
    modules.operations.measure(here, [modules.cases.Case(*each) for each in named.items()])
    made, called, fine = kept(here)["operations"]
    assert made == {
        "operation": "made",
        "failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate",
    }
    assert called == {"operation": "called", "failed": "ZeroDivisionError: division by zero"}
    assert fine["operation"] == "fine" and fine["seconds"] > 0 and fine["bytes"] == 8


def test_without_ceilings_there_is_no_floor(modules: Any, stage: Any) -> None:
    here = stage("operations")
    (here.out / "environment.json").unlink()
    found = modules.operations.rates(here, modules.cases.Work([print], 8, 4), 2.0)
    assert found["bytes_per_second"] == 4 and found["flops_per_second"] == 2
    assert not found.keys() & {"floor_s", "bound", "share_of_floor"}


@pytest.mark.parametrize("program", ["operations", "costs"])
def test_where_the_device_is_lost_another_process_goes_on(
    modules: Any, stage: Any, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """As execv never returns, what stands in its place ends the process."""
    started: list[Sequence[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, argv: (started.append(argv), sys.exit(7)))
    monkeypatch.delenv(modules.operations.GOES_ON, raising=False)

    def lose() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def begun(make: Any) -> Any:
        found = modules.operations.begun(stage(program))
        names = ("first", "second", "third")
        if program == "operations":
            wanted = [modules.cases.Case(name, make[name]) for name in names]
            return lambda: modules.operations.measure(found, wanted)
        of_ways = [
            modules.costs.Comparison(name, lambda m=make[name]: {"ours": m}) for name in names
        ]
        return lambda: modules.costs.compare(found, of_ways)

    calls = [lambda: None]
    fine = {"operations": lambda: modules.cases.Work(calls, 1), "costs": lambda: calls}[program]
    run = begun({"first": fine, "second": lose, "third": lose})
    with pytest.raises(SystemExit, match="7"):
        run()
    assert started == [[sys.executable, *sys.argv]]
    begun({"first": lose, "second": lose, "third": fine})()
    record = kept(stage(program))
    first, second, third = record["operations" if program == "operations" else "alone"]
    assert "failed" not in first and "failed" not in third
    assert second["lost"] and "illegal memory access" in second["failed"]
    # The record of a stage that is begun anew is not gone on with.
    assert not modules.operations.begun(stage(program)).record


class Card:
    """A device that computes while the host goes on, in seconds by hand.

    now      the host's time. free: when the device will have done all that it was given
    launch   what the host needs for a call. kernel: what the device needs
    """

    def __init__(self, launch: float, kernel: float) -> None:
        self.now = 0.0
        self.free = 0.0
        self.launch = launch
        self.kernel = kernel
        self.slept: list[int] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.give(cycles / 1e9)

    def give(self, seconds: float) -> None:
        self.free = max(self.now, self.free) + seconds

    def call(self) -> None:
        self.now += self.launch
        self.give(self.kernel)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def Event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()

        def record() -> None:
            event.at = max(self.now, self.free)

        def synchronize() -> None:
            self.now = max(self.now, event.at)

        event.record = record
        event.synchronize = synchronize
        event.query = lambda: self.now >= event.at
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def stands_in(self, timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "Event", self.Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(timing, "time", self)
        monkeypatch.setattr(timing, "cycles_per_second", lambda: 1e9)


def test_a_device_sleeps_until_all_is_launched(
    modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 launches of 10 us take longer than the first sleep, of a millisecond, and less than twice
    what they were seen to take. Awake, the device would have waited for each of them."""
    card = Card(launch=10e-6, kernel=3e-6)
    card.stands_in(modules.timing, monkeypatch)
    found = modules.timing.seconds_a_call("cuda", [card.call] * 500, rounds=3)
    assert found.seconds == pytest.approx(3e-6) and not found.host_late
    assert [cycles / 1e9 for cycles in card.slept] == pytest.approx([1e-3, 10e-3, 10e-3, 10e-3])


def test_a_host_that_is_too_late_is_told_of(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten launches of 0.1 s are more than the longest sleep."""
    card = Card(launch=0.1, kernel=1e-3)
    card.stands_in(modules.timing, monkeypatch)
    found = modules.timing.seconds_a_call("cuda", [card.call] * 10, rounds=1)
    assert found.host_late and found.seconds > 0.05
    assert len(card.slept) == modules.timing.ATTEMPTS
    assert max(card.slept) == modules.timing.MOST_SLEEP_S * 1e9


def test_ways_take_turns_and_each_has_the_median_of_its_own(
    modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([1.0, 10.0, 5.0, 30.0, 3.0, 20.0])
    order: list[str] = []

    class Known:
        def round(self, calls: Sequence[Any]) -> Any:
            order.extend(call() for call in calls)
            return modules.timing.Round(next(seconds))

    monkeypatch.setattr(modules.timing, "clock_of", lambda device: Known())
    ways = {"a": [lambda: "a"], "b": [lambda: "b", lambda: "b"]}
    found = modules.timing.in_turn("cuda", ways, rounds=3)
    assert order == ["a", "b", "b"] * 3
    assert (found["a"].seconds, found["b"].seconds) == (3.0, 20.0 / 2)


def naive_experts(x: Tensor, weights: Tensor, ids: Tensor, experts: ExpertWeights) -> Tensor:
    """In float64, a choice at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for share, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            gate, up, down = (Matrix.of(kind[e]).widened(torch.float64) for kind in experts[:3])
            inner = torch.nn.functional.silu(gate @ row) * (up @ row)
            out[t] += share * (down @ inner)
    return out


def random_experts(count: int, width: int, hidden: int) -> ExpertWeights:
    def drawn(rows: int, columns: int) -> list[Tensor]:
        return [(torch.randn(rows, columns) / columns**0.5).bfloat16() for _ in range(count)]

    return ExpertWeights(drawn(width, hidden), drawn(width, hidden), drawn(hidden, width))


@pytest.fixture
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_experts_by_torch_are_a_loop_over_choices(modules: Any, rows: int) -> None:
    """One expert of five is nobody's choice. A step may have no row."""
    experts = random_experts(5, 16, 24)
    x = torch.randn(rows, 24).bfloat16()
    ids = torch.rand(rows, 4).topk(3).indices
    weights = torch.rand(rows, 3)
    stacked = modules.products.Stacked.of(experts)
    found = modules.products.experts_by_torch(x, weights, ids, stacked)
    exact = naive_experts(x, weights, ids, experts)
    assert found.dtype == torch.bfloat16 and found.shape == x.shape
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-5, atol=2.0**-5)


@pytest.mark.usefixtures("seeded", "quick")
def test_torch_computes_in_place_of_kernels_and_they_compute_again_behind_it(modules: Any) -> None:
    """With what a card has, and with no kernel of ours launched."""
    from moebius.ops.triton import TritonOps
    from moebius.ops.triton.checked import CheckedOps

    ops = CheckedOps()
    x = torch.randn(3, 24).bfloat16()
    layers = [(torch.randn(size, 24).bfloat16(), None) for size in (8, 16)]
    biased = [(layers[0][0], torch.randn(8).bfloat16()), layers[1]]
    experts = random_experts(4, 16, 24)
    ids = torch.tensor([[0, 1], [3, 1], [2, 0]])
    weights = torch.rand(3, 2)
    given = ops.prepare_experts(experts, "silu")
    products = modules.products.TorchProducts(TritonOps)
    with products.in_place(), counted() as launched:
        for each in (layers, biased):
            prepared = ops.prepare_linear(*each)
            exact = torch.cat(
                [x.double() @ w.double().T + (0 if b is None else b) for w, b in each], 1
            )
            for _ in range(2):
                torch.testing.assert_close(
                    ops.linear(x, prepared).double(), exact, rtol=2.0**-7, atol=2.0**-7
                )
        assert ops.logits(x, prepared).dtype == torch.float32
        found = ops.experts(x, weights, ids, given)
        exact = naive_experts(x, weights, ids, experts)
        torch.testing.assert_close(found.double(), exact, rtol=2.0**-5, atol=2.0**-5)
        assert launched == [] and products.replaced == {"linear": 4, "logits": 1, "experts": 1}
        ops.linear(x.float(), ops.prepare_linear((layers[0][0].float(), None)))
        assert launched == ["linear"] and products.replaced["linear"] == 4
    with counted() as launched:
        ops.linear(x, prepared)
        assert launched == ["linear"] * 2 and products.replaced["linear"] == 4


@pytest.mark.usefixtures("quick")
def test_captured_steps_have_torchs_products_and_read_nothing_on_the_host(
    modules: Any, tmp_path: Path
) -> None:
    """A stand-in for a card notes a step and plays it again; beside it the same step uncaptured."""
    from moebius.ops.triton import TritonOps
    from moebius.ops.triton.captured import CapturedOps
    from moebius.ops.triton.checked import CheckedOps

    # Grouped products take rows of multiples of 16 bytes alone.
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16}
    save_tiny(tmp_path, "qwen3_moe", num_hidden_layers=1, **sizes)
    card = StandIn()
    products = modules.products.TorchProducts(TritonOps)
    runners = []
    with products.in_place(), counted() as launched:
        for ops, rows in (
            (CapturedOps(card), StepRows(16, 4, sequences=4, context=12)),
            (CheckedOps(), StepRows(16, 4)),
        ):
            decoder = load_decoder(tmp_path, torch.bfloat16, ops=ops)
            specs = decoder.config.caches(torch.bfloat16)
            device = torch.device("cpu")
            cache = KVCache(specs, ops, num_blocks=60, block_size=4, device=device)
            runners.append(Runner(decoder, cache, device, rows))
        captured, plain = runners
        assert captured.programs.step.trace.recorded
        before = dict(products.replaced)
        steps = zip(steps_of(captured), steps_of(plain), strict=True)
        for step, same in list(steps)[:3]:  # a prompt, three sequences, one of them
            found = captured.execute(step).clone()
            torch.testing.assert_close(found, plain.execute(same), rtol=2.0**-5, atol=2.0**-5)
            torch.testing.assert_close(
                captured.logits([0]).clone(), plain.logits([0]), rtol=2.0**-5, atol=2.0**-5
            )
    assert card.replays >= 2 and not {"linear", "linear_split", "gate_up", "down"} & {*launched}
    assert {"linear", "logits", "experts"} == before.keys()


@pytest.mark.usefixtures("seeded")
def test_weights_that_were_drawn_anew_are_joined_anew(modules: Any) -> None:
    ops = ReferenceOps()
    weights = [torch.randn(8, 16).bfloat16() for _ in range(2)]
    prepared = ops.prepare_linear(*((weight, None) for weight in weights))
    products = modules.products.TorchProducts(ReferenceOps)
    x = torch.randn(2, 16).bfloat16()
    with products.in_place():
        before = ops.linear(x, prepared)
        weights[1].neg_()
        products.forget()
        after = ops.linear(x, prepared)
    assert torch.equal(after[:, :8], before[:, :8]) and torch.equal(after[:, 8:], -before[:, 8:])


@pytest.mark.usefixtures("quick")
def test_costs_are_rehearsed(modules: Any, stage: Any) -> None:
    here = stage("costs")
    modules.stages.run(here, lambda: modules.costs.costs(here))
    record = kept(here)
    assert record["finished"]
    alone = {each["operation"]: each for each in record["alone"]}
    beside = {"linear 64 -> 64, rows": "torch", "qwen3-30b: experts, rows": "grouped_mm"}
    for name, theirs in beside.items():
        for rows in (1, 3):
            check_comparison(alone.pop(f"{name} {rows}"), theirs)
    assert len(alone) == 2
    for name, each in alone.items():
        assert "attention" in name
        check_comparison(each, "flash")
        # torch has no other of its backends on a CPU.
        assert each["cudnn"]["failed"] and each["efficient"]["failed"]
    for what in ("decode_1", "decode_2", "decode_4", "prefill_64"):
        ours = record[f"ours_{what}"]["tokens_per_second"]
        theirs = record[f"torch_{what}"]["tokens_per_second"]
        assert record["cost"][what] == pytest.approx(theirs / ours - 1)
    assert record["ours_steps"]["replaced"] == {} and not record["ours_steps"]["recorded"]
    assert {"linear", "logits", "experts"} == record["torch_steps"]["replaced"].keys()


def check_comparison(found: dict[str, Any], theirs: str) -> None:
    assert found["fastest"] == theirs
    quotient = found["ours"]["seconds"] / found[theirs]["seconds"]
    assert found["ours_over_fastest"] == pytest.approx(quotient)


def test_the_fastest_of_those_that_compute_is_compared_with(
    modules: Any, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"ours": 6.0, "slow": 5.0, "fast": 4.0}

    def known(device: str, ways: Any, rounds: int) -> Any:
        return {name: modules.timing.Round(seconds[name], name == "slow") for name in ways}

    def refuse() -> Any:
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(modules.costs, "in_turn", known)
    ways = {name: lambda: [lambda: None] for name in seconds} | {"none": refuse}
    found = modules.costs.compared(stage("costs"), ways)
    assert found["fastest"] == "fast" and found["ours_over_fastest"] == 1.5
    assert found["none"] == {"failed": "RuntimeError: No available kernel"}
    assert found["slow"] == {"seconds": 5.0, "host_late": True}
    del ways["ours"]
    assert "ours_over_fastest" not in modules.costs.compared(stage("costs"), ways)


def test_a_model_that_fails_with_torchs_products_leaves_ours(
    modules: Any, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(stage: Any, who: str, products: Any) -> None:
        if who == "torch":
            raise ValueError("not here")
        stage.keep(ours_decode_1={"tokens_per_second": 5.0})
        modules.costs.keep_cost(stage, "decode_1")

    monkeypatch.setattr(modules.costs, "tokens_a_second", tokens)
    here = stage("costs")
    modules.costs.whole_model(here)
    assert kept(here) == {
        "ours_decode_1": {"tokens_per_second": 5.0},
        "ours_finished": True,
        "torch_failed": "ValueError: not here",
    }


def test_no_list_of_stages_takes_more_than_seven_minutes() -> None:
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    lists = re.findall(r'STAGES=(?:\$\{STAGES:-|")((?:[\w.-]+:\d+ ?)+)', script)
    assert len(lists) == 4
    for stages in lists:
        assert sum(int(each.partition(":")[2]) for each in stages.split()) <= 420, stages


@pytest.mark.exhaustive
def test_the_script_measures_operations_and_costs(tmp_path: Path) -> None:
    """A process each, as on a card."""
    stages = "environment:120 operations:200 costs:200 tiles:120"
    code, records, said = gpu(tmp_path, stages, "--device", "cpu", "--small")
    assert code == 0, said
    assert all(record["finished"] for record in records.values())
    assert not [each for each in records["operations"]["operations"] if "failed" in each]
    assert records["costs"]["cost"].keys() == {"decode_1", "decode_2", "decode_4", "prefill_64"}
