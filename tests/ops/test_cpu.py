"""Every kernel at every instruction set that this processor has, against the reference operations
in float64.

Tolerances come from the number formats: a value is rounded to its dtype a counted number of times
(unit roundoff 2^-8 in bfloat16, 2^-24 in float32), and float32 sums of n terms are off by at most n
2^-24 times the sum of their sizes. Attention has a file of its own.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from covering import each_value
from moe.test_router import CHOSEN_LOGITS, ROWS, SOFTMAX, V3
from moebius.ops import ExpertWeights, Ops
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps, activate
from moebius.ops.sampling import Shaping
from ops.levels import ROUNDOFF, assert_within, bits, logits_seen

REF = ReferenceOps()
SIZES = (1, 2, 15, 16, 17, 31, 33, 64, 100, 257, 1000)
COUNTS = (0, 1, 2, 3, 4, 5, 9, 16, 31, 63, 64, 65, 70)


pytestmark = pytest.mark.usefixtures("seeded")


def double(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*(tuple(x.double() for x in tensors) for tensors in weights))


def assert_linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    x, weight, bias = x.double(), weight.double(), None if bias is None else bias.double()
    exact = REF.linear(x, REF.prepare_linear((weight, bias)))
    terms = x.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
    summed = (x.shape[1] / 16 + 8) * 2.0**-24 * terms
    assert_within(out, exact, ROUNDOFF[out.dtype] * (exact.abs() + summed) + summed)


def test_linear_layers(ops: CpuOps, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    for _ in range(40):
        rows, inner = rng.choice(COUNTS), rng.choice(SIZES)
        outs = [rng.choice((1, 3, 7, 16, 50, 131, 300)) for _ in range(rng.choice((1, 1, 3)))]
        x = torch.randn(rows, inner).to(dtype)
        weights = [torch.randn(out, inner).to(dtype) for out in outs]
        biases = [torch.randn(out).to(dtype) if rng.random() < 0.5 else None for out in outs]
        layers = ops.prepare_linear(*zip(weights, biases, strict=True))
        for whole, kind in ((ops.linear(x, layers), dtype), (ops.logits(x, layers), torch.float32)):
            assert whole.dtype == kind
            for out, weight, bias in zip(whole.split(outs, dim=1), weights, biases, strict=True):
                assert_linear(out, x, weight, bias)


def test_results_are_rounded_to_nearest_even(ops: CpuOps) -> None:
    """A product of one term is exact in float32: what is stored must be its rounding, to the
    bit."""
    x = torch.randn(70, 1).bfloat16()
    special = torch.tensor([[0.0], [-0.0], [torch.inf], [torch.nan]])
    weight = torch.cat((torch.randn(999, 1), special)).bfloat16()
    exact = x.float() @ weight.float().T
    out = ops.linear(x, ops.prepare_linear((weight, None)))
    torch.testing.assert_close(out, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)
    halfway = torch.tensor([[1 + 2.0**-8], [1 + 3 * 2.0**-8], [-1 - 2.0**-8]])
    assert ops.add_gated(halfway.bfloat16() * 0, halfway.bfloat16()).flatten().tolist() == [
        1.0,
        1 + 2.0**-6,
        -1.0,
    ]


@pytest.mark.parametrize("multiplier", [1.0, 0.4])
def test_norms(ops: CpuOps, dtype: torch.dtype, multiplier: float) -> None:
    u = ROUNDOFF[dtype]
    for rows, size in [(r, s) for r in (0, 1, 3, 70) for s in SIZES] + [(3, 5000)]:
        x, update = torch.randn(rows, size).to(dtype), 3 * torch.randn(rows, size).to(dtype)
        weight = torch.randn(size).to(dtype)
        total, normed = ops.add_rms_norm(x, update, multiplier, weight, 1e-5)
        terms = x.double().abs() + (multiplier * update.double()).abs()
        assert_within(
            total, x.double() + multiplier * update.double(), u * terms + 2.0**-23 * terms
        )
        for out, of in ((normed, total), (ops.rms_norm(x, weight, 1e-5), x)):
            of = of.double()
            exact = of * torch.rsqrt(of.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
            assert_within(out, exact, (2.1 * u + (size / 32 + 8) * 2.0**-24) * exact.abs())
    wide, part = torch.randn(5, 100).to(dtype), torch.randn(33).to(dtype)
    expected = torch.cat(
        (wide[:, :20], ops.rms_norm(wide[:, 20:53].contiguous(), part, 0.1), wide[:, 53:]), dim=1
    )
    assert torch.equal(ops.rms_norm_part(wide.clone(), 20, part, 0.1), expected)
    heads = torch.randn(5, 3, 33).to(dtype)
    flat = ops.rms_norm(heads.view(15, 33), heads[0, 0], 0.1)
    assert torch.equal(ops.rms_norm(heads, heads[0, 0], 0.1), flat.view(5, 3, 33))


def test_the_stream_times_a_scale(ops: CpuOps, dtype: torch.dtype) -> None:
    """Rounded twice, as it would be by two operations; what is normed is what is stored."""
    for rows, size in [(r, s) for r in (0, 1, 3, 70) for s in SIZES]:
        x, update = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype)
        weight, scale = 1 + torch.randn(size), torch.tensor([0.37])
        plain, _ = ops.add_rms_norm(x, update, 1.0, weight, 1e-5)
        total, normed = ops.add_rms_norm(x, update, 1.0, weight, 1e-5, scale_1=scale)
        assert torch.equal(total, (plain.float() * scale).to(dtype))
        assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))
        theirs, _ = REF.add_rms_norm(x, update, 1.0, weight, 1e-5, scale_1=scale)
        assert theirs.dtype == dtype
        torch.testing.assert_close(total, theirs, rtol=2 * ROUNDOFF[dtype], atol=1e-6)
    with pytest.raises(ValueError, match="scale"):
        ops.add_rms_norm(x, x, 1.0, weight, 1e-5, scale_1=torch.ones(2))


def test_norms_with_float32_weights(ops: CpuOps) -> None:
    """Rows of bfloat16 are rounded once, behind the product with the weight; so is the reference's
    result."""
    u = ROUNDOFF[torch.bfloat16]
    for rows, size in [(r, s) for r in (0, 1, 3, 70) for s in SIZES]:
        x, update = torch.randn(rows, size).bfloat16(), torch.randn(rows, size).bfloat16()
        weight = 1 + torch.randn(size)
        for backend in (ops, REF):
            total, added = backend.add_rms_norm(x, update, 0.5, weight, 1e-5)
            for out, of in ((backend.rms_norm(x, weight, 1e-5), x), (added, total)):
                exact = of.double() * torch.rsqrt(
                    of.double().square().mean(-1, keepdim=True) + 1e-5
                )
                exact = exact * weight.double()
                assert out.dtype == torch.bfloat16
                assert_within(out, exact, (1.001 * u + (size / 32 + 8) * 2.0**-24) * exact.abs())
    wide, part = torch.randn(5, 100).bfloat16(), torch.randn(33)
    normed = ops.rms_norm(wide[:, 20:53].contiguous(), part, 0.1)
    expected = torch.cat((wide[:, :20], normed, wide[:, 53:]), dim=1)
    assert torch.equal(ops.rms_norm_part(wide.clone(), 20, part, 0.1), expected)


def test_norms_of_what_is_left_of_the_mean(ops: CpuOps, dtype: torch.dtype) -> None:
    """LayerNorm without a bias, of rows far from zero too; weights are float32."""
    u = ROUNDOFF[dtype]
    for rows, size in [(r, s) for r in (0, 1, 3, 70) for s in SIZES]:
        x, update = (3 + torch.randn(rows, size)).to(dtype), torch.randn(rows, size).to(dtype)
        weight = torch.randn(size)
        for backend in (ops, REF):
            total, added = backend.add_rms_norm(x, update, 0.5, weight, 1e-5, less_mean=True)
            alone = backend.rms_norm(x, weight, 1e-5, less_mean=True)
            for out, of in ((alone, x.double()), (added, total.double())):
                left = of - of.mean(-1, keepdim=True)
                scale = torch.rsqrt(left.square().mean(-1, keepdim=True) + 1e-5) * weight
                rounded = (size / 32 + 8) * 2.0**-24
                bound = (2.1 * u + rounded) * left.abs() + 4 * rounded * of.abs().amax(-1, True)
                assert_within(out, left * scale, bound * scale.abs())


def test_embed(ops: CpuOps, dtype: torch.dtype) -> None:
    table, ids = torch.randn(9, 33).to(dtype), torch.tensor([8, 0, 0, 3])
    assert torch.equal(ops.embed(ids, table), table[ids])
    assert torch.equal(ops.embed(ids, table, 12.0), table[ids] * 12.0)
    assert ops.embed(ids[:0], table).shape == (0, 33)


def router_weights(weights_TK: Tensor, ids_TK: Tensor, experts: int) -> Tensor:
    """(T, E): an expert's weight, NaN where it was not chosen."""
    return torch.full((len(ids_TK), experts), torch.nan).scatter(1, ids_TK, weights_TK)


