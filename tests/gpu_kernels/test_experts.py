"""Experts in Triton beside plain PyTorch, from weights as they are stored."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from gpu_kernels.test_linear import CODES, random_weight
from moebius.ops import ExpertWeights, Operation, Use, Weight
from moebius.ops.capability import Feature
from moebius.ops.config import Activation, ClampedSwiGLU
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.experts import ReferenceExperts
from moebius.ops.triton import TritonOps
from moebius.ops.triton.experts import TritonExperts
from moebius.ops.triton.kernels import experts as kernels

pytestmark = pytest.mark.usefixtures("seeded")

OPS = TritonOps()
REF = ReferenceOps()
E, K, F, D = 4, 2, 37, 70


def some(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    return [(torch.randn(shape) / shape[-1] ** 0.5).to(DEVICE, dtype) for _ in range(E)]


def random_experts(dtype: torch.dtype, *, up: bool = True, bias: bool = False) -> ExpertWeights:
    biases: tuple[Sequence[Tensor], ...] = ()
    if bias:
        biases = (some(dtype, F), some(dtype, F) if up else (), some(dtype, D))
    ups = some(dtype, F, D) if up else ()
    return ExpertWeights(some(dtype, F, D), ups, some(dtype, D, F), *biases)


def only(weights: ExpertWeights, held: set[int]) -> ExpertWeights:
    """The same experts with holes for all that are not held."""
    return ExpertWeights(
        *([x if e in held else None for e, x in enumerate(kind)] for kind in weights)
    )


def random_rows(rows: int, dtype: torch.dtype, size: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the weights of their choices, and experts, all different."""
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(rows)]) if rows else torch.empty(0, K)
    x = torch.randn(rows, size).to(DEVICE, dtype)
    return x, torch.rand(rows, K).to(DEVICE), ids.long().to(DEVICE)


