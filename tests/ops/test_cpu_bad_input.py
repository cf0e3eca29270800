"""What the kernels cannot compute is refused in words; nothing is read as what it is not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moebius.errors import ConfigError
from moebius.ops import AttentionPlan, ExpertWeights, RouterTally, Shaping, select_ops
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation, StepInputs
from ops.paged import empty_cache

OPS = CpuOps(threads=1)
X = torch.ones(3, 8)
BF16, HALF = X.bfloat16(), X.half()
LAYER = OPS.prepare_linear((torch.ones(4, 8), None))
EXPERTS = OPS.prepare_experts(
    ExpertWeights((torch.ones(2, 8),), (torch.ones(2, 8),), (torch.ones(8, 2),)), "silu"
)
IDS, WEIGHTS = torch.zeros(3, 1).long(), torch.ones(3, 1)
CACHE = empty_cache(OPS, 2, 4, 1, 4, torch.float32)
QKV, ANGLES, SLOTS = torch.ones(3, 12), torch.ones(3, 2), torch.arange(3)
TURN = Rotation(ANGLES, ANGLES)
ROUTER = RouterConfig(8, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.prepare_linear((X.T, None)), "contiguous"),
        (
            lambda: OPS.linear(torch.ones(8, 3).T, LAYER),
            r"contiguous tensors, not strides \(1, 3\) for shape \(3, 8\)",
        ),
        (lambda: OPS.rms_norm(torch.ones(8, 3).T, torch.ones(8), 0.1), "contiguous"),
        (lambda: OPS.add_gated(X, torch.ones(8, 3).T), "contiguous"),
        (lambda: OPS.route(torch.ones(8, 3).T, ROUTER), "contiguous"),
        (lambda: OPS.experts(torch.ones(8, 3).T, WEIGHTS, IDS, EXPERTS), "contiguous"),
    ],
)
def test_not_contiguous(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OPS.prepare_linear((HALF, None)),
            "compute in bfloat16 and float32, not in torch.float16",
        ),
        (
            lambda: OPS.prepare_linear((X, None), (BF16, None)),
            "one dtype, not torch.float32 and torch.bfloat16",
        ),
        (lambda: OPS.prepare_linear((X, torch.ones(3).bfloat16())), "one dtype"),
        (
            lambda: OPS.linear(BF16, LAYER),
            r"layer of 8 torch.float32 values got \(3, 8\) of torch.bfloat16",
        ),
        (lambda: OPS.linear(torch.ones(3, 9), LAYER), r"layer of 8 .* got \(3, 9\)"),
        (lambda: OPS.rms_norm(HALF, HALF[0], 0.1), "float16"),
        (lambda: OPS.rms_norm(X, BF16[0], 0.1), "one dtype"),
        (lambda: OPS.rms_norm(BF16, HALF[0], 0.1), "one dtype"),
        (
            lambda: OPS.rotate_and_store(QKV, TURN, CACHE, SLOTS, BF16[0, :4], X[0, :4]),
            "one dtype",
        ),
        (lambda: OPS.add_rms_norm(X, BF16, 1.0, X[0], 0.1), "one dtype"),
        (lambda: OPS.add_gated(BF16, X), "one dtype"),
        (
            lambda: OPS.add_gated(BF16, BF16, BF16[:, :1].contiguous()),
            "want torch.float32 here, not torch.bfloat16",
        ),
        (lambda: OPS.experts(BF16, WEIGHTS, IDS, EXPERTS), "one dtype"),
        (lambda: OPS.experts(X, WEIGHTS.double(), IDS, EXPERTS), "want torch.float32"),
        (lambda: OPS.experts(X, WEIGHTS, IDS.int(), EXPERTS), "want torch.int64"),
        (lambda: OPS.route(BF16, ROUTER), "want torch.float32"),
        (lambda: OPS.log_softmax_top_k(BF16, [0], [2]), "want torch.float32"),
        (lambda: OPS.draw(BF16, [0], [1.0], [0.5]), "want torch.float32"),
        (lambda: OPS.argmax(X.double()), "want torch.float32"),
        (lambda: OPS.rotation(SLOTS.int(), X[0], 1.0), "want torch.int64"),
        (lambda: OPS.rotate_and_store(QKV.half(), TURN, CACHE, SLOTS), "float16"),
        (
            lambda: OPS.rotate_and_store(QKV, Rotation(ANGLES, ANGLES.double()), CACHE, SLOTS),
            "want torch.float32",
        ),
        (lambda: OPS.rotate_and_store(QKV, TURN, CACHE, SLOTS.int()), "want torch.int64"),
        (lambda: OPS.rotate_and_store(QKV, TURN, CACHE, SLOTS, BF16[0, :4]), "one dtype"),
    ],
)
def test_another_dtype(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


Q = torch.ones(3, 1, 4)
TWO_HEADS = empty_cache(OPS, 2, 4, 2, 4, torch.float32)


def plan(*tables: list[int], tokens: int = 3) -> AttentionPlan:
    return OPS.plan_attention(StepInputs.build([[0]], [tokens - 1], [*tables], 4), 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: OPS.embed(IDS, X),
        lambda: OPS.prepare_linear((torch.ones(4, 8), torch.ones(3))),
        lambda: OPS.linear(torch.ones(2, 8, 4), LAYER),
        lambda: OPS.rms_norm(X, torch.ones(7), 0.1),
        lambda: OPS.add_rms_norm(X, X[:2], 1.0, X[0], 0.1),
        lambda: OPS.add_rms_norm(X, X, 1.0, torch.ones(9), 0.1),
        lambda: OPS.rms_norm_part(X.clone(), 5, torch.ones(4), 0.1),
        lambda: OPS.rms_norm_part(X.clone(), -1, torch.ones(4), 0.1),
        lambda: OPS.add_gated(X, X[:2]),
        lambda: OPS.add_gated(X, X, torch.ones(2, 1)),
        lambda: OPS.route(torch.ones(3, 7), ROUTER),
        lambda: OPS.route(X, replace(ROUTER, selection_bias=True), torch.ones(7)),
        lambda: OPS.route(X, replace(ROUTER, selection_bias=True)),
        lambda: OPS.route(X, ROUTER, None, RouterTally(torch.zeros(7).long(), torch.zeros(2))),
        lambda: OPS.experts(torch.ones(3, 7), WEIGHTS, IDS, EXPERTS),
        lambda: OPS.experts(X, WEIGHTS, IDS[:2], EXPERTS),
        lambda: OPS.experts(X, WEIGHTS[:2], IDS, EXPERTS),
        lambda: OPS.experts(X, None, IDS, EXPERTS),
        lambda: OPS.experts(X, WEIGHTS, None, EXPERTS),
        lambda: OPS.rotate_and_store(QKV[:, :11].contiguous(), TURN, CACHE, SLOTS),
        lambda: OPS.rotate_and_store(QKV[:, :4].contiguous(), TURN, CACHE, SLOTS),
        lambda: OPS.rotate_and_store(QKV, Rotation(QKV[:, :3].contiguous(), ANGLES), CACHE, SLOTS),
        lambda: OPS.rotate_and_store(QKV, Rotation(ANGLES, ANGLES[:2]), CACHE, SLOTS),
        lambda: OPS.rotate_and_store(QKV, TURN, CACHE, SLOTS[:2]),
        lambda: OPS.rotate_and_store(QKV, TURN, CACHE, SLOTS, torch.ones(3)),
        lambda: OPS.rotate_and_store(QKV.bfloat16(), TURN, CACHE, SLOTS),
        lambda: OPS.paged_attention(torch.ones(1, 1, 5), CACHE, plan([0]), 1.0),
        lambda: OPS.paged_attention(torch.ones(2, 1, 4), CACHE, plan([0]), 1.0),
        lambda: OPS.paged_attention(Q[:1], CACHE, plan([0]), 1.0, None, torch.ones(2)),
        lambda: OPS.paged_attention(Q[:1].bfloat16(), CACHE, plan([0]), 1.0),
        lambda: OPS.paged_attention(torch.ones(1, 3, 4), TWO_HEADS, plan([0]), 1.0),
    ],
)
def test_another_shape(call: Callable[[], object]) -> None:
    """What lies behind an array's end would be read, or written to."""
    with pytest.raises(ValueError):
        call()