@pytest.mark.parametrize("config", [*(row[2] for row in ROWS), replace(SOFTMAX, logit_softcap=2.0), RouterConfig(1, 1),
                                    replace(V3, num_groups=8, groups_kept=3, group_score="max", group_fill="zero"),
                                    replace(CHOSEN_LOGITS, num_experts=40, top_k=40)])  # fmt: skip
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_route(config: RouterConfig, rows: int) -> None:
    """Not compiled for each instruction set."""
    ops = CpuOps(threads=2)
    logits, bias = 2 * torch.randn(rows, config.num_experts), 0.3 * torch.randn(config.num_experts)
    weights, ids = ops.route(logits, config, bias)
    expected = router_weights(*REF.route(logits, config, bias), config.num_experts)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    torch.testing.assert_close(
        router_weights(weights, ids, config.num_experts),
        expected,
        rtol=1e-5,
        atol=1e-7,
        equal_nan=True,
    )


@pytest.mark.parametrize("backend", [CpuOps(threads=2), REF], ids=lambda ops: ops.name)
def test_route_with_a_scale_of_each_expert(backend: Ops) -> None:
    """It multiplies weights, and chooses nothing."""
    config = RouterConfig(12, 3, weight="renorm", scale=2.0)
    logits, scale = torch.randn(70, 12), torch.randn(12)
    weights, ids = backend.route(logits, config)
    scaled, same = backend.route(logits, config, expert_scale_E=scale)
    assert torch.equal(same, ids)
    assert torch.equal(scaled, weights * scale[ids])


