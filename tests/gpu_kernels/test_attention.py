"""Paged attention in Triton beside plain PyTorch in float64, over the same cache."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops.cache_spec import CacheSpec, key_value_spec, latent_spec
from moebius.ops.capability import Feature, Operation, Use
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs
from moebius.ops.triton import TritonOps, attention
from moebius.ops.triton.kernels import attention as kernels

OPS = TritonOps()
REF = ReferenceOps()
DTYPES = [torch.bfloat16, torch.float32]
# Half of the distance between 1 and the next number.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several."""
    monkeypatch.setattr(attention, "SPLIT", 64)


@dataclass(frozen=True)
class Drawn:
    """Sequences of so many keys, the last rows of which are asked for."""

    q: Sequence[Tensor]
    k: Sequence[Tensor]
    v: Sequence[Tensor]

    @classmethod
    def of(
        cls, lengths: Sequence[tuple[int, int]], heads: tuple[int, int, int, int], dtype: Any
    ) -> Drawn:
        """lengths: keys and rows of each. heads: query heads, key heads, sizes of both."""
        num_heads, kv_heads, key_size, value_size = heads

        def some(count: int, *shape: int) -> Tensor:
            return torch.randn(count, *shape).to(DEVICE, dtype)

        return cls(
            [2 * some(rows, num_heads, key_size) for _, rows in lengths],
            [some(keys, kv_heads, key_size) for keys, _ in lengths],
            [some(keys, kv_heads, value_size) for keys, _ in lengths],
        )

    def of_dtype(self, dtype: torch.dtype) -> Drawn:
        return Drawn(*([x.to(dtype) for x in each] for each in (self.q, self.k, self.v)))

    def only(self, b: int, rows: slice = slice(None), keys: int | None = None) -> Drawn:
        """One of them, with some of its rows, as if it had no more than so many keys."""
        return Drawn([self.q[b][rows]], [self.k[b][:keys]], [self.v[b][:keys]])

    def attend(
        self,
        ops: Ops,
        scale: float,
        *,
        spec: CacheSpec | None = None,
        offset: Tensor | None = None,
        window: int | None = None,
        firsts: Sequence[int] | None = None,
        whole: bool = False,
        block_size: int = 16,
        **options: Any,
    ) -> Tensor:
        """In a cache in random places that is NaN wherever nothing is written, and in whose tables
        blocks that no row sees are nowhere."""
        _, kv_heads, key_size = self.k[0].shape
        dtype = self.q[0].dtype
        if spec is None:
            spec = key_value_spec(kv_heads, key_size, dtype, self.v[0].shape[2])
        counts = [-(-len(k) // block_size) for k in self.k]
        order = torch.randperm(sum(counts) + 2).tolist()
        tables = [[order.pop() for _ in range(count)] for count in counts]
        size = ops.cache_bytes_per_block(spec, block_size) * (sum(counts) + 2)
        memory = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
        cache: Any = ops.make_cache(memory, spec, block_size, offset)
        written = StepInputs.build(
            [[0] * len(k) for k in self.k], [0] * len(tables), tables, block_size
        )
        slots = written.slot_mapping.to(DEVICE)
        cache.write(torch.cat(list(self.k)), torch.cat(list(self.v)), slots)
        unseen = written.block_table_host[:]
        for b in range(len(tables)):
            first = firsts[b] if firsts else 0
            if window is not None:
                first = max(first, len(self.k[b]) - len(self.q[b]) - window + 1)
            for i in range(first // block_size):
                unseen[b * written.max_blocks + i] = -1
        rows = [len(q) for q in self.q]
        step = replace(
            written,
            device=DEVICE,
            input_ids_host=array("q", [0] * sum(rows)),
            positions_host=array("q", [0] * sum(rows)),
            query_start_host=array("i", [0, *accumulate(rows)]),
            block_table_host=unseen,
            first_keys_host=array("i", firsts) if firsts else None,
            whole=whole,
        )
        plan = ops.plan_attention(step, block_size, window)
        return ops.paged_attention(torch.cat(list(self.q)), cache, plan, scale, **options)


def assert_attends(drawn: Drawn, scale: float, **options: Any) -> None:
    """The bound is of the sum of the values' sizes, by attending to those."""
    found = drawn.attend(OPS, scale, **options)
    dtype = drawn.q[0].dtype
    wide = drawn.of_dtype(torch.float64)
    exact = wide.attend(REF, scale, **options)
    sizes = Drawn(wide.q, wide.k, [v.abs() for v in wide.v]).attend(REF, scale, **options)
    assert found.dtype == dtype and found.shape == exact.shape
    # Rounded: each weight, and the result. Scores are below 64: their exponential is off by as
    # many roundings of float32.
    bound = (2.1 * ROUNDOFF[dtype] + 64 * 2.0**-23) * sizes
    assert ((found.double() - exact).abs() <= bound).all()


LENGTHS = [(150, 1), (70, 20), (5, 5), (1, 1), (130, 3), (40, 0)]


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((4, 2, 16, 16), torch.bfloat16),
        ((3, 1, 6, 20), torch.float32),
        ((1, 1, 40, 33), torch.bfloat16),
        ((7, 1, 80, 16), torch.float32),
    ],
    ids=str,
)
def test_chunks_and_decodes(heads: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert_attends(Drawn.of(LENGTHS, heads, dtype), heads[2] ** -0.5, block_size=heads[1] * 8)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 67, "sinks_H": torch.randn(2)},
        {"softcap": 5.0},
        {"bias_HR": 2 * torch.randn(2, 19), "softcap": 5.0, "sinks_H": torch.randn(2)},
        {"firsts": [100, 3, 0, 65], "bias_HR": torch.randn(2, 1)},
        {"whole": True, "bias_HR": torch.randn(2, 19)},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_else_scores_are_made_of(options: dict[str, Any]) -> None:
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    assert_attends(
        Drawn.of([(150, 1), (70, 20), (1, 1), (130, 3)], (2, 1, 16, 16), torch.bfloat16),
        0.25,
        **options,
        block_size=5,
    )


def test_more_rows_than_keys_where_rows_see_all() -> None:
    assert_attends(Drawn.of([(3, 30), (70, 2)], (2, 1, 16, 16), torch.float32), 0.2, whole=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"sinks_H": torch.randn(2)}], ids=["plain", "sinks"])