def test_a_sequence_without_blocks_for_all_of_its_tokens() -> None:
    step = StepInputs.build([[0]], [4], [[0, 1]], 4)
    del step.block_table_host[1:]
    step.max_blocks = 1
    with pytest.raises(ValueError, match="5 tokens, 1 of them new, in 1 blocks of 4"):
        OPS.plan_attention(step, 4)
    with pytest.raises(ValueError, match="planned for blocks of 8 tokens, not 4"):
        OPS.paged_attention(Q[:1], CACHE, OPS.plan_attention(step, 8), 1.0)


def test_slots_and_blocks_that_the_cache_has_not() -> None:
    for slot in (-1, 8):
        with pytest.raises(IndexError, match=f"slot {slot} is none of 8"):
            OPS.rotate_and_store(QKV, TURN, CACHE, torch.tensor([0, slot, 1]))
    with pytest.raises(IndexError, match="block 2 is none of 2"):
        OPS.paged_attention(Q[:1], CACHE, plan([0, 2], tokens=5), 1.0)


@pytest.mark.parametrize("kind", range(6))
def test_experts_of_unequal_sizes(kind: int) -> None:
    """More of one kind than of the others, or one that is smaller than the rest."""
    shapes = ((2, 8), (2, 8), (8, 2), (2,), (2,), (8,))
    kinds = [[torch.ones(shape)] * 2 for shape in shapes]
    OPS.prepare_experts(ExpertWeights(*kinds), "silu")
    for wrong in ([torch.ones(shapes[kind])], [torch.ones(shapes[kind])[1:].clone()] * 2):
        with pytest.raises(ValueError):
            OPS.prepare_experts(ExpertWeights(*kinds[:kind], wrong, *kinds[kind + 1 :]), "silu")