def test_route_ties_and_what_is_no_number() -> None:
    ops, config = CpuOps(threads=1), RouterConfig(40, 5)
    tied = torch.randint(0, 3, (200, 40), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(ops.route(tied, config)[1], REF.route(tied, config)[1])
    for bad in (torch.nan, torch.inf):
        logits = torch.randn(3, 40)
        logits[1, 7] = bad
        weights, ids = ops.route(logits, config)
        assert ((ids >= 0) & (ids < 40)).all() and not weights[1].isfinite().all()
        assert torch.equal(weights[::2], ops.route(logits[::2].contiguous(), config)[0])


def make_experts(
    count: int, width: int, hidden: int, dtype: torch.dtype, bias: bool
) -> ExpertWeights:
    def tensors(*shape: int) -> tuple[Tensor, ...]:
        return tuple((torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for _ in range(count))

    biases = [tensors(n) for n in (width, width, hidden)] if bias else [(), (), ()]
    return ExpertWeights(
        tensors(width, hidden), tensors(width, hidden), tensors(hidden, width), *biases
    )


def expert_terms(x_D: Tensor, w: ExpertWeights, e: int, activation: Any) -> Tensor:
    """The sum of the sizes of what expert e adds up for one token: (D,) float64."""
    w = double(w)
    gate_bias, up_bias, down_bias = (biases[e] if biases else 0.0 for biases in w[3:])
    gate = w.gate_FD[e].abs() @ x_D.abs() + abs(gate_bias)
    up = w.up_FD[e].abs() @ x_D.abs() + abs(up_bias)
    return w.down_DF[e].abs() @ (activate(gate, activation).maximum(gate.abs()) * up) + abs(
        down_bias
    )


@pytest.mark.parametrize(
    ("activation", "sizes"),
    each_value(
        ["silu", "gelu", "gelu_tanh", "relu", "relu_squared"],
        [(1, 1, 31, 17), (4, 1, 100, 33), (6, 2, 48, 64), (9, 9, 7, 1)],
    ),
)
def test_experts(
    ops: CpuOps, dtype: torch.dtype, activation: Any, sizes: tuple[int, int, int, int]
) -> None:
    count, k, width, hidden = sizes
    u = ROUNDOFF[dtype]
    for tokens, bias in ((0, False), (1, True), (5, False), (70, True)):
        w = make_experts(count, width, hidden, dtype, bias)
        prepared = ops.prepare_experts(w, activation)
        x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, k)
        ids = (
            torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
            if tokens
            else torch.zeros(0, k).long()
        )
        everyone_to_the_last = torch.full_like(ids, count - 1)
        for chosen in (ids, everyone_to_the_last):
            exact = REF.experts(
                x.double(), weights, chosen, REF.prepare_experts(double(w), activation)
            )
            terms = torch.zeros(tokens, hidden, dtype=torch.float64)
            for t in range(0, tokens, 9):
                for j, e in enumerate(chosen[t].tolist()):
                    terms[t] += weights[t, j] * expert_terms(x[t].double(), w, e, activation)
            out = ops.experts(x, weights, chosen, prepared)
            # Rounded: the gated values, each expert's output, their sum.
            assert_within(
                out[::9], exact[::9], (3.1 * u + (hidden + width + 40) * 2.0**-24) * terms[::9]
            )
    x = torch.randn(33, hidden).to(dtype)
    one = ExpertWeights(*(tensors[:1] for tensors in w))
    dense = ops.experts(x, None, None, ops.prepare_experts(one, activation))
    everyone = ops.experts(
        x, torch.ones(33, 1), torch.zeros(33, 1).long(), ops.prepare_experts(w, activation)
    )
    assert torch.equal(dense, everyone)


def test_rows_of_experts_combine_to_what_experts_give(ops: CpuOps, dtype: torch.dtype) -> None:
    """To the bit: so experts elsewhere, a row for each pair, are experts here."""
    count, k, width, hidden = 5, 3, 40, 33
    experts = ops.prepare_experts(make_experts(count, width, hidden, dtype, bias=True), "silu")
    for tokens in (0, 1, 5, 70):
        x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, k)
        ids = torch.randint(0, count, (tokens, k))
        pairs = ops.experts(
            x.repeat_interleave(k, 0), torch.ones(tokens * k, 1), ids.view(-1, 1), experts
        )
        found = ops.combine(pairs.view(tokens, k, hidden), weights)
        assert torch.equal(bits(found), bits(ops.experts(x, weights, ids, experts)))
        exact = (pairs.view(tokens, k, hidden).double() * weights.double().unsqueeze(2)).sum(1)
        terms = (
            (pairs.view(tokens, k, hidden).double() * weights.double().unsqueeze(2)).abs().sum(1)
        )
        assert_within(found, exact, ROUNDOFF[dtype] * exact.abs() + k * 2.0**-23 * terms)


