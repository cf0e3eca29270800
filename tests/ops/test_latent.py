"""Latent attention: the reference and the kernels of every instruction set against keys and values
that are made of latents one by one, and the same bits however a sequence is cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from covering import each_value
from moebius.errors import ConfigError
from moebius.ops import FORMATS, Feature, Matrix, Operation, Ops, Use
from moebius.ops.cache_spec import key_value_planes, latent_spec
from moebius.ops.config import Temperature
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation, StepInputs
from moebius.quantize.encode import encoded
from ops.levels import LEVELS, ROUNDOFF, assert_within, bits, level

REF = ReferenceOps()
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module", params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Ops:
    return REF if request.param == "reference" else level(request.param, threads=2)


@dataclass(frozen=True)
class Sizes:
    """Heads, what does not turn of a query and what does, a latent and a value head."""

    heads: int
    plain: int
    turning: int
    latent: int
    value: int


# Odd ones; several vectors with and without a rest; more heads than one item takes.
SIZES = [
    Sizes(3, 5, 4, 13, 7),
    Sizes(16, 16, 8, 48, 24),
    Sizes(20, 24, 16, 80, 33),
    Sizes(70, 8, 2, 33, 9),
]


class Layer:
    """One layer's random weights, and what a step of it is."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, temperature: Temperature | None = None):
        self.sizes = sizes
        self.dtype = dtype
        self.temperature = temperature
        rows = sizes.heads * sizes.latent
        self.keys = (torch.randn(rows, sizes.plain) / sizes.plain**0.5).to(dtype)
        rows = sizes.heads * sizes.value
        self.values = (torch.randn(rows, sizes.latent) / sizes.latent**0.5).to(dtype)
        self.norm = (1 + 0.3 * torch.randn(sizes.latent)).to(dtype)
        self.inverse = 100 ** -(torch.arange(sizes.turning // 2) / (sizes.turning // 2))
        self.scale = (sizes.plain + sizes.turning) ** -0.5

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Queries (T, H, K + P), and latents with keys (T, C + P)."""
        sizes = self.sizes
        q = torch.randn(count, sizes.heads, sizes.plain + sizes.turning)
        return q.to(self.dtype), torch.randn(count, sizes.latent + sizes.turning).to(self.dtype)

    def rotation(self, positions: Tensor) -> Rotation:
        angles = positions.float().unsqueeze(1) * self.inverse
        return Rotation(angles.cos(), angles.sin(), interleaved=True)

    def cache(self, ops: Ops, blocks: int, block_size: int) -> Any:
        """In which whatever nobody wrote is NaN."""
        spec = latent_spec(self.sizes.latent, self.sizes.turning, self.dtype)
        size = ops.cache_bytes_per_block(spec, block_size) * blocks
        return ops.make_cache(torch.full((size,), 255, dtype=torch.uint8), spec, block_size)

    def expanded(self, q: Tensor, latents: Tensor) -> Tensor:
        """Of one whole sequence in float64, with keys and values of every head: (T, H, V)."""
        sizes = self.sizes
        count = len(q)
        latent = latents[:, : sizes.latent].double()
        latent = latent * torch.rsqrt(latent.square().mean(1, keepdim=True) + EPS)
        latent = latent * self.norm.double()
        key_of = self.keys.double().view(sizes.heads, sizes.latent, sizes.plain)
        value_of = self.values.double().view(sizes.heads, sizes.value, sizes.latent)
        out = torch.zeros(count, sizes.heads, sizes.value, dtype=torch.float64)
        shared = torch.stack([self.turned(latents[t, sizes.latent :], t) for t in range(count)])
        turned = torch.stack([self.turned(q[t, :, sizes.plain :], t) for t in range(count)])
        for h in range(sizes.heads):
            keys = latent @ key_of[h]
            values = latent @ value_of[h].T
            for t in range(count):
                grown = 1.0
                if self.temperature is not None:
                    periods = t // self.temperature.original
                    grown = 1 + self.temperature.beta * math.log(1 + periods)
                scores = keys[: t + 1] @ q[t, h, : sizes.plain].double()
                scores += shared[: t + 1] @ turned[t, h]
                weights = torch.softmax(scores * grown * self.scale, 0)
                out[t, h] = weights @ values[: t + 1]
        return out

    def turned(self, x: Tensor, position: int) -> Tensor:
        angles = position * self.inverse.double()
        a, b = x.double()[..., 0::2], x.double()[..., 1::2]
        pairs = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        return torch.stack(pairs, dim=-1).flatten(-2)


class Run:
    """A cache, and sequences that bring their rows in any pieces."""

    def __init__(self, layer: Layer, ops: Ops, block_size: int, blocks: int = 40) -> None:
        self.layer = layer
        self.ops = ops
        self.block_size = block_size
        self.cache = layer.cache(ops, blocks, block_size)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(block_size))
        self.free = order.tolist()
        self.tables: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    def step(self, *work: tuple[int, Tensor, Tensor]) -> list[Tensor]:
        """What comes out for each (sequence, queries, latents)."""
        starts = [self.done.get(sequence, 0) for sequence, _, _ in work]
        tables = []
        for (sequence, q, _), start in zip(work, starts, strict=True):
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.block_size < start + len(q):
                table.append(self.free.pop())
            tables.append(table)
            self.done[sequence] = start + len(q)
        step = StepInputs.build([[0] * len(q) for _, q, _ in work], starts, tables, self.block_size)
        layer = self.layer
        heads = layer.sizes.heads
        ops = self.ops
        met = ops.head_products(
            torch.cat([q for _, q, _ in work]), ops.prepare_heads(layer.keys, heads, layer.dtype)
        )
        met = ops.rotate_and_store_latent(
            met,
            torch.cat([latents for _, _, latents in work]),
            layer.rotation(step.positions),
            self.cache,
            step.slot_mapping,
            layer.norm,
            EPS,
            temperature=layer.temperature,
            positions_T=step.positions,
        )
        found = ops.paged_attention(
            met, self.cache, ops.plan_attention(step, self.block_size), layer.scale
        )
        out = ops.head_products(found, ops.prepare_heads(layer.values, heads, layer.dtype))
        return list(out.split([len(q) for _, q, _ in work]))


@pytest.mark.parametrize(
    ("block_size", "sizes", "dtype"), each_value([5, 16], SIZES, ROUNDOFF), ids=str
)
def test_it_is_attention_over_the_keys_and_values_of_latents(
    backend: Ops, sizes: Sizes, dtype: torch.dtype, block_size: int
) -> None:
    layer = Layer(sizes, dtype)
    q, latents = layer.rows(83)
    run = Run(layer, backend, block_size)
    parts = [run.step((0, q[a:b], latents[a:b]))[0] for a, b in ((0, 70), (70, 82), (82, 83))]
    exact = layer.expanded(q, latents)
    # bfloat16 rounds queries that meet latents, latents, weights and what was found.
    assert_within(torch.cat(parts), exact, 40 * ROUNDOFF[dtype] * (1 + exact.abs().max()))


def test_queries_grow_with_their_position(backend: Ops) -> None:
    layer = Layer(SIZES[0], torch.float32, Temperature(0.7, 8))
    q, latents = layer.rows(30)
    out = Run(layer, backend, 4).step((0, q, latents))[0]
    assert_within(out, layer.expanded(q, latents), 1e-5)
    layer.temperature = None
    still = Run(layer, backend, 4).step((0, q, latents))[0]
    assert torch.equal(bits(out[:8]), bits(still[:8])) and not torch.equal(out[8:], still[8:])


def test_nothing_turns_without_positions(backend: Ops) -> None:
    layer = Layer(SIZES[0], torch.float32)
    layer.inverse = torch.empty(0)
    q, latents = layer.rows(11)
    out = Run(layer, backend, 4).step((0, q, latents))[0]
    layer.inverse = torch.zeros(SIZES[0].turning // 2)
    assert_within(out, layer.expanded(q, latents), 1e-5)


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(isa: str, dtype: torch.dtype, sizes: Sizes) -> None:
    """Promise P1: token by token alone; in chunks beside others, with other blocks and threads."""
    layer = Layer(sizes, dtype)
    q, latents = layer.rows(75)
    others = [layer.rows(count) for count in (9, 66)]
    alone = Run(layer, level(isa, threads=1), 16, blocks=8)
    single = [alone.step((0, q[t : t + 1], latents[t : t + 1]))[0] for t in range(75)]
    beside = Run(layer, level(isa, threads=2), 5, blocks=60)
    first = beside.step((1, *others[0]), (0, q[:33], latents[:33]), (2, *others[1]))[1]
    more = [rows[:1] for rows in others[0]]
    second = beside.step((0, q[33:], latents[33:]), (1, more[0], more[1]))[0]
    assert torch.equal(bits(torch.cat(single)), bits(torch.cat((first, second))))


def test_many_keys_are_split_over_threads_with_the_same_bits() -> None:
    """Where there are few rows, splits of the keys and some of the heads are items each."""
    layer = Layer(SIZES[2], torch.bfloat16)
    q, latents = layer.rows(2100)
    out = []
    for threads in (1, 2):
        run = Run(layer, level(LEVELS[-1], threads), 16, blocks=140)
        run.step((0, q[:-1], latents[:-1]))
        out.append(run.step((0, q[-1:], latents[-1:]))[0])
    assert torch.equal(bits(out[0]), bits(out[1]))


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "q8_0", "q5_0", "q4_k"])
def test_heads_meet_matrices_of_their_own(backend: Ops, dtype: torch.dtype, name: str) -> None:
    """In any format, and with the same bits for a row alone as among many."""
    if name == "float32" and dtype == torch.bfloat16:
        pytest.skip("is wider than what is computed in")
    heads, rows, columns, kept = 5, 70, 256, 3
    plain = torch.randn(heads * rows, columns) / 16
    weight: Any = plain.to(getattr(torch, name)) if name in ("float32", "bfloat16") else None
    if weight is None:
        weight = Matrix(FORMATS[name], tuple(plain.shape), (encoded(plain, name),))
    numbers = Matrix.of(weight).widened(torch.float32).double().view(heads, rows, columns)
    x = torch.randn(21, heads, columns + kept).to(dtype)
    out = backend.head_products(x, backend.prepare_heads(weight, heads, dtype))
    exact = torch.einsum("hoi,thi->tho", numbers, x[..., :columns].double())
    # Beside blocks, activations have 8 bits.
    bound = 20 * ROUNDOFF[dtype] + (0 if name in ("float32", "bfloat16") else 2.0**-6)
    assert_within(out[..., :rows], exact, bound * (1 + exact.abs().max()))
    assert torch.equal(out[..., rows:], x[..., columns:])
    if isinstance(backend, CpuOps):
        prepared = backend.prepare_heads(weight, heads, dtype)
        for t in (0, 20):
            alone = backend.head_products(x[t : t + 1].contiguous(), prepared)
            assert torch.equal(bits(alone[0]), bits(out[t]))


def test_a_token_takes_its_latent_and_its_key_once(backend: Ops) -> None:
    spec = latent_spec(512, 64, torch.bfloat16)
    assert spec.bytes_per_token == 2 * 576
    assert backend.cache_bytes_per_block(spec, 16) == 16 * 2 * 576
    keys, values = key_value_planes(spec)
    assert (keys.shape, values.shape) == ((1, 576), (1, 512))


def test_latents_are_no_codes(backend: Ops) -> None:
    with pytest.raises(ConfigError, match="not as codes of 8 bits"):
        backend.cache_bytes_per_block(latent_spec(512, 64, torch.int8), 16)
    features = frozenset({Feature.LATENT, Feature.INT8_CACHE})
    assert backend.capability(Use(Operation.PAGED_ATTENTION, torch.float32, features)) is None


def test_what_does_not_fit_is_refused() -> None:
    ops = level(LEVELS[0], threads=1)
    layer = Layer(SIZES[0], torch.float32)
    q, latents = layer.rows(2)
    with pytest.raises(ValueError, match="are no matrices of 4 heads"):
        ops.prepare_heads(layer.keys, 4)
    with pytest.raises(ValueError, match="3 heads of at least 13"):
        ops.head_products(q, ops.prepare_heads(layer.values, 3))
    cache = layer.cache(ops, 2, 4)
    with pytest.raises(ValueError, match="queries"):
        slots = torch.tensor([0, 1])
        ops.rotate_and_store_latent(
            q, latents, layer.rotation(slots), cache, slots, layer.norm, EPS
        )
    met = ops.head_products(q, ops.prepare_heads(layer.keys, 3))
    with pytest.raises(IndexError, match="slot 8 is none of 8"):
        slots = torch.tensor([0, 8])
        ops.rotate_and_store_latent(
            met, latents, layer.rotation(slots), cache, slots, layer.norm, EPS
        )
