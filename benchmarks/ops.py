"""Each operation of the CPU backend alone: GB/s or GFLOP/s, and the share of what this machine was
just seen to reach.

    python benchmarks/ops.py --json benchmarks/ops.json            # all instruction sets: --isa all

The floor of an operation is the larger of its bytes over the memory bandwidth (a plain read loop
over anonymous huge pages, as many threads) and its operations over the matrix peak (torch's product
of two 2,048-wide matrices). Weights are cycled through so many copies that none is in a cache when
its turn comes again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from moebius import _cpu
from moebius.files import json_record, write_file
from moebius.ops import ExpertWeights, PreparedLinear
from moebius.ops.cache_spec import key_value_spec
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import dtype_name
from moebius.ops.steps import StepInputs

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import ceilings

# More than any processor's last cache that this runs on.
COLD_BYTES = 256 * 2**20
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One call's least work: bytes that must be read, and floating-point operations."""

    name: str
    call: Callable[[], object]
    bytes_read: float
    flops: float


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.05).to(DTYPE)


def linear_cases(ops: CpuOps) -> Iterator[Case]:
    for out_size, in_size in ((1024, 1024), (49152, 1024)):
        nbytes = 2 * out_size * in_size
        copies = max(1, COLD_BYTES // nbytes)
        layers = [ops.prepare_linear((random(out_size, in_size), None)) for _ in range(copies)]
        for rows in (1, 4, 16, 32, 64, 512, 2048) if out_size < 4096 else (1, 32, 64):
            x = random(rows, in_size)
            used = layers if rows <= 64 else layers[:1]

            def call(x: torch.Tensor = x, used: list[object] = used) -> None:
                for layer in used:
                    ops.linear(x, layer)

            flops = 2 * rows * out_size * in_size * len(used)
            yield Case(f"linear {rows} x {in_size} -> {out_size}", call, nbytes * len(used), flops)


def format_cases(ops: CpuOps) -> Iterator[Case]:
    """Products in float32 with weights as they are stored, beside the same of float32's own."""
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        nbytes = stored.itemsize * 2**20
        weights = [random(1024, 1024).to(stored) for _ in range(max(1, COLD_BYTES // nbytes))]
        layers = [ops.prepare_linear((weight, None), dtype=torch.float32) for weight in weights]
        for rows in (1, 2, 4, 16, 64):
            x = random(rows, 1024).float()

            def call(x: torch.Tensor = x, used: list[PreparedLinear] = layers) -> None:
                for layer in used:
                    ops.linear(x, layer)

            name = f"linear {rows} x 1024 -> 1024, float32 by {dtype_name(stored)}"
            flops = 2.0 * rows * 2**20 * len(layers)
            yield Case(name, call, nbytes * len(layers), flops)


def free_cases() -> Iterator[Case]:
    """What promise P1 costs: torch's product, which chooses an algorithm by the number of rows, in
    its faster dtype."""
    dtype = ceilings.faster_dtype()
    for rows in (1, 32, 512, 2048):
        weights = [torch.randn(1024, 1024).to(dtype) for _ in range(max(1, COLD_BYTES // 2**21))]
        x = torch.randn(rows, 1024).to(dtype)
        used = weights if rows <= 64 else weights[:1]

        def call(x: torch.Tensor = x, used: list[torch.Tensor] = used) -> None:
            for weight in used:
                torch.nn.functional.linear(x, weight)

        nbytes = len(used) * used[0].nbytes
        yield Case(
            f"torch's linear {rows} x 1024 -> 1024, {dtype}",
            call,
            nbytes,
            2.0 * rows * 2**20 * len(used),
        )


def drawn_experts(rows: int, experts: int, top_k: int) -> torch.Tensor:
    """Different experts for each row (rows, top_k)."""
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(rows)])


def expert_cases(ops: CpuOps) -> Iterator[Case]:
    for experts, top_k, hidden, width in ((32, 4, 1024, 512), (64, 8, 2048, 1024)):
        each = 2 * 3 * hidden * width
        weights = ExpertWeights(
            [random(width, hidden) for _ in range(experts)],
            [random(width, hidden) for _ in range(experts)],
            [random(hidden, width) for _ in range(experts)],
        )
        handle = ops.prepare_experts(weights, "silu")
        for rows in (1, 8, 32, 64, 2048):
            x = random(rows, hidden)
            # Other experts each time, so that a few are not found in a cache.
            count = 20 if rows < 64 else 2
            turns = [drawn_experts(rows, experts, top_k) for _ in range(count)]
            share = torch.full((rows, top_k), 1 / top_k)

            def call(x=x, turns=turns, share=share, handle=handle) -> None:  # type: ignore[no-untyped-def]
                for ids in turns:
                    ops.experts(x, share, ids, handle)

            hit = sum(len(ids.unique()) for ids in turns)
            flops = 2.0 * rows * top_k * each / 2 * len(turns)
            yield Case(
                f"experts {top_k} of {experts}, {rows} x {hidden}, width {width}",
                call,
                hit * each,
                flops,
            )


def attention_cases(ops: CpuOps) -> Iterator[Case]:
    heads = 16
    kv_heads = 4
    dim = 64
    block = 16
    for sequences, new, length in ((1, 1, 2048), (32, 1, 512), (1, 2048, 2048), (8, 64, 512)):
        blocks = -(-length // block)
        nbytes = ops.cache_bytes_per_block(key_value_spec(kv_heads, dim, DTYPE), block)
        buffer = torch.zeros(nbytes * blocks * sequences, dtype=torch.uint8)
        cache = ops.make_cache(buffer, key_value_spec(kv_heads, dim, DTYPE), block)
        tables = [list(range(s * blocks, (s + 1) * blocks)) for s in range(sequences)]
        step = StepInputs.build([[0] * new] * sequences, [length - new] * sequences, tables, block)
        plan = ops.plan_attention(step, block)
        q = random(sequences * new, heads, dim)
        seen = sum(range(length - new + 1, length + 1)) * sequences
        name = f"attention {sequences} x {new} new of {length}"
        yield Case(
            name,
            lambda q=q, c=cache, p=plan: ops.paged_attention(q, c, p, 0.125),
            len(buffer),
            4.0 * seen * heads * dim,
        )


def small_cases(ops: CpuOps) -> Iterator[Case]:
    weight = random(1024)
    router = RouterConfig(32, 4, weight="renorm")
    for rows in (1, 32, 2048):
        x = random(rows, 1024)
        y = random(rows, 1024)
        yield Case(
            f"add_rms_norm {rows} x 1024",
            lambda x=x, y=y: ops.add_rms_norm(x, y, 1.0, weight, 1e-6),
            4.0 * x.numel(),
            0,
        )
        logits = torch.randn(rows, 32)
        yield Case(
            f"route {rows} x 32", lambda t=logits: ops.route(t, router), 4.0 * logits.numel(), 0
        )
    rows = range(32)
    logits = torch.randn(32, 49152)
    uniform = torch.rand(32, dtype=torch.float64).tolist()
    for k in (1, 20):
        yield Case(
            f"log_softmax_top_k 32 x 49152, k {k}",
            lambda k=k: ops.log_softmax_top_k(logits, rows, [k] * 32),
            4.0 * logits.numel(),
            0,
        )
    yield Case(
        "draw 32 x 49152",
        lambda: ops.draw(logits, rows, [0.7] * 32, uniform),
        4.0 * logits.numel(),
        0,
    )


def measure(
    cases: Iterator[Case], kernels: str, bandwidth: float, peak: float, repeats: int
) -> Iterator[dict[str, object]]:
    for case in cases:
        case.call()
        seconds = statistics.median(timed(case.call, repeats))
        floor = max(case.bytes_read / bandwidth, case.flops / peak) / 1e9
        yield {
            "operation": case.name,
            "kernels": kernels,
            "microseconds": round(seconds * 1e6, 1),
            "gbs": round(case.bytes_read / seconds / 1e9, 1),
            "gflops": round(case.flops / seconds / 1e9, 1),
            "of_floor": round(floor / seconds, 3),
        }


def show(rows: list[dict[str, object]], found: Iterator[dict[str, object]]) -> None:
    for row in found:
        rows.append(row)
        print(
            f"{row['kernels']:16} {row['operation']:48} {row['microseconds']:>10} us "
            f"{row['gbs']:>7} GB/s {row['gflops']:>7} GFLOP/s {row['of_floor']:>7.0%} of the floor",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default="", help="an instruction set, or all; default: the best")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = ceilings.bandwidth(args.threads)["anonymous_gbs"]
    peak = ceilings.matrix_peak(args.threads)
    print(f"{args.threads} threads: {bandwidth:.1f} GB/s, {peak:.0f} GFLOP/s")
    rows: list[dict[str, object]] = []
    for isa in _cpu.available() if args.isa == "all" else [args.isa]:
        ops = CpuOps(args.threads, isa)
        cases = chain(
            linear_cases(ops),
            format_cases(ops),
            expert_cases(ops),
            attention_cases(ops),
            small_cases(ops),
        )
        show(rows, measure(cases, ops.name, bandwidth, peak, args.repeats))
    torch.set_num_threads(args.threads)
    show(rows, measure(free_cases(), "torch", bandwidth, peak, args.repeats))
    if args.json:
        found = {
            "threads": args.threads,
            "bandwidth_gbs": bandwidth,
            "matrix_gflops": round(peak, 1),
            "rows": rows,
        }
        write_file(args.json, json.dumps(found, indent=1) + "\n", ours=json_record)


if __name__ == "__main__":
    main()
