"""The specification's operations against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from covering import pairwise
from moebius.ops.reference import LOGITS_ROWS, TILE, ReferenceOps
from moebius.ops.reference.routing import top_k
from moebius.ops.steps import StepInputs
from ops.paged import Sequences, as_is, empty_cache

OPS = ReferenceOps()


def naive_attention(
    q_HN: Tensor,
    k_SGN: Tensor,
    v_SGN: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One query over the keys it may see."""
    heads, share = q_HN.shape[0], q_HN.shape[0] // k_SGN.shape[1]
    rows = []
    for h in range(heads):
        scores = k_SGN[:, h // share] @ q_HN[h] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (0.0 if sinks_H is None else sinks_H[h].exp())
        rows.append(weights / total @ v_SGN[:, h // share])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("window", "sizes", "block_size"),
    pairwise(
        [None, 1, 5, TILE, TILE + 3],
        [(4, 4, 6, 6), (8, 1, 10, 4), (6, 2, 16, 16), (6, 2, 8, 20)],
        [1, 3, 16],
    ),
    ids=str,
)
def test_paged_attention(
    window: int | None, sizes: tuple[int, int, int, int], block_size: int
) -> None:
    """Chunks, whole prompts and decodes of lengths on both sides of a tile, in one step over a
    cache full of NaN."""
    heads, kv_heads, head_dim, value_dim = sizes
    torch.manual_seed(0)
    lengths = [1, 7, TILE, TILE + 1, 2 * TILE + 5, 33, TILE - 1]
    new = [1, 7, 1, 1, 1, 4, TILE - 1]
    keys = [torch.randn(n, kv_heads, head_dim) for n in lengths]
    values = [torch.randn(n, kv_heads, value_dim) for n in lengths]
    q = torch.randn(sum(new), heads, head_dim)
    out = Sequences(keys, values, new).attend(OPS, q, 0.3, block_size, window=window)
    row = 0
    for b, length in enumerate(lengths):
        for position in range(length - new[b], length):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            expected = naive_attention(q[row], keys[b][seen], values[b][seen], 0.3)
            torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)
            row += 1


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_capped_scores_and_sinks(window: int | None, sinks: bool, softcap: float | None) -> None:
    """In chunks, whole prompts and decodes, with values of another size than keys."""
    torch.manual_seed(0)
    lengths, new = [9, TILE + 1, 6, 2], [9, 1, 4, 1]
    keys = [torch.randn(n, 2, 8) for n in lengths]
    values = [torch.randn(n, 2, 5) for n in lengths]
    q = 3 * torch.randn(sum(new), 6, 8)
    sinks_H = torch.randn(6) if sinks else None
    options = {"window": window, "softcap": softcap, "sinks_H": sinks_H}
    out = Sequences(keys, values, new).attend(OPS, q, 0.3, 4, **options)
    row = 0
    for b, length in enumerate(lengths):
        for position in range(length - new[b], length):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            expected = naive_attention(
                q[row], keys[b][seen], values[b][seen], 0.3, softcap, sinks_H
            )
            torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)
            row += 1


def test_empty_step() -> None:
    step = StepInputs.build([], [], [], 4)
    assert step.block_table.shape == (0, 0) and list(step.query_start_host) == [0]
    cache = empty_cache(OPS, 4, 4, 1, 2, torch.float32)
    as_is(OPS, cache, torch.zeros(0, 1, 2), torch.zeros(0, 1, 2), step.slot_mapping)
    out = OPS.paged_attention(torch.zeros(0, 2, 2), cache, OPS.plan_attention(step, 4), 1.0)
    assert out.shape == (0, 2, 2)


def test_step_inputs_hand_worked() -> None:
    step = StepInputs.build([[7, 8, 9], [5]], [2, 8], [[4, 1], [0, 6, 3]], 3)
    assert step.input_ids.tolist() == [7, 8, 9, 5]
    assert step.positions.tolist() == [2, 3, 4, 8]
    assert step.slot_mapping.tolist() == [14, 3, 4, 11]
    assert list(step.query_start_host) == [0, 3, 4]
    assert list(step.seq_lens_host) == [5, 9]
    assert step.block_table.tolist() == [[4, 1, 0], [0, 6, 3]]


def test_rms_norm_hand_worked() -> None:
    """Of (3, 4) the mean square is 12.5."""
    out = OPS.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]]))
    tiny = OPS.rms_norm(torch.full((1, 64), 1e-3).bfloat16(), torch.ones(64).bfloat16(), 1e-6)
    assert tiny.dtype == torch.bfloat16 and tiny[0, 0].item() == pytest.approx(
        1 / math.sqrt(2), rel=1e-2
    )


@pytest.mark.parametrize("rows", [5, LOGITS_ROWS + 7])
def test_logits_are_float32_and_never_rounded(rows: int) -> None:
    x, weight, bias = (
        torch.randn(3, 8).bfloat16(),
        torch.randn(rows, 8).bfloat16(),
        torch.randn(rows).bfloat16(),
    )
    exact = x.double() @ weight.double().T
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            plain, biased = OPS.prepare_linear((weight, None)), OPS.prepare_linear((weight, bias))
            out = OPS.logits(x, plain)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(OPS.logits(x, plain), out)
            torch.testing.assert_close(
                OPS.logits(x, biased).double(), exact + bias.double(), rtol=1e-5, atol=1e-5
            )
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_top_k_orders_and_breaks_ties_low() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (200, 12), generator=generator).float()
    for row, ids in zip(scores.tolist(), top_k(scores, 4).tolist(), strict=True):
        assert ids == sorted(range(12), key=lambda i: (-row[i], i))[:4]