def test_codes_and_what_they_are_held_less(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Beside the reference on the same codes, which widens them to float32."""
    drawn = Drawn.of([(150, 1), (70, 20)], (2, 2, 40, 24), dtype)
    spec = key_value_spec(2, 40, torch.int8, 24)
    offset = torch.randn(2, 40, device=DEVICE)
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    found, wanted = (
        drawn.attend(ops, 0.2, spec=spec, offset=offset, **options) for ops in (OPS, REF)
    )
    # Values are below 5 and weights add up to 1 at most.
    bound = 5 * (2.1 * ROUNDOFF[dtype] + 64 * 2.0**-23)
    assert (found.float() - wanted.float()).abs().max() < bound


@pytest.mark.parametrize("sizes", [(32, 8), (24, 8), (40, 16)])
def test_latents(sizes: tuple[int, int]) -> None:
    """Values are the first ones of keys, be they as many as a tile has or not."""
    size, turned = sizes
    drawn = Drawn.of([(150, 1), (70, 20)], (6, 1, size + turned, size), torch.float32)
    drawn = replace(drawn, v=[k[..., :size] for k in drawn.k])
    spec = latent_spec(size, turned, torch.float32)
    found, wanted = (drawn.attend(ops, 0.2, spec=spec) for ops in (OPS, REF))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_wide_heads_and_more_heads_than_a_tile() -> None:
    assert_attends(Drawn.of([(70, 2)], (2, 1, 264, 512), torch.float32), 0.05)
    assert_attends(Drawn.of([(70, 2)], (71, 1, 16, 16), torch.float32), 0.2)


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.bfloat16, 70), (torch.float32, None)], ids=str
)
def test_a_row_has_the_same_bits_alone(dtype: torch.dtype, window: int | None) -> None:
    """In a chunk, whose splits one program goes through, and as a decode, whose splits are joined
    behind; beside others; in blocks of any size."""
    drawn = Drawn.of([(150, 40), (70, 1)], (2, 1, 16, 16), dtype)
    options: dict[str, Any] = {"window": window, "sinks_H": torch.randn(2, device=DEVICE)}
    together = drawn.attend(OPS, 0.25, **options)
    for row in (0, 17, 39):
        alone = drawn.only(0, slice(row, row + 1), 111 + row)
        for block_size in (16, 5):
            found = alone.attend(OPS, 0.25, **options, block_size=block_size)
            assert torch.equal(found[0], together[row])
    few = drawn.only(0, slice(8, 12), 122).attend(OPS, 0.25, **options)
    assert torch.equal(few, together[8:12])


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.int8)],
    ids=str,
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_a_row_does_not_see_is_nothing_to_it(
    bad: float, dtype: torch.dtype, kept: torch.dtype | None
) -> None:
    """A later token of its own chunk, in its tile of keys, whose key or value is broken; and one
    that its window has passed, but not that of the row before."""
    drawn = Drawn.of([(70, 20)], (2, 1, 16, 24), dtype)
    spec = None if kept is None else key_value_spec(1, 16, kept, 24)
    clean = drawn.attend(OPS, 0.25, spec=spec, window=30)
    for plane, key in product(("k", "v"), (55, 25)):
        broken = getattr(drawn, plane)[0].clone()
        broken[key, 0, 3] = bad
        found = replace(drawn, **{plane: [broken]}).attend(OPS, 0.25, spec=spec, window=30)
        # Rows are the positions 50 to 69.
        sees = torch.tensor([key <= at < key + 30 for at in range(50, 70)])
        assert torch.equal(found[~sees], clean[~sees])
        # A key of infinity may make a score of minus infinity, which is none.
        if plane == "v" or bad != bad:
            assert not found[sees].isfinite().flatten(1).all(1).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_latents_that_a_row_does_not_see_are_nothing_to_it(bad: float) -> None:
    drawn = Drawn.of([(70, 20)], (6, 1, 24, 16), torch.float32)
    spec = latent_spec(16, 8, torch.float32)
    keys = drawn.k[0]
    clean = replace(drawn, v=[keys[..., :16]]).attend(OPS, 0.2, spec=spec)
    keys[55, 0, 3] = bad
    found = replace(drawn, v=[keys[..., :16]]).attend(OPS, 0.2, spec=spec)
    assert torch.equal(found[:5], clean[:5]) and not found[5:].isfinite().flatten(1).all(1).any()


@pytest.mark.usefixtures("sums_in_order")
def test_few_parts_at_a_time_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are, those of one tile, and none."""
    drawn = Drawn.of([(150, 1), (70, 3), (200, 2)], (2, 1, 16, 16), torch.float32)
    found = []
    tile = 3 * 2 * 4 * (16 + 2) * 4
    for most in (2**27, tile, tile - 1):
        monkeypatch.setattr(attention, "PARTS_BYTES", most)
        found.append(drawn.attend(OPS, 0.25))
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_tiles_of_a_step() -> None:
    """By hand, in splits of 64: two rows a tile. The second sequence ends in the first split, the
    last one brings too many rows for parts."""
    new = [[0] * 3, [0], [], [0] * 17]
    step = StepInputs.build(new, [126, 10, 5, 100], [[0]] * 4, 1000)
    plan = OPS.plan_attention(step, 1000, 64)
    assert isinstance(plan, attention.TritonPlan)
    tiles = plan.of_rows(2)
    assert tiles.in_parts.tolist() == [[0, 0, 2, 63, 128, 0], [0, 2, 1, 65, 129, 2]]
    assert (tiles.splits, tiles.rows_in_parts, tiles.most_rows) == (2, 3, 2)
    in_order = tiles.in_order[:, :5].tolist()
    assert in_order[:2] == [[1, 3, 1, 0, 11], [3, 4, 2, 37, 102]]
    assert in_order[-1] == [3, 20, 1, 53, 117] and len(in_order) == 10
    assert tiles is plan.of_rows(2)


def test_a_step_without_rows() -> None:
    drawn = Drawn.of([(5, 0)], (4, 2, 16, 16), torch.float32)
    assert drawn.attend(OPS, 1.0).shape == (0, 4, 16)


def test_keys_that_no_step_has_are_refused() -> None:
    drawn = Drawn.of([(5, 2)], (4, 2, 16, 16), torch.float32)
    for firsts in ([4], [-1]):
        with pytest.raises(ValueError, match="a sequence of 5 tokens, 2 of them new"):
            drawn.attend(OPS, 1.0, firsts=firsts)
    with pytest.raises(ValueError, match="first keys of 2 sequences, where there are 1"):
        drawn.attend(OPS, 1.0, firsts=[0, 0])


def test_shapes_that_do_not_go_together_are_refused() -> None:
    drawn = Drawn.of([(5, 2)], (4, 2, 16, 16), torch.float32)
    for options, words in (
        ({"sinks_H": torch.zeros(3)}, "sinks are"),
        ({"bias_HR": torch.zeros(4, 4)}, "both sides of 0"),
        ({"bias_HR": torch.zeros(3, 5)}, "must be of 4 heads"),
    ):
        with pytest.raises(ValueError, match=words):
            drawn.attend(OPS, 1.0, **options)
    with pytest.raises(ValueError, match="3 query heads of 16 values cannot share 2 key heads"):
        replace(drawn, q=[q[:, :3] for q in drawn.q]).attend(OPS, 1.0)


def test_what_the_kernels_do_not_take_plain_pytorch_computes() -> None:
    drawn = Drawn.of([(70, 2)], (4, 2, 16, 16), torch.float64)
    found, wanted = (drawn.attend(ops, 0.25) for ops in (OPS, REF))
    torch.testing.assert_close(found, wanted)


def test_it_is_declared() -> None:
    for operation in (Operation.ROTATE_AND_STORE, Operation.PAGED_ATTENTION):
        for feature in (*Feature, None):
            for dtype, by in ((torch.bfloat16, "triton"), (torch.float64, "reference")):
                use = Use(operation, dtype, frozenset({feature} if feature else ()))
                found = OPS.capability(use)
                assert found is not None and found.by == by and not found.batch_invariant
    latent_codes = frozenset({Feature.LATENT, Feature.INT8_CACHE})
    assert OPS.capability(Use(Operation.PAGED_ATTENTION, torch.bfloat16, latent_codes)) is None


def test_splits_and_tiles_of_keys_end_at_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for size, dtype in product((6, 64, 80, 128, 192, 256, 576), DTYPES):
        assert attention.SPLIT % attention.sizes_of(size, size, dtype).keys == 0
        main, rest = attention.key_tiles(size)
        assert main + rest >= size and all(
            n == 0 or (n >= 16 and n & (n - 1) == 0) for n in (main, rest)
        )
    assert attention.key_tiles(576) == (512, 64) and attention.key_tiles(112) == (128, 0)


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
@pytest.mark.parametrize(
    ("heads", "sinks"),
    [((32, 4, 128, 128), False), ((64, 8, 64, 64), True)],
    ids=["qwen3-30b-a3b", "gpt-oss-20b"],
)
def test_registers_are_enough(
    heads: tuple[int, int, int, int], sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is spilled is read back for each tile of keys. With four warps for heads of 64 some 90
    registers of a thread were."""
    monkeypatch.setattr(attention, "SPLIT", 512)
    options = {"sinks_H": torch.zeros(heads[0])} if sinks else {}
    with launches() as seen:
        drawn = Drawn.of([(1100, 1), (40, 40)], heads, torch.bfloat16)
        drawn.attend(OPS, 0.1, window=128 if sinks else None, **options)
    attends = [each for each in seen if each.name.startswith("attend")]
    assert len(attends) == 2, "a decode's and a prompt's"
    assert_compile(attends, most_spilled=160)


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sizes of real models, where each also has to find its shared memory."""
    monkeypatch.setattr(attention, "SPLIT", 512)
    options = {"softcap": 50.0, "sinks_H": torch.zeros(8), "bias_HR": torch.zeros(8, 65)}
    coded = key_value_spec(2, 80, torch.int8, 96)
    latent = latent_spec(512, 64, torch.bfloat16)
    decode = (1100, 1)
    with launches() as seen:
        drawn = Drawn.of([decode, (40, 40)], (32, 8, 128, 128), torch.bfloat16)
        drawn.attend(OPS, 0.1, window=1024)
        drawn = Drawn.of([(40, 40)], (8, 2, 80, 96), torch.bfloat16)
        drawn.attend(OPS, 0.1, spec=coded, offset=torch.zeros(2, 80), **options)
        drawn = Drawn.of([(40, 40)], (8, 2, 80, 96), torch.float16)
        drawn.attend(OPS, 0.1, spec=coded)
        drawn.attend(OPS, 0.1)
        drawn = Drawn.of([decode], (16, 1, 576, 512), torch.bfloat16)
        drawn.attend(OPS, 0.1, spec=latent)
    assert_compile(seen, kernels)
