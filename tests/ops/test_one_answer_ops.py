"""Promise P1, operation by operation: a row's bits depend on the row alone.

Not on how many rows surround it or where it stands among them, not on the number of threads, not on
the KV cache's block size and places, not on how a prompt was cut into chunks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import covering
from moebius.ops import ExpertWeights
from moebius.ops.config import HeadGates, RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.sampling import Shaping
from moebius.ops.steps import Rotation, StepInputs
from ops.levels import LEVELS, ROUNDOFF, bits, level
from ops.paged import Sequences, empty_cache, side_by_side

ROWS = 70
# What is computed in, and what the cache holds; None: the same.
CACHES = [*((dtype, None) for dtype in ROUNDOFF), *((dtype, torch.int8) for dtype in ROUNDOFF)]
# An operation over the rows `at` of its inputs: one result or several, the row's number always
# first.
RowWise = Callable[[CpuOps, Tensor], tuple[Tensor, ...]]


pytestmark = pytest.mark.usefixtures("seeded")


def rows(size: int, dtype: torch.dtype) -> Tensor:
    """Random rows; the last is not finite, which is no other row's business."""
    x = torch.randn(ROWS, size)
    x[-1, ::2] = torch.nan
    return x.to(dtype)


def products(dtype: torch.dtype, stored: torch.dtype | None = None) -> dict[str, RowWise]:
    """Linear layers and experts: sizes that no tile divides, and more weights than one thread takes
    at once. Matrices are stored as `stored`, None for dtype."""
    stored = stored or dtype
    shapes = [
        ((131, 100), (33, 100)),
        ((70, 1000), (300, 1000)),
        ((17, 31), (5, 31)),
        ((300, 64), (64, 64)),
    ]
    named: dict[str, RowWise] = {}
    for layers in shapes:
        x = rows(layers[0][1], dtype)
        weights = [
            (torch.randn(shape).to(stored), torch.randn(shape[0]).to(dtype)) for shape in layers
        ]
        named[f"linear {layers}"] = lambda ops, at, x=x, w=weights: (
            ops.linear(x[at], ops.prepare_linear(*w, dtype=dtype)),
        )
        named[f"logits {layers}"] = lambda ops, at, x=x, w=weights: (
            ops.logits(x[at], ops.prepare_linear(*w, dtype=dtype)),
        )
    for count, k, width, hidden in ((8, 3, 100, 33), (2, 1, 48, 200), (1, 1, 300, 64)):

        def tensors(*shape: int, count: int = count) -> tuple[Tensor, ...]:
            return tuple((torch.randn(shape) / shape[-1] ** 0.5).to(stored) for _ in range(count))

        biases = tuple(bias.to(dtype) for bias in tensors(width))
        w = ExpertWeights(
            tensors(width, hidden), tensors(width, hidden), tensors(hidden, width), biases
        )
        x, share = rows(hidden, dtype), torch.rand(ROWS, k)
        ids = torch.stack([torch.randperm(count)[:k] for _ in range(ROWS)])

        def routed(
            ops: CpuOps, at: Tensor, w: Any = w, x: Any = x, share: Any = share, ids: Any = ids
        ) -> Any:
            return (ops.experts(x[at], share[at], ids[at], ops.prepare_experts(w, "silu", dtype)),)

        def some(ops: CpuOps, at: Tensor, w: Any = w, x: Any = x, ids: Any = ids) -> Any:
            """The rows of half of the experts, as a rank that holds these computes them."""
            here = ids % 2 == 0
            kept = ids.masked_fill(~here, len(w.gate_FD))
            pairs = ops.expert_rows(x[at], kept[at], ops.prepare_experts(w, "silu", dtype))
            return (pairs.masked_fill(~here[at].unsqueeze(2), 0).flatten(1),)

        def dense(ops: CpuOps, at: Tensor, w: Any = w, x: Any = x) -> Any:
            one = ExpertWeights(*(tensors[:1] for tensors in w))
            return (ops.experts(x[at], None, None, ops.prepare_experts(one, "gelu", dtype)),)

        named[f"experts {count, k, width, hidden}"] = routed
        named[f"rows of experts {count, k, width, hidden}"] = some
        named[f"dense {width, hidden}"] = dense
    return named


