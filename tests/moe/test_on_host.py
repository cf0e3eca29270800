"""Experts in the host's memory beside a device's, which is stood in for by another backend on the
CPU, against a loop over pairs and against either backend alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe.test_layer import naive
from moebius.errors import ConfigError
from moebius.moe.config import FeedForwardConfig
from moebius.moe.crossing import CrossingRows, OneMemory, TwoMemories, crossing
from moebius.moe.dispatch import LocalDispatcher
from moebius.moe.layer import FeedForward
from moebius.moe.on_host import HostExperts
from moebius.nn.spec import Place
from moebius.ops import Ops
from moebius.ops.config import ClampedSwiGLU, RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps

D = 16
E = 6
BF16 = torch.bfloat16
F32 = torch.float32
PLAIN = FeedForwardConfig(10, RouterConfig(E, 3, weight="renorm"), shared_width=6)
CONFIGS = {
    "plain": PLAIN,
    "biases": FeedForwardConfig(10, RouterConfig(E, 2), ClampedSwiGLU(), bias=True),
    "two matrices": FeedForwardConfig(10, RouterConfig(E, 2), "relu_squared", gated=False),
}


def part(
    config: FeedForwardConfig,
    device: Ops,
    host: Ops | None = None,
    on_host: Sequence[int] = (),
    dtype: torch.dtype = F32,
) -> FeedForward:
    """A layer with these of its experts on the host, and the same random weights each time."""
    place = Place(device, D, 1e-6, dtype)
    dispatch = LocalDispatcher()
    if host is not None:
        most = CrossingRows(64, config.router.top_k, D, dtype)
        dispatch = HostExperts(host, {0: on_host}, {0: E}, most).dispatcher(device, 0)
    built = FeedForward(config, place, dispatch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return built.requires_grad_(False)


def rows(count: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(autouse=True)
def _serving() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("on_host", [[1, 4], [0, 1, 2, 3, 4], range(E)], ids=str)
@pytest.mark.parametrize("device", [ReferenceOps(), CpuOps(2)], ids=["reference", "cpu"])
def test_a_layer_equals_the_loop_over_its_pairs(device: Ops, on_host: Sequence[int]) -> None:
    made = part(PLAIN, device, CpuOps(1), on_host)
    x_TD = rows(13)
    torch.testing.assert_close(made(x_TD)[0], naive(made, x_TD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_each_pair_is_computed_as_alone_by_whoever_has_its_expert(
    name: str, dtype: torch.dtype
) -> None:
    """To the bit, and summed in routing order, in float32, rounded once."""
    config = CONFIGS[name]
    device = CpuOps(2)
    host = CpuOps(1, isa="portable")
    on_host = (1, 2, 5)
    mixed = part(config, device, host, on_host, dtype)
    alone = {ops: part(config, ops, dtype=dtype).experts for ops in (device, host)}
    x_TD = rows(29, dtype)
    out_TD, routing = mixed(x_TD)
    for t, (ids, weights) in enumerate(
        zip(routing.expert_ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    ):
        total = torch.zeros(D)
        for e, weight in zip(ids, weights, strict=True):
            ops = host if e in on_host else device
            row = alone[ops].rows(x_TD[t : t + 1], torch.tensor([[e]]))[0, 0]
            total = torch.addcmul(total, row.float(), torch.tensor(weight))
        expected = total.to(dtype)
        if mixed.shared is not None:
            expected = device.add_gated(expected[None], mixed.shared(x_TD[t : t + 1]))[0]
        assert torch.equal(out_TD[t], expected), (t, ids)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_all_on_one_side_is_that_sides_own_answer(name: str, dtype: torch.dtype) -> None:
    """The two sides' kernels have other bits, so that a layer computed by the wrong one shows."""
    config = CONFIGS[name]
    device = CpuOps(2)
    host = CpuOps(1, isa="portable")
    x_TD = rows(40, dtype)
    routing = part(config, device, dtype=dtype)(x_TD)[1]
    assert routing is not None

    def routed(ops: Ops) -> Tensor:
        experts = part(config, ops, dtype=dtype).experts
        return experts(x_TD, routing.weights_TK, routing.expert_ids_TK)

    def beside(on_host: Sequence[int]) -> Tensor:
        made = part(config, device, host, on_host, dtype)
        return made.dispatch(x_TD, routing, made.experts)

    assert torch.equal(beside(()), routed(device))
    assert torch.equal(beside(range(E)), routed(host))
    if dtype == F32:
        assert not torch.equal(routed(host), routed(device))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    made = part(PLAIN, CpuOps(2), CpuOps(2), (0, 3, 4), BF16)
    x_TD = rows(40, BF16)
    together = made(x_TD)[0]
    for size in (1, 7):
        split = torch.cat([made(some)[0] for some in x_TD.split(size)])
        assert torch.equal(together, split)


def test_no_rows() -> None:
    for on_host in ((2,), range(E)):
        assert part(PLAIN, CpuOps(1), CpuOps(1), on_host)(rows(0))[0].shape == (0, D)