def test_the_callers_own_floating_point_control_changes_no_bit(ops: CpuOps) -> None:
    """Subnormal numbers are flushed on whatever thread an operation is called."""
    ids = torch.tensor([1, 0])
    for table in (torch.full((2, 33), 2.0**-130), torch.full((2, 33), 2.0**-130).bfloat16()):
        found = []
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            try:
                found.append(ops.embed(ids, table, 2.0**20))
            finally:
                torch.set_flush_denormal(False)
        assert torch.equal(bits(found[0]), bits(found[1]))


def test_add_gated(ops: CpuOps, dtype: torch.dtype) -> None:
    for rows, size in ((0, 5), (1, 1), (17, 33), (70, 1000)):
        a, b, gate = (
            torch.randn(rows, size).to(dtype),
            torch.randn(rows, size).to(dtype),
            3 * torch.randn(rows, 1),
        )
        for g in (gate, None):
            exact = REF.add_gated(a.double(), b.double(), None if g is None else g.double())
            terms = a.double().abs() + b.double().abs()
            assert_within(
                ops.add_gated(a, b, g), exact, ROUNDOFF[dtype] * exact.abs() + 2.0**-21 * terms
            )


@pytest.mark.parametrize("temperatures", [False, True])
def test_log_softmax_top_k(ops: CpuOps, temperatures: bool) -> None:
    """Each row with a count of its own: of few candidates, of many, of all and beyond."""
    rng = random.Random(0)
    for rows, vocab in ((0, 5), (1, 1), (2, 16), (70, 33), (9, 1000), (20, 5001), (8, 50_001)):
        logits, heat = 5 * torch.randn(rows, vocab), None
        some = rng.sample(range(rows), rows - rows // 4)
        counts = [
            (vocab, 0, 1, 2, 21, 512, 513, vocab - 1, vocab + 3)[i % 9] for i in range(len(some))
        ]
        logits[:, ::3] = logits[:, ::3].round()
        if temperatures:
            heat = [rng.uniform(0.1, 1.1) for _ in some]
        assert ops.argmax(logits) == REF.argmax(logits)
        found = ops.log_softmax_top_k(logits, some, counts, heat)
        exact = REF.log_softmax_top_k(logits, some, counts, heat)
        assert found.log_sums_R.dtype == torch.float64
        assert torch.equal(found.ids, exact.ids) and torch.equal(found.values, exact.values)
        # Exponents up to 300 have a relative error of 2^-23; at most 256 terms are summed in a
        # lane.
        assert_within(found.log_sums_R, exact.log_sums_R, 300 * 2.0**-23 + 256 * 2.0**-24)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_reported_for_their_row(ops: CpuOps, bad: float) -> None:
    for vocab in (5, 16, 40):
        for at in (0, 3, vocab - 1):
            logits = torch.randn(3, vocab)
            logits[1, at] = bad
            for k in (1, 4):
                rows, heat, uniform = range(3), [1.0] * 3, [0.5] * 3
                found = ops.log_softmax_top_k(logits, rows, [k] * 3)
                assert found.log_sums_R.isnan().tolist() == [False, True, False]
                assert [id < 0 for id in ops.argmax(logits)] == [False, True, False]
                assert [id < 0 for id in ops.draw(logits, rows, heat, uniform)] == [
                    False,
                    True,
                    False,
                ]
                assert [id < 0 for id in REF.draw(logits, rows, heat, uniform)] == [
                    False,
                    True,
                    False,
                ]
                assert ((found.ids >= 0) & (found.ids < vocab)).all()
                others = REF.log_softmax_top_k(logits, [0, 2], [k, k])
                assert torch.equal(found.ids.view(3, k)[::2].flatten(), others.ids)


def test_draws_split_the_unit_interval(ops: CpuOps) -> None:
    """The drawn id is the one whose share of the cumulative sum holds the uniform number, up to
    rounding."""
    for rows, vocab in ((0, 3), (1, 1), (70, 16), (40, 33), (9, 50_001)):
        logits, heat = 3 * torch.randn(rows, vocab), torch.rand(rows) + 0.2
        uniform = torch.rand(rows, dtype=torch.float64)
        order = torch.randperm(rows)
        ids = torch.empty(rows, dtype=torch.int64)
        drawn = ops.draw(logits, order.tolist(), heat[order].tolist(), uniform[order].tolist())
        ids[order] = torch.tensor(drawn, dtype=torch.int64)
        shares = torch.softmax(logits.double() / heat.unsqueeze(1), dim=-1)
        above = shares.cumsum(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
        below = above - shares.gather(1, ids.unsqueeze(1)).squeeze(1)
        assert ((below <= uniform + 1e-5) & (uniform <= above + 1e-5)).all()
    lonely = torch.full((3, 40), -200.0)
    lonely[:, 7] = 0.0
    for u in (0.0, 0.5, 1 - 2.0**-53):
        assert ops.draw(lonely, range(3), [1.0] * 3, [u] * 3) == [7, 7, 7]
    assert ops.draw(torch.zeros(4, 4), range(4), [1.0] * 4, [0.0, 0.25, 0.499, 1 - 2.0**-53]) == [
        0,
        1,
        1,
        3,
    ]


def test_ranks(ops: CpuOps) -> None:
    """By counting: one more than those that are larger, and than those as large with a lower id."""
    for vocab in (1, 5, 33, 1000):
        logits = torch.randn(12, vocab).round(decimals=1)
        rows = [3, 3, 0, 11, 7]
        tokens = [vocab - 1, 0, vocab // 2, vocab // 3, vocab - 1]
        orders = [
            sorted(range(vocab), key=lambda i, x=logits[row]: (-float(x[i]), i)) for row in rows
        ]
        expected = [1 + order.index(token) for order, token in zip(orders, tokens, strict=True)]
        for each in (ops, REF):
            found = each.ranks(logits, rows, torch.tensor(tokens))
            assert found.dtype == torch.int64 and found.tolist() == expected


def random_words(rng: random.Random, vocab: int) -> NDArray[np.uint32]:
    """A set of ids; beyond the vocabulary, which may end within a word, it holds some as well."""
    return np.array([rng.getrandbits(32) for _ in range(-(-vocab // 32))], dtype=np.uint32)


def naive_shaping(logits: Tensor, shaping: Shaping) -> Tensor:
    """One row in numpy's float64 over the whole vocabulary, step by step."""
    x = logits.numpy().astype(np.float64)
    for token, bias in shaping.bias.items():
        x[token] += bias
    for token in {*shaping.seen, *shaping.drawn}:
        x[token] = x[token] / shaping.repetition if x[token] > 0 else x[token] * shaping.repetition
    for token in set(shaping.drawn):
        x[token] -= shaping.presence + shaping.frequency * shaping.drawn.count(token)
    x[list(shaping.banned)] = np.finfo(np.float32).min
    if shaping.allowed is not None:
        for token in range(len(x)):
            if not int(shaping.allowed[token // 32]) >> token % 32 & 1:
                x[token] = np.finfo(np.float32).min
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.case("B5")
def test_shaping_has_one_rounding_and_leaves_nothing_behind(ops: CpuOps) -> None:
    """To the bit what numpy makes of it, here and in plain PyTorch; other rows untouched, and all
    in the end."""
    rng = random.Random(0)
    for vocab in (1, 2, 17, 300, 4000):
        logits = 4 * torch.randn(9, vocab)
        logits[0] = -0.0
        before = bits(logits).clone()
        rows = rng.sample(range(9), 5)

        def some(most: int, vocab: int = vocab) -> list[int]:
            return [rng.randrange(vocab) for _ in range(rng.randrange(most + 1))]

        shapings = [
            Shaping(
                bias={token: rng.uniform(-100, 100) for token in some(5)},
                seen=tuple(some(500)),
                drawn=[*some(100), rng.randrange(vocab)],
                repetition=rng.choice((1.0, 0.3, 1.7)),
                presence=rng.choice((0.0, -1.3, 2.0)),
                frequency=rng.choice((0.0, 0.1, -0.7)),
                banned=some(3),
                allowed=rng.choice((None, random_words(rng, vocab))),
            )
            for _ in rows
        ]
        expected = logits.clone()
        for row, shaping in zip(rows, shapings, strict=True):
            expected[row] = naive_shaping(logits[row], shaping)
        for each in (ops, REF):
            with each.shaped(logits, rows, shapings):
                assert torch.equal(bits(logits_seen(each, logits)), bits(expected))
            assert torch.equal(bits(logits), before)
            # The last of what was drawn may come beside the rest.
            earlier = [shaping._replace(drawn=shaping.drawn[:-1]) for shaping in shapings]
            newest = torch.tensor([shaping.drawn[-1] for shaping in shapings])
            with each.shaped(logits, rows, earlier, newest):
                assert torch.equal(bits(logits_seen(each, logits)), bits(expected))
            assert torch.equal(bits(logits), before)
            with (
                pytest.raises(RuntimeError, match="drawing failed"),
                each.shaped(logits, rows, shapings),
            ):
                raise RuntimeError("drawing failed")
            assert torch.equal(bits(logits), before)


def test_a_bounded_row_gives_what_its_copy_would(ops: CpuOps) -> None:
    """Whether logits lie there bounded or are bounded as they are read, all bits are the same."""
    rng = random.Random(0)
    for vocab in (1, 33, 1024, 5000):
        logits = 4 * torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab))
        words = random_words(rng, vocab)
        words[0] |= 1
        shaping = Shaping({0: 1.0}, (), (), 1.0, 0.0, 0.0, (), words)
        bounded = logits.clone()
        for row in (0, 2):
            bounded[row] = naive_shaping(logits[row], shaping)
        with ops.shaped(logits, [0, 2], [shaping, shaping]):
            under_masks = drawn_in_all_ways(ops, logits)
        assert under_masks == drawn_in_all_ways(ops, bounded)


def drawn_in_all_ways(ops: CpuOps, logits: Tensor) -> list[object]:
    rows, vocab = logits.shape
    heats = [0.5, 1.0, 1.5, 2.0]
    best = ops.log_softmax_top_k(logits, range(rows), [0, 1, 7, vocab], heats)
    uniforms = [0.0, 0.3, 0.7, 0.99]
    return [
        ops.argmax(logits),
        [ops.draw(logits, range(rows), heats, [uniform] * rows) for uniform in uniforms],
        *(each.tolist() for each in best),
        ops.ranks(logits, range(rows), torch.tensor([0, vocab - 1, vocab // 2, 0])).tolist(),
    ]


@pytest.mark.parametrize("routed", [True, False])
def test_experts_of_two_matrices(ops: CpuOps, routed: bool) -> None:
    """down(relu(gate x)), as Switch Transformers have them."""
    generator = torch.Generator().manual_seed(0)
    gate, down = (
        tuple(torch.randn(*s, generator=generator) for _ in range(4)) for s in ((24, 16), (16, 24))
    )
    x = torch.randn(5, 16, generator=generator)
    weights = torch.rand(5, 2, generator=generator) if routed else None
    ids = torch.tensor([[0, 1], [1, 3], [3, 2], [0, 3], [2, 1]]) if routed else None
    found = ops.experts(x, weights, ids, ops.prepare_experts(ExpertWeights(gate, (), down), "relu"))
    expected = torch.zeros(5, 16, dtype=torch.float64)
    for t in range(5):
        for k in range(2 if routed else 1):
            e, share = (int(ids[t, k]), weights[t, k].double()) if routed else (0, 1.0)  # type: ignore[index]
            expected[t] += share * (down[e].double() @ torch.relu(gate[e].double() @ x[t].double()))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_clip_divide_and_cap(ops: CpuOps, dtype: torch.dtype) -> None:
    """As torch has them, to the bit: NaN stays, infinities and minus zero too."""
    x = torch.randn(37, 21).to(dtype) * 3
    x[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])
    for limit in (0.3, 1.0, 7.77, 1e9):
        assert torch.equal(bits(ops.clip(x, limit)), bits(x.clamp(-limit, limit)))
    for cap in (0.5, 30.0):
        found = ops.softcap(x[1:].float(), cap).double()
        exact = cap * torch.tanh(x[1:].double() / cap)
        assert_within(found, exact, 2.0**-21 * exact.abs() + 1e-9)
    for divisor in (3.0, 0.1, 16.0):
        assert torch.equal(bits(ops.divide(x.float(), divisor)), bits(x.float() / divisor))
    assert ops.clip(x[:0], 1.0).shape == (0, 21)
    heads = torch.randn(5, 3, 7)
    assert torch.equal(ops.divide(heads, 3.0), heads / 3.0)
    assert torch.equal(ops.softcap(heads, 2.0), ops.softcap(heads.view(15, 7), 2.0).view(5, 3, 7))