def test_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 8))
    parameters = ExpertWeights((weight,), (weight,), (torch.ones(8, 4),))
    for call in (
        lambda: OPS.prepare_linear((weight, None)),
        lambda: OPS.prepare_experts(parameters, "silu"),
    ):
        with pytest.raises(ValueError, match="compute no gradients; train with ReferenceOps"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "amx-int8", "reference "])
def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("MOEBIUS_CPU_ISA", isa)
    with pytest.raises(
        ConfigError,
        match=rf"MOEBIUS_CPU_ISA={isa}: unknown .*; here there are: portable.*, reference",
    ):
        select_ops("cpu", torch.float32)


def test_the_instruction_set_and_the_threads_are_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOEBIUS_CPU_ISA", "portable")
    assert select_ops("cpu", torch.float32, 3).name == "cpu-portable"
    monkeypatch.setenv("MOEBIUS_CPU_ISA", "reference")
    assert select_ops("cpu", torch.float32).name == "reference"
    monkeypatch.delenv("MOEBIUS_CPU_ISA")
    assert select_ops("cpu", torch.float32).name.startswith("cpu-")


def test_without_the_compiled_module_plain_pytorch_serves_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MOEBIUS_CPU_ISA", raising=False)
    monkeypatch.setitem(sys.modules, "moebius.ops.cpu", None)  # what an import that fails leaves
    assert select_ops("cpu", torch.bfloat16).name == "reference"
    assert "apt install g++" in caplog.text and "batch invariant" in caplog.text


def test_ids_out_of_range() -> None:
    """They would be read as addresses otherwise."""
    with pytest.raises(IndexError, match="token id 3 is none of 3"):
        OPS.embed(torch.tensor([0, 3]), X)
    with pytest.raises(IndexError, match="token id -1 is none of 3"):
        OPS.embed(torch.tensor([-1]), X)
    with pytest.raises(IndexError, match="expert id 1 is none of 1"):
        OPS.experts(X, WEIGHTS, IDS + 1, EXPERTS)
    for call in (
        lambda row: OPS.argmax(X, [0, row]),
        lambda row: OPS.draw(X, [row], [1.0], [0.5]),
        lambda row: OPS.log_softmax_top_k(X, [row], [1]),
        lambda row: OPS.ranks(X, [row], torch.tensor([0])),
    ):
        for row in (-1, 3):
            with pytest.raises(IndexError, match=f"row {row} is none of 3"):
                call(row)
    with pytest.raises(IndexError, match="token id 8 is none of 8"):
        OPS.ranks(X, [0], torch.tensor([8]))


@pytest.mark.parametrize("field", ["bias", "seen", "drawn", "banned"])
@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
def test_a_shaping_of_an_id_out_of_range_changes_nothing(ops: ReferenceOps, field: str) -> None:
    fine = Shaping({1: 2.0}, (1,), (2,), 1.5, 0.5, 0.5, (3,))
    logits = torch.randn(3, 8)
    before = logits.clone()
    for bad in (-1, 8):
        wrong = fine._replace(**{field: {bad: 1.0} if field == "bias" else (bad,)})
        with pytest.raises(IndexError), ops.shaped(logits, [0, 1], [fine, wrong]):
            pytest.fail("shaped")
        assert torch.equal(logits, before)


def test_fewer_candidates_than_none() -> None:
    """The next row's would be written before the first's."""
    with pytest.raises(ValueError, match="-1 candidates of 8"):
        OPS.log_softmax_top_k(X, [0, 1], [-1, 3])


def test_as_many_parameters_as_rows() -> None:
    for call in (
        lambda: OPS.draw(X, [0, 1], [1.0], [0.5, 0.5]),
        lambda: OPS.draw(X, [0, 1], [1.0, 1.0], [0.5]),
        lambda: OPS.log_softmax_top_k(X, [0, 1], [1]),
        lambda: OPS.log_softmax_top_k(X, [0, 1], [1, 1], [1.0]),
        lambda: OPS.ranks(X, [0, 1], torch.tensor([1])),
    ):
        with pytest.raises(ValueError, match="1 parameter for 2 rows"):
            call()
