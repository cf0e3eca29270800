"""gpt-oss's nonlinearity in feed-forwards of every format, dense and routed, with biases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.moe.config import FeedForwardConfig
from moebius.ops import ExpertWeights, Weight
from moebius.ops.config import ClampedSwiGLU
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from ops.formats.blocks import random_matrix
from ops.levels import LEVELS, bits, level
from ops.quantised_products import DTYPES

REF = ReferenceOps()
# Limits that half of the values are beyond, on either side.
ACTIVATION = ClampedSwiGLU(1.702, 0.6)
COUNT, SIZE = 4, 256

pytestmark = pytest.mark.usefixtures("seeded")


def joined(gate: Tensor, up: Tensor) -> Tensor:
    """In float64, as the paper's code has it."""
    g = torch.where(gate > 0.6, 0.6, gate.double())
    u = torch.where(up > 0.6, 0.6, torch.where(up < -0.6, -0.6, up.double()))
    return (u + 1) * (g / (1 + torch.exp(-1.702 * g)))


def weights(name: str, dtype: torch.dtype) -> ExpertWeights:
    def matrix() -> Weight:
        if name == "plain":
            return (torch.randn(SIZE, SIZE) / SIZE**0.5).to(dtype)
        return random_matrix(name, SIZE, SIZE, 0.01)

    kinds = [[matrix() for _ in range(COUNT)] for _ in range(3)]
    biases = [[torch.randn(SIZE).to(dtype) / 2 for _ in range(COUNT)] for _ in range(3)]
    return ExpertWeights(*kinds, *biases)


def logits(ops: CpuOps, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    return ops.logits(x, ops.prepare_linear((weight, bias), dtype=x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "mxfp4", "q4_k", "q8_0"])
@pytest.mark.parametrize("isa", LEVELS)
def test_experts_are_their_layers_joined(isa: str, name: str, dtype: torch.dtype) -> None:
    """What is joined are the sums of the layers, whose bits other tests hold, one row and many."""
    ops = level(isa, 2)
    w = weights(name, dtype)
    x = torch.randn(70, SIZE)
    x = (x / logits(ops, x, w.gate_FD[0], None).std()).to(dtype)
    ids = torch.arange(70).view(-1, 1) % COUNT
    experts = ops.prepare_experts(w, ACTIVATION, dtype)
    found = ops.experts(x, torch.ones(70, 1), ids, experts)
    inner = torch.empty(70, SIZE, dtype=torch.float64)
    wanted = torch.empty(70, SIZE, dtype=dtype)
    beyond = 0.0
    for e in range(COUNT):
        own = x[e::COUNT].contiguous()
        gate = logits(ops, own, w.gate_FD[e], w.gate_bias_F[e])
        up = logits(ops, own, w.up_FD[e], w.up_bias_F[e])
        beyond += ((gate > 0.6) | (up.abs() > 0.6)).float().mean().item() / COUNT
        inner[e::COUNT] = joined(gate, up)
        down = ops.prepare_linear((w.down_DF[e], w.down_bias_D[e]), dtype=dtype)
        wanted[e::COUNT] = ops.linear(inner[e::COUNT].to(dtype), down)
    assert 0.2 < beyond < 0.95
    # A joined value in a million is rounded to the neighbour, or has another code of 8 bits.
    scale = wanted.float().abs().mean()
    assert (found.float() - wanted.float()).abs().max() < 0.02 * scale + 0.01 * (dtype != DTYPES[0])
    for row in (0, 33):
        one = ops.experts(x[row : row + 1], torch.ones(1, 1), ids[row : row + 1], experts)
        assert torch.equal(bits(one), bits(found[row : row + 1]))
    dense = ExpertWeights(*(kind[:1] for kind in w))
    alone = ops.experts(x, None, None, ops.prepare_experts(dense, ACTIVATION, dtype))
    assert torch.equal(bits(alone[::COUNT]), bits(found[::COUNT]))


def test_the_reference_joins_number_by_number() -> None:
    w = ExpertWeights(*([torch.eye(8)] for _ in range(2)), [torch.eye(8)])
    x = 2 * torch.randn(5, 8)
    out = REF.experts(x, None, None, REF.prepare_experts(w, ACTIVATION))
    torch.testing.assert_close(out.double(), joined(x, x), rtol=1e-5, atol=1e-6)


def test_what_is_no_number_stays_so(ops: CpuOps) -> None:
    """Clamping hides no broken model."""
    layer = ExpertWeights([torch.ones(1, 1)], [torch.ones(1, 1)], [torch.ones(1, 1)])
    prepared = ops.prepare_experts(layer, ACTIVATION)
    out = ops.experts(torch.tensor([[torch.nan], [1e30]]), None, None, prepared)
    assert out.isnan().flatten().tolist() == [True, False]
    assert out[1].item() == pytest.approx(1.6 * 0.6 / (1 + math.exp(-1.702 * 0.6)), rel=1e-5)


def test_it_joins_two_matrices() -> None:
    with pytest.raises(ConfigError, match="ClampedSwiGLU joins two matrices"):
        FeedForwardConfig(8, activation=ClampedSwiGLU(), gated=False)
    gates = ExpertWeights([torch.eye(3)], (), [torch.eye(3)])
    for ops in (REF, CpuOps(1)):
        with pytest.raises(ValueError, match="ClampedSwiGLU joins two matrices"):
            ops.prepare_experts(gates, ClampedSwiGLU())


@pytest.mark.parametrize("numbers", [(0.0, 7.0), (1.7, -1.0), (1.7, float("inf"))])
def test_numbers_that_make_no_sense(numbers: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="it must be positive"):
        ClampedSwiGLU(*numbers)
