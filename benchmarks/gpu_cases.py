"""Operations of published models with arguments as a step has them, and the least that each has to
move and to compute: what `gpu_operations.py` and `gpu_costs.py` measure.

Sizes are those of benchmarks/peers/published.py. Bytes are those of weights, cached keys and values
and states that a call reads or writes, and of its rows in and out; what a kernel leaves in memory
for the next one of the same operation is not counted. Operations are those of products.

Legend of shape suffixes: moebius.ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_models import EXPONENT, STANDARD_DEVIATION, card_model
from gpu_timing import Call
from moebius.models.config import ModelConfig
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.mixers.gated_delta import GatedDelta
from moebius.nn.mixers.latent import MLA
from moebius.ops import ExpertWeights, LayerCache, Matrix, Ops, Rotation, Weight
from moebius.ops.cache_spec import CacheSpec, key_value_planes
from moebius.ops.config import RouterConfig
from moebius.ops.draws import Draw
from moebius.ops.formats import format_named
from moebius.ops.reference.attention import ReferenceCache
from moebius.ops.steps import StateInputs, StepInputs

COLD_BYTES = 256 * 2**20
"""What the calls of a round read at least, each of another copy: five times an H200's cache."""
MOST_CALLS = 128
"""Of a round. Launches wait in a queue for a device that sleeps, and it holds a thousand."""
BLOCK_SIZE = 16
DTYPE = torch.bfloat16
BF16 = "bfloat16"
# Where blocks of GGUF's formats have their float16 scales.
_SCALES_AT = {"q8_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}
_FP8_NAN = 0x7F


class Work(NamedTuple):
    """What is measured.

    calls        of one operation, each with a copy of its own of what is read from memory
    bytes        that one call has to read and write
    operations   floating-point, of one call's products
    """

    calls: Sequence[Call]
    bytes: float
    operations: float = 0.0


class Case(NamedTuple):
    """`make` takes memory, and time; so it is called when its turn comes."""

    name: str
    make: Callable[[], Work]


def model_of(name: str, small: bool) -> ModelConfig:
    """A published model's sizes, or those of a small one of its kind."""
    found: ModelConfig = card_model(name, small).sizes.model
    return found


def nbytes(*weights: Weight | None) -> int:
    return sum(Matrix.of(each).nbytes for each in weights if each is not None)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Draws what operations are given, on one device.

    small: for a rehearsal, with one copy of each
    """

    ops: Ops
    device: str
    small: bool

    def copies(self, size: float) -> int:
        """How many of so many bytes are more than a cache holds."""
        most = 1 if self.small else MOST_CALLS
        return min(most, max(1, -(-COLD_BYTES // max(1, int(size)))))

    def numbers(self, *shape: int, spread: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0, spread)

    def codes(self, *shape: int) -> Tensor:
        """Any bytes."""
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    def weight(self, name: str, rows: int, columns: int) -> Weight:
        """A matrix in a format, whose numbers are about as large as a trained one's."""
        if name == BF16:
            return self.numbers(rows, columns, spread=STANDARD_DEVIATION)
        format = format_named(name)
        shapes = [shape for _, shape in format.planes(rows, columns)]
        codes = self.codes(*shapes[0])
        planes: tuple[Tensor, ...] = (codes,)
        if name in _SCALES_AT:
            self._scale_blocks(name, codes.view(-1, format.nbytes))  # type: ignore[attr-defined]
        elif name == "mxfp4_planes":
            exponents = torch.full(shapes[1], EXPONENT, dtype=torch.uint8, device=self.device)
            planes = (codes, exponents)
        else:
            codes.masked_fill_(codes & _FP8_NAN == _FP8_NAN, 1)
            scales = self.numbers(*shapes[1], spread=1e-3, dtype=torch.float32)
            planes = (codes.view(torch.float8_e4m3fn), scales)
        return Matrix(format, (rows, columns), planes)

    def _scale_blocks(self, name: str, blocks_NY: Tensor) -> None:
        for at in _SCALES_AT[name]:
            scales = self.numbers(len(blocks_NY), 1, spread=1e-3, dtype=torch.float16)
            blocks_NY[:, at : at + 2] = scales.view(torch.uint8)

    def cache(self, spec: CacheSpec, blocks: int) -> LayerCache:
        """One layer's, full of drawn keys and values."""
        size = self.ops.cache_bytes_per_block(spec, BLOCK_SIZE) * blocks
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        cache = self.ops.make_cache(buffer, spec, BLOCK_SIZE)
        assert isinstance(cache, ReferenceCache), "whose layout the kernels read"
        for plane in (cache.k,) if cache.shared else (cache.k, cache.v):
            if plane.dtype == torch.int8:
                plane.random_(-127, 128)
            else:
                plane.normal_()
        for scales in cache.scales or ():
            scales.fill_(1 / 64)
        return cache

    def rotation(self, rows: int, half: int) -> Rotation:
        angles = torch.rand(rows, half, device=self.device)
        return Rotation(angles.cos(), angles.sin())


# Rows and linear layers


def linear(at: Inputs, sizes: Sequence[int], in_size: int, rows: int, format: str = BF16) -> Work:
    """Layers of so many outputs each, side by side."""
    first = [at.weight(format, size, in_size) for size in sizes]
    read = nbytes(*first)
    copies = [first]
    for _ in range(at.copies(read) - 1):
        copies.append([at.weight(format, size, in_size) for size in sizes])
    layers = [
        at.ops.prepare_linear(*((weight, None) for weight in each), dtype=DTYPE) for each in copies
    ]
    x_TI = at.numbers(rows, in_size)
    moved = read + 2 * rows * (in_size + sum(sizes))
    calls = [partial(at.ops.linear, x_TI, each) for each in layers]
    return Work(calls, moved, 2 * rows * in_size * sum(sizes))


def logits(at: Inputs, model: ModelConfig, rows: int) -> Work:
    """The output head, whose results are float32."""
    vocab = model.vocab_size
    hidden = model.hidden_size
    weights = [at.weight(BF16, vocab, hidden) for _ in range(at.copies(2 * vocab * hidden))]
    layers = [at.ops.prepare_linear((weight, None), dtype=DTYPE) for weight in weights]
    x_LD = at.numbers(rows, hidden)
    moved = 2 * vocab * hidden + rows * (2 * hidden + 4 * vocab)
    calls = [partial(at.ops.logits, x_LD, each) for each in layers]
    return Work(calls, moved, 2 * rows * hidden * vocab)


def add_rms_norm(at: Inputs, model: ModelConfig, rows: int) -> Work:
    """The stream and an update are read, the stream and its norm are written."""
    size = 2 * rows * model.hidden_size
    weight_D = at.numbers(model.hidden_size)
    calls = []
    for _ in range(at.copies(2 * size)):
        x_TD = at.numbers(rows, model.hidden_size)
        update_TD = at.numbers(rows, model.hidden_size)
        calls.append(partial(at.ops.add_rms_norm, x_TD, update_TD, 1.0, weight_D, model.norm_eps))
    return Work(calls, 4 * size + weight_D.nbytes)


def choose(at: Inputs, model: ModelConfig, rows: int, draw: Draw) -> Work:
    """A token of each row of logits."""
    size = 4 * rows * model.vocab_size
    draws = [draw] * rows
    calls = []
    for _ in range(at.copies(size)):
        logits_LV = at.numbers(rows, model.vocab_size, dtype=torch.float32)
        calls.append(partial(at.ops.choose, logits_LV, range(rows), draws))
    return Work(calls, size + 8 * rows)


# Experts


def router_of(part: FeedForwardConfig) -> RouterConfig:
    assert part.router is not None, "a layer of experts"
    return part.router


def route(at: Inputs, part: FeedForwardConfig, rows: int) -> Work:
    """Weights are float32, and expert ids int64."""
    router = router_of(part)
    size = 4 * rows * router.num_experts
    calls = []
    for _ in range(at.copies(size)):
        logits_TE = at.numbers(rows, router.num_experts, dtype=torch.float32)
        calls.append(partial(at.ops.route, logits_TE, router))
    return Work(calls, size + 12 * rows * router.top_k)


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """Rows, and the experts that they chose, anew for each call: ids of (T, K).

    of_one: bytes of an expert. hit: how many were chosen, a mean over the calls
    """

    x_TD: Tensor
    weights_TK: Tensor
    ids: Sequence[Tensor]
    experts: ExpertWeights
    part: FeedForwardConfig
    of_one: int
    hit: float

    @classmethod
    def of(
        cls, at: Inputs, part: FeedForwardConfig, hidden: int, rows: int, format: str = BF16
    ) -> ExpertInputs:
        router = router_of(part)
        count = router.num_experts
        experts = drawn_experts(at, part, hidden, format)
        biases = (each[0].nbytes for each in experts[3:] if each)
        of_one = nbytes(*(each[0] for each in experts[:3] if each)) + sum(biases)
        most = min(count, rows * router.top_k)
        ids = choices(rows, router, at.copies(most * of_one))
        return cls(
            at.numbers(rows, hidden),
            at.numbers(rows, router.top_k, dtype=torch.float32).softmax(1),
            [each.to(at.device) for each in ids],
            experts,
            part,
            of_one,
            sum(len(each.unique()) for each in ids) / len(ids),
        )

    @property
    def bytes(self) -> float:
        """Of the experts that were chosen, and of rows in and out."""
        rows = 2 * self.x_TD.nbytes + self.weights_TK.nbytes + self.ids[0].nbytes
        return self.hit * self.of_one + rows

    @property
    def operations(self) -> float:
        matrices = 3 if self.part.gated else 2
        each = matrices * self.part.width * self.x_TD.shape[1]
        return 2.0 * self.weights_TK.numel() * each

    def calls(self, ops: Ops) -> list[Call]:
        prepared = ops.prepare_experts(self.experts, self.part.activation, DTYPE)
        return [
            partial(ops.experts, self.x_TD, self.weights_TK, ids_TK, prepared)
            for ids_TK in self.ids
        ]


def drawn_experts(at: Inputs, part: FeedForwardConfig, hidden: int, format: str) -> ExpertWeights:
    count = router_of(part).num_experts

    def drawn(rows: int, columns: int) -> list[Weight | None]:
        return [at.weight(format, rows, columns) for _ in range(count)]

    def biases(size: int) -> list[Tensor | None]:
        wanted = count if part.bias else 0
        return list(at.numbers(wanted, size, spread=STANDARD_DEVIATION).unbind())

    return ExpertWeights(
        drawn(part.width, hidden),
        drawn(part.width, hidden) if part.gated else [],
        drawn(hidden, part.width),
        biases(part.width),
        biases(part.width) if part.gated else [],
        biases(hidden),
    )


def choices(rows: int, router: RouterConfig, calls: int) -> list[Tensor]:
    """Different experts for each row, drawn evenly, for each of some calls. A single row's are
    other ones in the next call, so that none is found in a cache."""
    count = router.num_experts
    top_k = router.top_k
    if rows == 1:
        order = torch.randperm(count)
        return list(order[: count // top_k * top_k].view(-1, 1, top_k)[:calls].unbind())
    return [torch.rand(rows, count).topk(top_k).indices for _ in range(calls)]


def experts(
    at: Inputs, part: FeedForwardConfig, hidden: int, rows: int, format: str = BF16
) -> Work:
    given = ExpertInputs.of(at, part, hidden, rows, format)
    return Work(given.calls(at.ops), given.bytes, given.operations)


# Attention


@dataclass(frozen=True, slots=True)
class Sequences:
    """So many of one length, `context` tokens with the `new` ones that a step brings."""

    count: int
    new: int
    context: int

    def step(self, device: str) -> StepInputs:
        """In blocks of a pool that lie in no order."""
        blocks = self.blocks // self.count
        order = torch.randperm(self.blocks).tolist()
        tables = [order[b * blocks : (b + 1) * blocks] for b in range(self.count)]
        tokens = [[0] * self.new] * self.count
        starts = [self.context - self.new] * self.count
        return StepInputs.build(tokens, starts, tables, BLOCK_SIZE, device)

    @property
    def rows(self) -> int:
        return self.count * self.new

    @property
    def blocks(self) -> int:
        return self.count * -(-self.context // BLOCK_SIZE)

    def pairs(self, window: int | None) -> int:
        """Of a row and a key that it sees."""
        seen = range(self.context - self.new + 1, self.context + 1)
        return self.count * sum(keys if window is None else min(keys, window) for keys in seen)

    def keys(self, window: int | None) -> int:
        """That any row sees."""
        reach = self.context if window is None else window + self.new - 1
        return self.count * min(self.context, reach)


def attention_name(asked: Sequences) -> str:
    if asked.new > 1:
        return f"attention, a prompt of {asked.new} tokens"
    return f"attention, decodes of {asked.count} x {asked.context} tokens"


def attention(
    at: Inputs, mixer: GQA | MLA, asked: Sequences, kv_dtype: torch.dtype | None = None
) -> Work:
    """Paged attention of a layer; of latent attention, among the latents."""
    spec = mixer.cache(DTYPE, kv_dtype)
    keys, values = key_value_planes(spec)
    window = spec.window
    read = asked.keys(window) * spec.bytes_per_token
    step = asked.step(at.device)
    plan = at.ops.plan_attention(step, BLOCK_SIZE, window)
    caches = [at.cache(spec, asked.blocks) for _ in range(at.copies(read))]
    q_THN = at.numbers(asked.rows, mixer.num_heads, keys.shape[1])
    options = {}
    if isinstance(mixer, GQA) and mixer.sinks:
        options["sinks_H"] = at.numbers(mixer.num_heads, dtype=torch.float32)
    calls = [
        partial(at.ops.paged_attention, q_THN, cache, plan, mixer.score_scale, **options)
        for cache in caches
    ]
    size = keys.shape[1] + values.shape[1]
    rows = 2 * asked.rows * mixer.num_heads * size
    return Work(calls, read + rows, 2 * asked.pairs(window) * mixer.num_heads * size)


def rotate_and_store(at: Inputs, mixer: GQA, rows: int, eps: float) -> Work:
    """A layer's queries, keys and values of one long prompt, with its norms."""
    asked = Sequences(1, rows, rows)
    spec = mixer.cache(DTYPE)
    width = mixer.q_rows + mixer.k_size + mixer.v_size
    step = asked.step(at.device)
    rotation = at.rotation(rows, mixer.head_dim // 2)
    norms = (None, None)
    if mixer.qk_norm == "head":
        norms = (at.numbers(mixer.head_dim), at.numbers(mixer.head_dim))
    calls = []
    for _ in range(at.copies(2 * rows * width)):
        qkv_TI = at.numbers(rows, width)
        cache = at.cache(spec, asked.blocks)
        given = (qkv_TI, rotation, cache, step.slot_mapping, *norms, eps)
        calls.append(partial(at.ops.rotate_and_store, *given))
    turns = 2 * rotation.cos_TR.nbytes + step.slot_mapping.nbytes
    return Work(calls, 2 * (2 * rows * width) + turns)


def head_products(at: Inputs, mixer: MLA, rows: int, *, values: bool) -> Work:
    """What queries are multiplied by before they meet latents, or what was found there behind."""
    heads = mixer.num_heads
    outs = mixer.value_dim if values else mixer.kv_rank
    columns = mixer.kv_rank if values else mixer.nope_dim
    size = 2 * heads * outs * columns
    x_THN = at.numbers(rows, heads, columns)
    calls = []
    for _ in range(at.copies(size)):
        prepared = at.ops.prepare_heads(at.weight(BF16, heads * outs, columns), heads, DTYPE)
        calls.append(partial(at.ops.head_products, x_THN, prepared))
    moved = size + 2 * rows * heads * (columns + outs)
    return Work(calls, moved, 2 * rows * heads * outs * columns)


# Recurrent layers


def _states(asked: Sequences, device: str) -> StepInputs:
    slots = torch.randperm(asked.count).tolist()
    tokens = [[0] * asked.new] * asked.count
    starts = [asked.context - asked.new] * asked.count
    states = StateInputs(slots, (), (), ())
    return StepInputs.build(tokens, starts, None, BLOCK_SIZE, device, states=states)


def gated_delta(at: Inputs, mixer: GatedDelta, asked: Sequences) -> Work:
    """Three products with each head's state, which is read and written once."""
    sizes = mixer.sizes
    state = next(plane for plane in mixer.cache(DTYPE).state if plane.name == "delta")
    plan = at.ops.plan_states(_states(asked, at.device))
    in_TI = at.numbers(asked.rows, mixer.in_size)
    qkv_TC = at.numbers(asked.rows, sizes.qkv_size)
    heads = sizes.value_heads
    decay_H = -torch.rand(heads, device=at.device)
    bias_H = at.numbers(heads, dtype=torch.float32)
    row = 2 * (sizes.qkv_size + 2 * heads + sizes.out_size)
    moved = 2 * asked.count * state.nbytes + asked.rows * row
    calls = []
    for _ in range(at.copies(moved)):
        kept = at.numbers(asked.count, *state.shape, dtype=torch.float32)
        given = (qkv_TC, in_TI, mixer.head_start, decay_H, bias_H, kept, plan, sizes)
        calls.append(partial(at.ops.gated_delta, *given))
    return Work(calls, moved, 6 * asked.rows * heads * sizes.key_dim * sizes.value_dim)


def causal_conv(at: Inputs, mixer: GatedDelta, asked: Sequences) -> Work:
    """Over the columns of queries, keys and values; weights are float32."""
    columns = mixer.sizes.qkv_size
    state = next(plane for plane in mixer.cache(DTYPE).state if plane.name == "conv")
    plan = at.ops.plan_states(_states(asked, at.device))
    moved = 2 * asked.count * state.nbytes + 2 * asked.rows * 2 * columns
    calls = []
    for _ in range(at.copies(moved)):
        in_TI = at.numbers(asked.rows, mixer.in_size)
        taps_CJ = at.numbers(columns, mixer.taps, dtype=torch.float32)
        kept = at.numbers(asked.count, *state.shape)
        calls.append(partial(at.ops.causal_conv, in_TI, 0, taps_CJ, kept, plan))
    weights = 4 * columns * mixer.taps
    return Work(calls, moved + weights, 2 * asked.rows * columns * mixer.taps)