def near(found: Tensor, wanted: Tensor) -> None:
    """Numbers of about 1, rounded where both round, whose sums have another order."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    tolerance = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-17}[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def prepared(weights: ExpertWeights, activation: Activation, dtype: torch.dtype) -> TritonExperts:
    found = OPS.prepare_experts(weights, activation, dtype)
    assert isinstance(found, TritonExperts) and found.is_of(weights)
    return found


CASES: dict[str, tuple[Activation, bool, bool, torch.dtype]] = {
    "silu": ("silu", True, False, torch.bfloat16),
    "gelu": ("gelu", True, True, torch.float32),
    "gelu_tanh": ("gelu_tanh", True, False, torch.float32),
    "relu alone": ("relu", False, True, torch.bfloat16),
    "relu_squared": ("relu_squared", False, False, torch.float32),
    "gpt-oss": (ClampedSwiGLU(limit=0.8), True, True, torch.bfloat16),
    "gpt-oss in float32": (ClampedSwiGLU(), True, True, torch.float32),
}


@pytest.mark.parametrize(("activation", "up", "bias", "dtype"), CASES.values(), ids=CASES)
def test_a_feed_forward(activation: Activation, up: bool, bias: bool, dtype: torch.dtype) -> None:
    """Of rows' chosen experts, one of which nobody chose; and of one expert for all rows."""
    weights = random_experts(dtype, up=up, bias=bias)
    x, share, ids = random_rows(5, dtype)
    ids[ids == 1] = 3
    ours = prepared(weights, activation, dtype)
    theirs = REF.prepare_experts(weights, activation, dtype)
    near(OPS.experts(x, share, ids, ours), REF.experts(x, share, ids, theirs))
    near(OPS.experts(x, None, None, ours), REF.experts(x, None, None, theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_more_rows_than_a_tile_and_a_row_alone(dtype: torch.dtype) -> None:
    """A row has the same bits alone, and so has its sum."""
    weights = random_experts(dtype)
    ours = prepared(weights, "silu", dtype)
    x, share, ids = random_rows(67, dtype)
    ids[:66] = torch.tensor([2, 0])
    whole = OPS.expert_rows(x, ids, ours)
    near(whole, REF.expert_rows(x, ids, REF.prepare_experts(weights, "silu", dtype)))
    for row in (0, 65):
        at = slice(row, row + 1)
        assert torch.equal(OPS.expert_rows(x[at], ids[at], ours)[0], whole[row])
    summed = OPS.combine(whole[60:], share[60:])
    near(summed, REF.combine(whole[60:], share[60:]))
    assert torch.equal(OPS.experts(x[at], share[at], ids[at], ours)[0], summed[5])


@pytest.mark.parametrize(
    ("inner", "outer", "hidden", "width"),
    [("q8_0", "q4_k", 32, 256), ("mxfp4_planes", "fp8[16x32,bfloat16]", 96, 32)],
)
def test_codes(inner: str, outer: str, hidden: int, width: int) -> None:
    def each(name: str, rows: int, columns: int) -> list[Weight]:
        return [random_weight(name, rows, columns) for _ in range(E)]

    weights = ExpertWeights(
        each(inner, width, hidden), each(inner, width, hidden), each(outer, hidden, width)
    )
    x, share, ids = random_rows(1, torch.float32, hidden)
    found = OPS.experts(x, share, ids, prepared(weights, "silu", torch.float32))
    wanted = REF.experts(x, share, ids, REF.prepare_experts(weights, "silu"))
    most = wanted.abs().max()
    torch.testing.assert_close(found / most, wanted / most, rtol=0, atol=1e-5)


def test_rows_of_gate_and_up_in_turn() -> None:
    """As gpt-oss stores them: views that no one copies."""
    both = [torch.randn(2 * F, D, device=DEVICE) / D**0.5 for _ in range(E)]
    weights = ExpertWeights(
        [x[::2] for x in both], [x[1::2] for x in both], some(torch.float32, D, F)
    )
    x, share, ids = random_rows(3, torch.float32)
    found = OPS.experts(x, share, ids, prepared(weights, "silu", torch.float32))
    near(found, REF.experts(x, share, ids, REF.prepare_experts(weights, "silu")))


def test_ids_that_name_nothing_here() -> None:
    weights = random_experts(torch.float32)
    ours = prepared(only(weights, {1, 2}), "silu", torch.float32)
    x, share, _ = random_rows(3, torch.float32)
    nowhere = torch.full((3, K), E, device=DEVICE)
    assert OPS.expert_rows(x, nowhere, ours).shape == (3, K, D)
    some_here = nowhere.clone()
    some_here[1, 0] = 2
    found = OPS.expert_rows(x, some_here, ours)[1, 0]
    whole = REF.expert_rows(x, some_here, REF.prepare_experts(weights, "silu"))[1, 0]
    near(found, whole)
    for wrong, words in (
        (0, "expert 0 is not held here"),
        (-1, f"expert id -1 is none of {E}"),
        (E + 1, f"expert id {E + 1} is none of {E}"),
    ):
        ids = torch.full((3, K), 1, device=DEVICE)
        ids[2, 1] = wrong
        for call in (
            lambda ids=ids: OPS.expert_rows(x, ids, ours),
            lambda ids=ids: OPS.experts(x, share, ids, ours),
        ):
            with pytest.raises(IndexError, match=words):
                call()
    with pytest.raises(IndexError, match=f"expert id {E} is none of {E}"):
        OPS.experts(x, share, some_here.clamp(min=1), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_rows(dtype: torch.dtype) -> None:
    ours = prepared(random_experts(dtype), "silu", dtype)
    x, share, ids = random_rows(0, dtype)
    assert OPS.experts(x, share, ids, ours).shape == (0, D)
    assert OPS.expert_rows(x, ids, ours).shape == (0, K, D)
    assert OPS.experts(x, None, None, ours).shape == (0, D)
    assert OPS.combine(x.view(0, 1, D), share[:, :1]).shape == (0, D)


def test_what_plain_pytorch_computes_and_what_is_refused() -> None:
    other = [random_weight("q5_k", 256, 256) for _ in range(E)]
    weights = ExpertWeights(other, other, other)
    plain = OPS.prepare_experts(weights, "silu", torch.float32)
    assert isinstance(plain, ReferenceExperts)
    x, share, ids = random_rows(2, torch.float32, 256)
    assert torch.equal(OPS.experts(x, share, ids, plain), REF.experts(x, share, ids, plain))
    mixed = random_experts(torch.float32, bias=True)._replace(up_bias_F=())
    assert isinstance(OPS.prepare_experts(mixed, "silu"), ReferenceExperts)
    weights = random_experts(torch.float32)
    with pytest.raises(ValueError, match="needs at least one"):
        OPS.prepare_experts(only(weights, set()), "silu")
    with pytest.raises(ValueError, match="joins two matrices"):
        OPS.prepare_experts(random_experts(torch.float32, up=False), ClampedSwiGLU())
    with pytest.raises(ValueError, match=r"is \(70, 37\), not \(37, 70\)"):
        OPS.prepare_experts(weights._replace(up_FD=weights.down_DF), "silu")
    with pytest.raises(ValueError, match="rows for experts have 70 numbers"):
        OPS.experts(x, None, None, prepared(weights, "silu", torch.float32))


def test_what_is_ours_is_said() -> None:
    two = frozenset({Feature.TWO_MATRICES})
    ours = (
        Use(Operation.EMBED, torch.bfloat16),
        Use(Operation.LINEAR, torch.float32),
        Use(Operation.LOGITS, torch.float32),
        Use(Operation.ROUTE, torch.float32),
        Use(Operation.EXPERTS, torch.bfloat16, two),
        Use(Operation.EXPERT_ROWS, torch.bfloat16),
        Use(Operation.COMBINE, torch.bfloat16),
    )
    for use in (*ours, Use(Operation.LINEAR, torch.float64)):
        found = OPS.capability(use)
        assert found is not None and not found.batch_invariant
        assert found.by == ("triton" if use in ours else "reference")


def plain_or_codes(name: str, dtype: torch.dtype, rows: int, columns: int) -> list[Weight]:
    """The same for each expert."""
    if name == "plain":
        return [torch.zeros(rows, columns, dtype=dtype)] * E
    return [random_weight(name, rows, columns)] * E


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("plain", *CODES)),
        *((name, torch.bfloat16) for name in ("plain", "mxfp4_planes", "q6_k")),
        *((name, torch.float16) for name in ("plain", "q8_0")),
    ],
    ids=str,
)
def test_all_formats_compile(name: str, dtype: torch.dtype) -> None:
    biases = [[torch.zeros(size, dtype=dtype)] * E for size in (512, 512, 1024)]
    inner = plain_or_codes(name, dtype, 512, 1024)
    weights = ExpertWeights(inner, inner, plain_or_codes(name, dtype, 1024, 512), *biases)
    x, share, ids = random_rows(64, dtype, 1024)
    with launches() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr("moebius.ops.triton.experts._require_held", lambda *_, **__: None)
        OPS.experts(x, share, ids, prepared(weights, ClampedSwiGLU(), dtype))
        if name == "plain" and dtype != torch.float32:
            for activation in ("gelu", "gelu_tanh", "relu_squared", "silu"):
                OPS.experts(x, share, ids, prepared(weights, activation, dtype))
            OPS.experts(x, None, None, prepared(weights, "silu", dtype))
    assert_compile(seen, kernels)
