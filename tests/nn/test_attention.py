"""Attention in packed rows against a loop over tokens, and its gradients against that loop's in
float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from covering import pairwise
from moebius.errors import ConfigError
from moebius.nn import packed as packed_module
from moebius.nn.attention import GQA, Attention
from moebius.nn.packed import PackedPast
from moebius.nn.rope import RopeConfig
from moebius.nn.spec import Place
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation

HEADS, GROUPS, SIZE, ROWS = 4, 2, 6, 3


def naive(qkv_TI: Tensor, spec: GQA, sinks: Tensor | None, documents: Tensor | None) -> Tensor:
    """Token by token, head by head."""
    sizes = [spec.q_size, spec.k_size, spec.v_size]
    q, k, v = (
        part.view(len(qkv_TI), heads, -1)
        for part, heads in zip(qkv_TI.split(sizes, dim=1), (HEADS, GROUPS, GROUPS), strict=True)
    )
    length = len(q) // ROWS
    out = []
    for t in range(len(q)):
        row = range(t // length * length, t + 1)
        near = [s for s in row if spec.window is None or t - s < spec.window]
        seen = [s for s in near if documents is None or documents[s] == documents[t]]
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            scores = spec.score_scale * (k[seen, group] @ q[t, head])
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1].to(scores.dtype)))
            weights = torch.softmax(scores, dim=0)[: len(seen)]
            out.append(weights @ v[seen, group])
    return torch.stack(out).view(len(q), HEADS, -1)


def check(
    spec: GQA, length: int, documents: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and gradients of packed rows in blocks of 8 queries, against the loop in float64."""
    monkeypatch.setattr(packed_module, "QUERY_BLOCK", 8)
    generator = torch.Generator().manual_seed(1)
    size = spec.q_size + spec.k_size + spec.v_size
    qkv = torch.randn(ROWS * length, size, generator=generator).requires_grad_()
    attention = Attention(spec, Place(ReferenceOps(), 8, 1e-6, torch.float32))
    if attention.sinks is not None:
        attention.sinks.data = torch.randn(HEADS, generator=generator)
    still = Rotation(torch.ones(len(qkv), SIZE // 2), torch.zeros(len(qkv), SIZE // 2))
    out = PackedPast(length, documents).attend(attention, qkv, still)
    exact = qkv.detach().double().requires_grad_()
    expected = naive(exact, spec, attention.sinks, documents)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    found, wanted = (
        torch.autograd.grad((x.double() * weights).sum(), y)[0]
        for x, y in ((out, qkv), (expected, exact))
    )
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "packed"), pairwise([1, 7, 16, 37], [None, 5, 50], [False, True])
)
def test_causal_attention(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int | None, packed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(ROWS, length, generator=generator) < 0.3
    documents = starts.long().cumsum(1).flatten() if packed else None
    check(GQA(HEADS, GROUPS, SIZE, window=window, scale=0.4), length, documents, monkeypatch)


@pytest.mark.parametrize(
    "spec",
    [
        GQA(HEADS, GROUPS, SIZE, value_dim=4),
        GQA(HEADS, GROUPS, SIZE, softcap=0.7, scale=1.0),
        GQA(HEADS, GROUPS, SIZE, sinks=True, window=5),
        GQA(HEADS, GROUPS, SIZE, value_dim=9, softcap=2.0, sinks=True),
    ],
)
def test_what_architectures_add_to_scores_and_values(
    monkeypatch: pytest.MonkeyPatch, spec: GQA
) -> None:
    check(spec, 19, None, monkeypatch)


def test_sinks_learn() -> None:
    """A sink takes from all keys alike: its gradient is that of the loop's."""
    spec = GQA(HEADS, GROUPS, SIZE, sinks=True)
    attention = Attention(spec, Place(ReferenceOps(), 8, 1e-6, torch.float32))
    assert attention.sinks is not None
    attention.sinks.data = torch.tensor([0.5, -1.0, 2.0, 0.0])
    qkv = torch.randn(ROWS * 4, 8 * SIZE, generator=torch.Generator().manual_seed(2))
    still = Rotation(torch.ones(len(qkv), SIZE // 2), torch.zeros(len(qkv), SIZE // 2))
    out = PackedPast(4).attend(attention, qkv, still)
    found, wanted = (
        torch.autograd.grad(x.square().sum(), attention.sinks)[0]
        for x in (out, naive(qkv, spec, attention.sinks, None))
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"num_kv_heads": 3}, "num_attention_heads = 4 is no multiple of num_key_value_heads = 3"),
        ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even one"),
        (
            {"head_dim": 6, "rope": RopeConfig(partial=0.5)},
            r"head_dim = 6 times partial_rotary_factor = 0\.5 is 3; rotary .* needs an even one",
        ),
        ({"softcap": 0.0}, r"softcap is 0\.0; it must be positive"),
        ({"value_dim": 0}, "value_dim is 0"),
        ({"window": 0}, "window is 0"),
        ({"qk_norm": "some"}, "qk_norm is 'some'; it must be one of none, head, full"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": RopeConfig()}
    with pytest.raises(ConfigError, match=message):
        GQA(**sizes | wrong)
