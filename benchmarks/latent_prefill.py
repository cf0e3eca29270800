"""What prompts cost where latent attention keeps to its one form: queries that meet latents, beside
keys and values of every head that are made of latents anew for each chunk.

    .venv/bin/python benchmarks/latent_prefill.py --json benchmarks/latent_prefill.json

An attention layer in a chunk of a prompt at the end of a context, as its operations take it: from
projected queries and latents to the heads' outputs. The form that is served (`absorbed`) reads the
context's latents where they lie, and multiplies queries and outputs by the heads' own matrices. The
other (`expanded`) multiplies the latents of the whole context by kv_b_proj, stores keys and values
of all heads, and attends to them: what other engines do for prompts. Both are this project's
kernels in bfloat16; the norm, the projections before and the output's are the same in both and are
left out. Seconds are one thread's processor time, the median of rounds in which both take turns; a
ratio above 1 says how many times as long the absorbed form takes. `layer` is the time of one layer
of GLM-4.7-Flash's sizes but for attention, for scale: its projections and 5 experts a token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.ops import LayerCache
from moebius.ops.cache_spec import CacheSpec, key_value_spec, latent_spec
from moebius.ops.cpu import CpuOps
from moebius.ops.steps import Rotation, StepInputs
from records import processor, save

BLOCK = 16
CHUNK = 512
CONTEXTS = (512, 2048, 8192)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Heads; of a query what does not turn and what does; of a latent, and of a value head."""

    heads: int
    plain: int
    turning: int
    latent: int
    value: int


SHAPES = {
    "DeepSeek-V2-Lite": Sizes(16, 128, 64, 512, 128),
    "GLM-4.7-Flash": Sizes(20, 192, 64, 512, 256),
}


def weights(*shape: int) -> Tensor:
    return (torch.randn(*shape) / shape[-1] ** 0.5).to(DTYPE)


class Chunk:
    """A chunk of a prompt at the end of a context, in both forms."""

    def __init__(self, ops: CpuOps, sizes: Sizes, context: int) -> None:
        self.ops = ops
        self.sizes = sizes
        self.scale = (sizes.plain + sizes.turning) ** -0.5
        rows = min(CHUNK, context)
        blocks = list(range(context // BLOCK))
        self.step = StepInputs.build([[0] * rows], [context - rows], [blocks], BLOCK)
        self.whole = StepInputs.build([[0] * context], [0], [blocks], BLOCK)
        self.plan = ops.plan_attention(self.step, BLOCK)
        query = sizes.plain + sizes.turning
        self.q = torch.randn(rows, sizes.heads, query).to(DTYPE)
        self.latents = torch.randn(context, sizes.latent + sizes.turning).to(DTYPE)
        self.norm = torch.ones(sizes.latent, dtype=DTYPE)
        heads = sizes.heads
        keys = weights(heads * sizes.latent, sizes.plain)
        self.keys = ops.prepare_heads(keys, heads)
        self.values = ops.prepare_heads(weights(heads * sizes.value, sizes.latent), heads)
        made = weights(heads * (sizes.plain + sizes.value), sizes.latent)
        self.made = ops.prepare_linear((made, None))
        spec = latent_spec(sizes.latent, sizes.turning, DTYPE)
        self.cache = self._cache(spec, len(blocks))
        apart = key_value_spec(heads, query, DTYPE, sizes.value)
        self.apart = self._cache(apart, len(blocks))
        self.plain = self.latents[:, : sizes.latent].contiguous()
        self.rows = torch.randn(context, heads * (2 * query + sizes.value)).to(DTYPE)
        # The context before the chunk.
        self.ops.rotate_and_store_latent(
            self.ops.head_products(torch.randn(context, heads, query).to(DTYPE), self.keys),
            self.latents,
            self._rotation(context),
            self.cache,
            self.whole.slot_mapping,
            self.norm,
            1e-6,
        )

    def _cache(self, spec: CacheSpec, blocks: int) -> LayerCache:
        size = self.ops.cache_bytes_per_block(spec, BLOCK) * blocks
        return self.ops.make_cache(torch.zeros(size, dtype=torch.uint8), spec, BLOCK)

    def _rotation(self, rows: int) -> Rotation:
        angles = torch.rand(rows, self.sizes.turning // 2)
        return Rotation(angles.cos(), angles.sin(), interleaved=True)

    def absorbed(self) -> Tensor:
        ops = self.ops
        rows = len(self.q)
        met = ops.rotate_and_store_latent(
            ops.head_products(self.q, self.keys),
            self.latents[-rows:],
            self._rotation(rows),
            self.cache,
            self.step.slot_mapping,
            self.norm,
            1e-6,
        )
        found = ops.paged_attention(met, self.cache, self.plan, self.scale)
        return ops.head_products(found, self.values)

    def expanded(self) -> Tensor:
        """What kv_b_proj makes is not laid side by side here, as a kernel of its own would do."""
        ops = self.ops
        context = len(self.latents)
        ops.linear(self.plain, self.made)
        nothing = torch.empty(context, 0)
        ops.rotate_and_store(
            self.rows, Rotation(nothing, nothing), self.apart, self.whole.slot_mapping
        )
        return ops.paged_attention(self.q, self.apart, self.plan, self.scale)


def seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measured(ops: CpuOps, sizes: Sizes, context: int, rounds: int) -> dict[str, Any]:
    chunk = Chunk(ops, sizes, context)
    chunk.absorbed()
    chunk.expanded()
    times = [(seconds(chunk.absorbed), seconds(chunk.expanded)) for _ in range(rounds)]
    absorbed = statistics.median(one for one, _ in times)
    expanded = statistics.median(other for _, other in times)
    ratio = statistics.median(one / other for one, other in times)
    return {
        "context": context,
        "rows": len(chunk.q),
        "absorbed_ms": round(1000 * absorbed, 1),
        "expanded_ms": round(1000 * expanded, 1),
        "ratio": round(ratio, 2),
    }


def layer_seconds(ops: CpuOps, rounds: int) -> float:
    """A chunk through the matrices of a layer of GLM-4.7-Flash, but for those of heads."""
    hidden = 2048
    width = 1536
    shapes = [(768, hidden), (5120, 768), (576, hidden), (hidden, 5120)]
    shapes += [(width, hidden), (width, hidden), (hidden, width)] * 5
    layers = [ops.prepare_linear((weights(*shape), None)) for shape in shapes]
    inputs = [torch.randn(CHUNK, columns).to(DTYPE) for _, columns in shapes]

    def run() -> None:
        for x, layer in zip(inputs, layers, strict=True):
            ops.linear(x, layer)

    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ops = CpuOps(threads=1)
    found = {
        name: [measured(ops, sizes, context, given.rounds) for context in CONTEXTS]
        for name, sizes in SHAPES.items()
    }
    layer = round(1000 * layer_seconds(ops, given.rounds), 1)
    for name, cases in found.items():
        for case in cases:
            print(name, case)
    print("layer", layer, "ms")
    record = {"processor": processor(), "ops": ops.name, "layer_ms": layer, "attention": found}
    save(given.json, record)


if __name__ == "__main__":
    main()