def pointwise(dtype: torch.dtype) -> dict[str, RowWise]:
    named: dict[str, RowWise] = {}
    for size in (1, 33, 1000):
        x, y, w = rows(size, dtype), rows(size, dtype), torch.randn(size).to(dtype)
        gate = torch.randn(ROWS, 1)
        named[f"clip {size}"] = lambda ops, at, x=x: (ops.clip(x[at], 0.5),)
        named[f"norm {size}"] = lambda ops, at, x=x, w=w: (ops.rms_norm(x[at], w, 1e-6),)
        named[f"add norm {size}"] = lambda ops, at, x=x, y=y, w=w: ops.add_rms_norm(
            x[at], y[at], 0.3, w, 1e-6
        )
        wide = torch.randn(size)
        named[f"norm by float32 {size}"] = lambda ops, at, x=x, w=wide: (
            ops.rms_norm(x[at], w, 1e-6),
        )
        named[f"gated norm {size}"] = lambda ops, at, x=x, y=y, w=w: (
            ops.gated_norm(x[at], y[at], 0, w, 1e-6),
        )
        named[f"gates of heads {size}"] = lambda ops, at, x=x, y=y: (
            ops.gate_heads(x[at].unsqueeze(1), y[at], HeadGates(0, 0)).squeeze(1),
        )
        named[f"gated {size}"] = lambda ops, at, x=x, y=y, gate=gate: (
            ops.add_gated(x[at], y[at], gate[at]),
        )
    pairs, share = rows(3 * 33, dtype).view(ROWS, 3, 33), torch.rand(ROWS, 3)
    named["combine"] = lambda ops, at: (ops.combine(pairs[at], share[at]),)
    logits = rows(33, torch.float32)
    named["softcap"] = lambda ops, at: (ops.softcap(logits[at], 30.0),)
    named["divide"] = lambda ops, at: (ops.divide(logits[at], 3.0),)
    positions, inverse = torch.randint(0, 100_000, (ROWS,)), torch.rand(33)
    named["rotation"] = lambda ops, at: ops.rotation(positions[at], inverse, 1.1)
    qkv, norm, angles = (
        torch.randn(ROWS, 6 * 33).to(dtype),
        torch.randn(33).to(dtype),
        torch.randn(ROWS, 12),
    )

    def rotated(ops: CpuOps, at: Tensor) -> tuple[Tensor, ...]:
        cache = empty_cache(ops, 10, 7, 1, 33, dtype)
        turn = Rotation(angles[at].cos(), angles[at].sin())
        return (
            ops.rotate_and_store(
                qkv[at], turn, cache, torch.randperm(70)[: len(at)], norm, norm, 1e-6
            ),
        )

    named["rotate and store"] = rotated
    return named


def samplings(vocab: int) -> dict[str, RowWise]:
    """Rows of one tensor, chosen by their numbers, each with parameters of its own."""
    x, heat, uniform = (
        4 * torch.randn(ROWS, vocab),
        torch.rand(ROWS) + 0.3,
        torch.rand(ROWS).double(),
    )
    counts = [(9, 0, 1, 700)[row % 4] for row in range(ROWS)]

    def best(ops: CpuOps, at: Tensor) -> tuple[Tensor, ...]:
        rows = at.tolist()
        wanted = [min(counts[row], vocab) for row in rows]
        found = ops.log_softmax_top_k(x, rows, wanted, heat[at].tolist())
        padded = [F.pad(ids, (0, vocab - len(ids)), value=-1) for ids in found.ids.split(wanted)]
        return found.log_sums_R, torch.stack(padded)

    def drawn(ops: CpuOps, at: Tensor) -> tuple[Tensor, ...]:
        return (torch.tensor(ops.draw(x, at.tolist(), heat[at].tolist(), uniform[at].tolist())),)

    def shaped(ops: CpuOps, at: Tensor) -> tuple[Tensor, ...]:
        shapings = [
            Shaping({3: 0.1}, (5, row % vocab), [row % vocab], 1.3, 0.2, 0.3, [0])
            for row in at.tolist()
        ]
        with ops.shaped(x, at.tolist(), shapings):
            return (x[at],)

    return {f"top k of {vocab}": best, f"draw of {vocab}": drawn, f"shaping of {vocab}": shaped}


