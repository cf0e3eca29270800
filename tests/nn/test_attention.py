"""Attention in packed rows against a loop over tokens, and its gradients against that loop's in
float64."""

import pytest
import torch
from torch import Tensor

from moebius.nn import packed as packed_module
from moebius.nn.attention import GQA, Attention
from moebius.nn.packed import PackedPast
from moebius.nn.spec import Place
from moebius.ops.reference import ReferenceOps

HEADS, GROUPS, SIZE, ROWS = 4, 2, 6, 3


def naive(
    qkv_TI: Tensor, length: int, scale: float, window: int | None, documents: Tensor | None
) -> Tensor:
    heads = qkv_TI.view(len(qkv_TI), -1, SIZE)
    q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + GROUPS], heads[:, HEADS + GROUPS :]
    out = []
    for t in range(len(q)):
        row = range(t // length * length, t + 1)
        near = [s for s in row if window is None or t - s < window]
        seen = [s for s in near if documents is None or documents[s] == documents[t]]
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            weights = torch.softmax(scale * (k[seen, group] @ q[t, head]), dim=0)
            out.append(weights @ v[seen, group])
    return torch.stack(out).view(len(q), HEADS, SIZE)


@pytest.mark.parametrize("length", [1, 7, 16, 37])
@pytest.mark.parametrize("window", [None, 5, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_causal_attention(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int | None, packed: bool
) -> None:
    monkeypatch.setattr(packed_module, "QUERY_BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    tokens = ROWS * length
    qkv = torch.randn(tokens, (HEADS + 2 * GROUPS) * SIZE, generator=generator).requires_grad_()
    documents = (
        (torch.rand(ROWS, length, generator=generator) < 0.3).long().cumsum(1).flatten()
        if packed
        else None
    )
    spec = GQA(HEADS, GROUPS, SIZE, window=window, scale=0.4)
    attention = Attention(spec, Place(ReferenceOps(), 8, 1e-6, torch.float32))
    still = torch.ones(tokens, SIZE // 2), torch.zeros(tokens, SIZE // 2)
    out = PackedPast(length, documents).attend(attention, qkv, still)
    exact = qkv.detach().double().requires_grad_()
    expected = naive(exact, length, 0.4, window, documents)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    found, wanted = (
        torch.autograd.grad((x.double() * weights).sum(), y)[0]
        for x, y in ((out, qkv), (expected, exact))
    )
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
