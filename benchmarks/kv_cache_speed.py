"""Attention over int8 keys and values beside bfloat16's, for one row, at growing contexts.

    .venv/bin/python benchmarks/kv_cache_speed.py --json benchmarks/kv_cache_speed.json

A decode step reads each layer's cache once. So many layers are passed, one after the other, that
none is in a processor's cache when its turn comes again, in both dtypes in turn; a figure is the
median of the rounds, its ratio the median of the rounds' ratios (above 1: int8 is faster). Seconds
are one thread's processor time, which other programs lengthen least. `prefill` is a chunk of 256
rows at the end of the context.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moebius import _cpu
from moebius.ops.cache_spec import key_value_spec
from moebius.ops.cpu import CpuOps
from moebius.ops.steps import StepInputs
from records import processor, save

BLOCK = 16
COLD_BYTES = 192 * 2**20
# Query heads, key heads and the size of each: Qwen3-30B-A3B's, and of smaller models.
SHAPES = ((32, 4, 128), (16, 8, 128), (32, 8, 64))
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
CHUNK = 256


def passes(
    ops: CpuOps, held: torch.dtype, shape: tuple[int, int, int], context: int, rows: int
) -> tuple[Callable[[], object], int, int]:
    """A pass over all layers, how many they are, and the bytes of one."""
    heads, kv_heads, head_dim = shape
    spec = key_value_spec(kv_heads, head_dim, held)
    blocks = context // BLOCK
    nbytes = blocks * ops.cache_bytes_per_block(spec, BLOCK)
    layers = 1 if rows > 1 else max(1, COLD_BYTES // nbytes)
    memory = torch.randint(1, 60, (nbytes,), dtype=torch.uint8)  # finite, whatever it is read as
    caches = [ops.make_cache(memory.clone(), spec, BLOCK) for _ in range(layers)]
    step = StepInputs.build([[0] * rows], [context - rows], [list(range(blocks))], BLOCK)
    plan = ops.plan_attention(step, BLOCK)
    q = torch.randn(rows, heads, head_dim).bfloat16()

    def attend() -> None:
        for cache in caches:
            ops.paged_attention(q, cache, plan, head_dim**-0.5)

    return attend, layers, nbytes


def compare(
    ops: CpuOps, shape: tuple[int, int, int], context: int, rows: int, rounds: int
) -> dict[str, Any]:
    """Both dtypes in turn; microseconds a layer."""
    kinds = [passes(ops, held, shape, context, rows) for held in (torch.bfloat16, torch.int8)]
    for attend, _, _ in kinds:
        attend()
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        for kind in (0, 1) if number % 2 else (1, 0):
            attend, layers, _ = kinds[kind]
            start = time.thread_time()
            attend()
            seconds[kind].append((time.thread_time() - start) / layers)
    plain = statistics.median(seconds[0])
    coded = statistics.median(seconds[1])
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    return {
        "kernels": ops.name,
        "work": "prefill" if rows > 1 else "decode",
        "heads": shape,
        "context": context,
        "bfloat16_us": round(plain * 1e6, 1),
        "int8_us": round(coded * 1e6, 1),
        "bfloat16_gbs": round(kinds[0][2] / plain / 1e9, 2),
        "int8_gbs": round(kinds[1][2] / coded / 1e9, 2),
        "ratio": round(ratio, 2),
    }


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for isa in args.isa or [_cpu.available()[-1]]:
        ops = CpuOps(1, isa)
        for shape in SHAPES:
            for context in CONTEXTS:
                yield compare(ops, shape, context, 1, args.rounds)
            yield compare(ops, shape, 4096, CHUNK, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="*", help="instruction sets; default: the best")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = []
    for row in rows_of(args):
        found.append(row)
        print(*row.values(), flush=True)
    save(args.json, {"processor": processor(), "rows": found})


if __name__ == "__main__":
    main()