def choices(dtype: torch.dtype) -> dict[str, RowWise]:
    """What computes in float32 whatever the model's dtype."""
    named: dict[str, RowWise] = {}
    for vocab in (33, 20_001):
        named |= samplings(vocab)
    logits, bias = torch.randn(ROWS, 40), torch.randn(40)
    config = RouterConfig(
        40, 5, "sigmoid", "renorm", selection_bias=True, num_groups=4, groups_kept=2, scale=2.5
    )
    named["route"] = lambda ops, at: ops.route(logits[at], config, bias)
    return named


def float16_products(dtype: torch.dtype) -> dict[str, RowWise]:
    """float16 weights, widened where they lie; bfloat16 does not hold them."""
    return products(dtype, torch.float16) if dtype == torch.float32 else {}


@pytest.mark.parametrize(
    "operations", [products, float16_products, pointwise, choices], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_a_row_does_not_know_its_neighbours(isa: str, dtype: torch.dtype, operations: Any) -> None:
    """Alone and among 1 to 69 others, in any order, on 1, 2 and 3 threads."""
    rng = random.Random(0)
    sets = [[rng.randrange(ROWS)] for _ in range(4)]
    counts = (2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 70)
    sets += [rng.sample(range(ROWS), n) for n in counts]
    for name, operation in operations(dtype).items():
        expected = [bits(x) for x in operation(level(isa, 1), torch.arange(ROWS))]
        for i, chosen in enumerate(sets):
            at = torch.tensor(chosen)
            for out, whole in zip(operation(level(isa, 1 + i % 3), at), expected, strict=True):
                assert torch.equal(bits(out), whole[at]), (
                    f"{name}: rows {chosen} on {1 + i % 3} threads"
                )


class Prompt:
    """One sequence whose rows can be attended to in any cut, beside other sequences."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        length: int,
        dtype: torch.dtype,
        value_dim: int = 0,
        **options: Any,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim = shape
        self.value_dim = value_dim or self.head_dim
        self.dtype, self.options = dtype, options
        self.q = torch.randn(length, self.heads, self.head_dim).to(dtype)
        self.k = torch.randn(length, self.kv_heads, self.head_dim).to(dtype)
        self.v = torch.randn(length, self.kv_heads, self.value_dim).to(dtype)

    def rows(
        self, ops: CpuOps, start: int, stop: int, block_size: int, others: int = 0, seed: int = 0
    ) -> Tensor:
        """Rows start to stop - 1, computed in one step as one chunk, as bits."""
        generator = random.Random(seed)
        keys, values, new, q = (
            [self.k[:stop]],
            [self.v[:stop]],
            [stop - start],
            [self.q[start:stop]],
        )
        for _ in range(others):
            n, m = generator.randint(1, 90), generator.randint(1, 20)
            keys.append(torch.randn(n, self.kv_heads, self.head_dim).to(self.dtype))
            values.append(torch.randn(n, self.kv_heads, self.value_dim).to(self.dtype))
            new.append(min(n, m))
            q.append(torch.randn(new[-1], self.heads, self.head_dim).to(self.dtype))
        at = generator.randint(0, others)
        for each in (keys, values, new, q):
            each.insert(at, each.pop(0))  # type: ignore[attr-defined]
        out = Sequences(keys, values, new).attend(
            ops, torch.cat(q), self.head_dim**-0.5, block_size, seed=seed, **self.options
        )
        first = sum(new[:at])
        return bits(out[first : first + new[at]])


@pytest.mark.parametrize(
    ("isa", "cache", "shape", "options"),
    covering.pairwise(
        LEVELS,
        CACHES,
        [(4, 2, 64), (71, 1, 16), (7, 1, 33), (4, 2, 24, 40)],
        [{}, {"window": 50}, {"softcap": 4.0, "sinks": True}],
    ),
    ids=str,
)
def test_attention_does_not_know_its_step(
    isa: str,
    cache: tuple[torch.dtype, torch.dtype | None],
    shape: Any,
    options: dict[str, Any],
) -> None:
    """A prompt at once, in chunks cut anywhere and token by token, beside others, in blocks of 1 to
    64 tokens."""
    dtype, kv_dtype = cache
    length, rng = 140, random.Random(1)
    sinks = torch.randn(shape[0]) if "sinks" in options else None
    kept = {name: value for name, value in options.items() if name != "sinks"}
    if kv_dtype is not None:
        kept |= {"kv_dtype": kv_dtype, "key_offset_GN": torch.randn(shape[1:3])}
    prompt = Prompt(shape[:3], length, dtype, *shape[3:], **kept, sinks_H=sinks)
    whole = prompt.rows(level(isa, 1), 0, length, 16)
    for i, block_size in enumerate((8, 64, 16, 24, 1, 3, 7)):
        cuts = sorted({0, length, *rng.sample(range(1, length), rng.randint(0, 4))})
        for start, stop in pairwise(cuts):
            out = prompt.rows(level(isa, 1 + i % 3), start, stop, block_size, others=i % 4, seed=i)
            assert torch.equal(out, whole[start:stop]), (
                f"rows {start} to {stop} in blocks of {block_size}"
            )
        for at in rng.sample(range(length), 3):
            out = prompt.rows(
                level(isa, 1 + i % 3), at, at + 1, block_size, others=(i + 1) % 4, seed=i
            )
            assert torch.equal(out, whole[at : at + 1]), f"row {at} in blocks of {block_size}"


@pytest.mark.parametrize("window", [None, 1090])
@pytest.mark.parametrize(("dtype", "kv_dtype"), CACHES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_long_contexts_are_split_at_the_same_places(
    isa: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, window: int | None
) -> None:
    # Of the rows around 2,048 some have their window's start in one tile of 64 keys, some in the
    # next.
    prompt = Prompt((4, 1, 64), 2200, dtype, window=window, kv_dtype=kv_dtype)
    for start, stop in ((1015, 1035), (2040, 2058), (2190, 2200)):
        chunk = prompt.rows(level(isa, 1), start, stop, 16)
        for i, at in enumerate(range(start, stop, 3)):
            block_size = (8, 64, 24, 16, 7)[i % 5]
            out = prompt.rows(level(isa, 1 + i % 3), at, at + 1, block_size, others=i % 3, seed=i)
            assert torch.equal(out, chunk[at - start : at - start + 1]), (
                f"row {at} in blocks of {block_size}"
            )


@pytest.mark.parametrize(("dtype", "kv_dtype"), CACHES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_what_is_cached_does_not_know_its_step(
    isa: str, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    """Keys and values written in one step, in chunks or token by token leave the same bits in the
    cache."""
    tokens, block_size, rng = 41, 8, random.Random(0)
    q, k, v = (torch.randn(tokens, n, 20).to(dtype) for n in (6, 3, 3))
    norm, angles = torch.randn(20).to(dtype), torch.randn(tokens, 10)
    table = torch.randperm(6).tolist()
    slots = StepInputs.build([[0] * tokens], [0], [table], block_size).slot_mapping
    buffers = []
    for cuts in (
        [0, tokens],
        [*range(tokens + 1)],
        sorted({0, tokens, *rng.sample(range(tokens), 5)}),
    ):
        for threads in (1, 3):
            ops = level(isa, threads)
            cache = empty_cache(ops, 6, block_size, 3, 20, kv_dtype or dtype)
            for start, stop in pairwise(cuts):
                part = slice(start, stop)
                rows = side_by_side(q[part], k[part], v[part])
                turn = Rotation(angles[part].cos(), angles[part].sin())
                ops.rotate_and_store(rows, turn, cache, slots[part], norm, norm, 1e-6)
            buffers.append(cache.buffer)
    assert all(torch.equal(buffer, buffers[0]) for buffer in buffers)


def test_two_callers_at_once() -> None:
    """Each gets what it gets alone: what an operation keeps between calls is one caller's at a
    time."""
    ops, gates = CpuOps(2), [torch.randn(64, 48) for _ in range(6)]
    experts = ops.prepare_experts(
        ExpertWeights(gates[:3], gates[3:], [torch.randn(48, 64) for _ in range(3)]), "silu"
    )
    linear = ops.prepare_linear((torch.randn(300, 48), None))

    def answers(rows: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, 48, generator=generator)
        ids = torch.randint(0, 3, (rows, 1), generator=generator)
        return [ops.experts(x, torch.ones(rows, 1), ids, experts), ops.linear(x, linear)]

    alone = {rows: [bits(out) for out in answers(rows)] for rows in (3, 70)}
    with ThreadPoolExecutor(2) as pool:
        for rows, found in pool.map(lambda rows: (rows, answers(rows)), (3, 70) * 200):
            assert all(
                torch.equal(bits(out), one) for out, one in zip(found, alone[rows], strict=True)
            )