class Watched(OneMemory):
    """Notes what crosses."""

    def __init__(self) -> None:
        self.calls = 0
        self.there: list[int] = []
        self.back: list[int] = []

    def rows(self, tokens_R: Tensor) -> Tensor:
        self.calls += 1
        self.there += tokens_R.tolist()
        return super().rows(tokens_R)

    def give(self, answers_PD: Tensor, places_P: Tensor, out: Tensor) -> None:
        self.calls += 1
        self.back += places_P.tolist()
        super().give(answers_PD, places_P, out)


def test_what_the_host_computes_crosses_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's row once, however many of its choices are the host's, and an answer for each of
    these."""
    way = Watched()
    monkeypatch.setattr("moebius.moe.on_host.crossing", lambda *_: way)
    on_host = (1, 5)
    made = part(PLAIN, CpuOps(1), CpuOps(1), on_host)
    x_TD = rows(30)
    ids = made(x_TD)[1].expert_ids_TK.tolist()
    chosen = [[e in on_host for e in row] for row in ids]
    assert way.there == [t for t, row in enumerate(chosen) if any(row)]
    assert way.back == [t * 3 + k for t, row in enumerate(chosen) for k in range(3) if row[k]]
    assert 0 < len(way.there) < len(way.back) < 90
    way.there.clear()
    way.back.clear()
    without = x_TD[[not any(row) for row in chosen]]
    assert len(without)
    made(without)
    assert (way.there, way.back, way.calls) == ([], [], 2)


def test_other_weights_are_noticed() -> None:
    made = part(PLAIN, CpuOps(1), CpuOps(1), (0, 2))
    x_TD = rows(9)
    before = made(x_TD)[0]
    for e in (0, 1):
        weight = torch.zeros_like(made.experts.down_proj[e])
        made.experts.down_proj.register_parameter(str(e), torch.nn.Parameter(weight, False))
    after = made(x_TD)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, naive(made, x_TD), rtol=1e-4, atol=1e-5)


def test_placements_that_are_none() -> None:
    most = CrossingRows(1, 1, D, F32)
    with pytest.raises(ConfigError, match=r"expert 6 of layer 0 .* the layer has 6 experts"):
        HostExperts(ReferenceOps(), {0: [6]}, {0: E}, most)
    with pytest.raises(ConfigError, match=r"expert 0 of layer 1 .* the layer has 0 experts"):
        HostExperts(ReferenceOps(), {1: [0]}, {0: E}, most)
    with pytest.raises(ConfigError, match=r"layers have \{0: 7\} experts, but \{0: 6\} were"):
        HostExperts(ReferenceOps(), {}, {0: E}, most).require({0: 7})


class LateDevice(TorchFunctionMode):
    """A device's streams: what is copied without waiting arrives when somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.main: list[Callable[[], object]] = []
        self.side: list[Callable[[], object]] = []
        self.current = self.main

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.copy_ and kwargs:
            self.current.append(partial(func, *args))
            return args[0]
        return func(*args, **(kwargs or {}))

    def finish(self, queue: list[Callable[[], object]], count: int) -> None:
        for _ in range(count):
            queue.pop(0)()


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.behind = len(self.device.main)

    def synchronize(self) -> None:
        self.device.finish(self.device.main, self.behind)


class LateStream:
    def __init__(self, device: LateDevice) -> None:
        self.device = device

    def synchronize(self) -> None:
        self.device.finish(self.device.side, len(self.device.side))

    def __enter__(self) -> None:
        self.device.current = self.device.side

    def __exit__(self, *_: object) -> None:
        self.device.current = self.device.main


def test_rows_cross_by_buffers_of_the_size_that_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a card: its streams are stood in for. What arrives is right behind the waits and is
    not there before them, and what the device computes meanwhile is not waited for."""
    device = LateDevice()
    monkeypatch.setattr(torch, "Stream", lambda _: LateStream(device))
    monkeypatch.setattr(torch, "Event", lambda _: LateEvent(device))
    made: list[int] = []

    def pinned(nbytes: int) -> Tensor:
        made.append(nbytes)
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    monkeypatch.setattr(TwoMemories, "_pinned", staticmethod(pinned))
    most = CrossingRows(8, 3, D, BF16)
    way = TwoMemories(torch.device("cpu"), most)
    # 8 rows and 24 answers of 16 bfloat16; ids and places of 24 answers, numbers of 8 tokens.
    assert sum(made) == most.nbytes == (8 + 24) * 16 * 2 + (24 + 24 + 8) * 8
    for count in (8, 5, 0):
        x_TD = rows(count, BF16)
        ids_TK = torch.arange(3 * count).view(count, 3)
        out = torch.zeros(3 * count, D, dtype=BF16)
        with device:
            way.begin(ids_TK, x_TD)
            assert (way._ids == 255).all()
            device.main.append(lambda: pytest.fail("the device's own experts were waited for"))
            found = way.ids(ids_TK)
            wanted = way.rows(torch.arange(0, count, 2))
            way.give(x_TD, torch.arange(count) * 3 + 1, out)
        assert torch.equal(found, ids_TK)
        assert torch.equal(wanted, x_TD[::2])
        assert torch.equal(out[1::3], x_TD) and not out[::3].any() and not out[2::3].any()
        device.main.clear()
        way._ids.fill_(255)


def test_one_memory_needs_no_buffers() -> None:
    assert isinstance(crossing(torch.device("cpu"), CrossingRows(1, 1, D, F32)), OneMemory)
