"""The block types of GGUF against gguf-py, bit for bit; and plain PyTorch computing with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from moebius.ops import ExpertWeights, Matrix
from moebius.ops.reference import LOGITS_ROWS, ReferenceOps
from ops.formats.blocks import BLOCKS, HALVES_AT, random_blocks, random_matrix, with_halves
from ops.levels import ROUNDOFF, assert_within

REFERENCE = ReferenceOps()

pytestmark = pytest.mark.usefixtures("seeded")


def gguf_type(name: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[name.upper()]


def theirs(name: str, rows_RY: Tensor) -> Tensor:
    """What gguf-py makes of rows of blocks."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.dequantize(rows_RY.numpy(), gguf_type(name)))


def assert_same_bits(name: str, rows_RY: Tensor) -> None:
    exact = theirs(name, rows_RY)
    found = BLOCKS[name].widened((rows_RY,), torch.float32)
    assert found.shape == exact.shape
    no_numbers = exact.isnan()
    assert torch.equal(found.isnan(), no_numbers)
    assert torch.equal(found.view(torch.int32)[~no_numbers], exact.view(torch.int32)[~no_numbers])


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_are_ggufs(name: str) -> None:
    format = BLOCKS[name]
    assert (format.elements, format.nbytes) == GGML_QUANT_SIZES[gguf_type(name)]
    assert format.planes(3, 512) == ((torch.uint8, (3, 512 // format.elements * format.nbytes)),)
    with pytest.raises(ValueError, match=rf"rows of 520 .* blocks of {name}, which hold"):
        format.planes(3, 520)


@pytest.mark.parametrize("name", BLOCKS)
def test_any_bytes_have_gguf_pys_bits(name: str) -> None:
    """Scales that are no numbers among them, in rows of several blocks."""
    assert_same_bits(name, random_blocks(name, 60 * 5).view(60, -1))


@pytest.mark.parametrize("name", BLOCKS)
def test_extreme_scales_have_gguf_pys_bits(name: str) -> None:
    """Zeros of both signs, subnormal and largest numbers, infinities; all exponents of MXFP4."""
    if not HALVES_AT[name]:
        blocks = random_blocks(name, 256)
        blocks[:, 0] = torch.arange(256)
        assert_same_bits(name, blocks)
        return
    extreme = torch.tensor([0.0, -0.0, 2.0**-24, -(2.0**-24), 1e-6, 65504.0, -65504.0, 1.0])
    extreme = torch.cat((extreme, torch.tensor([torch.inf, -torch.inf, torch.nan])))
    pairs = torch.cartesian_prod(extreme, extreme).T
    assert_same_bits(name, with_halves(name, random_blocks(name, pairs.shape[1]), pairs))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_value_of_every_byte_has_gguf_pys_bits(name: str) -> None:
    """So every code, integer scale and minimum: one byte of a block at a time takes all values."""
    nbytes = BLOCKS[name].nbytes
    blocks = random_blocks(name, 1).repeat(nbytes * 256, 1)
    with_halves(name, blocks, torch.tensor([0.37, -1.25]).view(2, 1).expand(2, len(blocks)))
    at = torch.arange(nbytes).repeat_interleave(256)
    blocks[torch.arange(len(blocks)), at] = torch.arange(256, dtype=torch.uint8).repeat(nbytes)
    assert_same_bits(name, blocks)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_called_exact_is(name: str) -> None:
    """Scale times integers, in float64, over all that a block may hold; and bfloat16 for MXFP4."""
    format = BLOCKS[name]
    assert format.exact_in(torch.float32) == (name not in {"q4_1", "q5_1", "q2_k", "q4_k", "q5_k"})
    assert format.exact_in(torch.bfloat16) == (name == "mxfp4")
    if not format.exact_in(torch.float32):
        return
    blocks = random_blocks(name, 4000)
    with_halves(name, blocks, torch.randn(2, 4000))
    numbers = format.widened((blocks,), torch.float32).double()
    units = with_halves(name, blocks.clone(), torch.ones(2, 4000))
    if HALVES_AT[name]:
        at = HALVES_AT[name][0]
        scales = blocks[:, at : at + 2].clone().view(torch.float16).double()
        assert torch.equal(numbers, scales * format.widened((units,), torch.float32).double())
    else:
        finite = numbers.isfinite()
        assert torch.equal(numbers.to(torch.bfloat16).double()[finite], numbers[finite])


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_are_rounded_once(name: str) -> None:
    matrix = random_matrix(name, 7, 512)
    exact = theirs(name, matrix.planes[0])
    ids = torch.tensor([6, 0, 0])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(matrix.take(ids, dtype), exact[ids].to(dtype))
        assert torch.equal(matrix.rows(2, 5).widened(dtype), exact[2:5].to(dtype))


# --- plain PyTorch ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_reference_computes_with_blocks(name: str, dtype: torch.dtype) -> None:
    """Linear layers, logits and embeddings, against products in float64 with gguf-py's numbers."""
    matrix, other = random_matrix(name, 33, 256), random_matrix("q8_0", 5, 256)
    numbers = theirs(name, matrix.planes[0])
    wide = torch.cat((numbers, theirs("q8_0", other.planes[0])))
    x, bias = torch.randn(3, 256).to(dtype), torch.randn(33).to(dtype)
    every_bias = torch.cat((bias, torch.zeros(5, dtype=dtype)))
    with torch.no_grad():
        layers = REFERENCE.prepare_linear((matrix, bias), (other, None), dtype=dtype)
        assert_product(REFERENCE.linear(x, layers), x, wide.to(dtype), every_bias)
        head = REFERENCE.prepare_linear((matrix, bias), dtype=dtype)
        assert_product(REFERENCE.logits(x, head), x, numbers, bias)
        ids = torch.tensor([32, 0])
        found = REFERENCE.embed(ids, matrix, 1.5, dtype)
        assert torch.equal(found, (numbers[ids] * 1.5).to(dtype))


def assert_product(found: Tensor, x: Tensor, numbers: Tensor, bias: Tensor) -> None:
    """x numbers^T + bias within what summing in float32 and rounding once may be off."""
    exact = x.double() @ numbers.double().T + bias
    terms = x.double().abs() @ numbers.double().abs().T + bias.abs()
    assert_within(found, exact, ROUNDOFF[found.dtype] * exact.abs() + 2.0**-20 * terms)


def test_a_vocabulary_of_blocks_is_widened_in_parts() -> None:
    matrix = random_matrix("q8_0", LOGITS_ROWS + 3, 32)
    x = torch.randn(2, 32)
    with torch.no_grad():
        found = REFERENCE.logits(x, REFERENCE.prepare_linear((matrix, None)))
    torch.testing.assert_close(found, x @ matrix.widened(torch.float32).T)


def test_an_embedding_of_blocks_needs_a_dtype() -> None:
    with pytest.raises(ValueError, match="q8_0 table has no dtype of its own"):
        REFERENCE.embed(torch.tensor([0]), random_matrix("q8_0", 3, 32))


@pytest.mark.parametrize("gradient", [False, True])
def test_experts_are_widened_one_at_a_time(gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same outputs as of widened weights, and never two experts' numbers beside each other."""
    with torch.inference_mode(not gradient):
        names = ("q4_k", "q6_k", "q8_0", "q5_k")
        gate, up, down = (
            [random_matrix(name, 256, 256) for name in names[i:] + names[:i]] for i in range(3)
        )
        wide = ExpertWeights(
            *([matrix.widened(torch.float32) for matrix in kind] for kind in (gate, up, down))
        )
        x, share = torch.randn(9, 256, requires_grad=gradient), torch.rand(9, 2)
        ids = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
        exact = REFERENCE.experts(x, share, ids, REFERENCE.prepare_experts(wide, "silu"))
        stacks = list[int]()
        monkeypatch.setattr(torch, "stack", lambda parts: stacks.append(len(parts)))
        prepared = REFERENCE.prepare_experts(ExpertWeights(gate, up, down), "silu")
        found = REFERENCE.experts(x, share, ids, prepared)
        if gradient:
            found.sum().backward()
            assert x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
    assert not stacks


def test_planes_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="q4_k matrix"):
        Matrix(BLOCKS["q4_k"], (2, 256), (torch.zeros(2, 143, dtype=torch.uint8),))
