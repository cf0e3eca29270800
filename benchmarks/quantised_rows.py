"""Products of many rows with weights in blocks of GGUF's types: multiplications a second, and the
share of what the processor's instructions for bytes give.

    python benchmarks/quantised_rows.py --json benchmarks/quantised_rows.json

The floor is the time in which a loop of the same instructions on registers (int8_peak.cpp, as many
threads) does as many multiplications. A pass of it comes before each pass of a product, and the
best of each count. With one thread the thread's own time counts, so that other work on the machine
does not. The same products with bfloat16 weights stand beside them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from moebius.ops import ExpertWeights, Matrix
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import format_named
from quantised_products import COLD_BYTES, DTYPE, NAMES, Memory, in_turn
from records import save

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import ceilings

ROWS = (16, 32, 64, 2048)
LAYER = (2048, 2048)
EXPERTS = 32
TOP_K = 4
HIDDEN = 2048
WIDTH = 768
# The loop whose instructions a level's kernels use; emulated tiles and plain loops have none.
PEAKS = {
    "avx2": "avx2",
    "avx512": "avx512",
    "avx512vnni": "avx512vnni",
    "avx512bf16": "avx512vnni",
    "amx": "amx",
}

Weights = Callable[[int, int], Matrix | torch.Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], object]
    products: int  # of two numbers


@contextmanager
def peak(threads: int, level: str) -> Iterator[ceilings.Asked]:
    """One pass of int8_peak.cpp for each call. Needs g++."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "int8_peak"
        source = Path(__file__).with_name("int8_peak.cpp")
        options = ["-std=c++17", "-O3", "-pthread"]
        subprocess.run(["g++", *options, source, "-o", program], check=True)
        asked = ceilings.Asked(program, threads, PEAKS[level.removeprefix("cpu-")])
        try:
            yield asked
        finally:
            asked.close()


def layer_case(ops: CpuOps, weights: Weights, rows: int) -> Case:
    outputs, inputs = LAYER
    layer = ops.prepare_linear((weights(outputs, inputs), None), dtype=DTYPE)
    x = torch.randn(rows, inputs).to(DTYPE)
    return Case(
        f"layer {inputs} -> {outputs}", lambda: ops.linear(x, layer), rows * outputs * inputs
    )


def expert_case(ops: CpuOps, weights: Weights, rows: int) -> Case:
    """Rows are shared out evenly, each to some experts."""
    kinds = [
        [weights(outputs, inputs) for _ in range(EXPERTS)]
        for outputs, inputs in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    ]
    experts = ops.prepare_experts(ExpertWeights(*kinds), "silu", DTYPE)
    x = torch.randn(rows, HIDDEN).to(DTYPE)
    ids = torch.arange(rows * TOP_K).view(rows, TOP_K) % EXPERTS
    share = torch.full((rows, TOP_K), 1 / TOP_K)
    name = f"experts {TOP_K} of {EXPERTS}, {HIDDEN} x {WIDTH}"
    products = rows * TOP_K * 3 * HIDDEN * WIDTH
    return Case(name, lambda: ops.experts(x, share, ids, experts), products)


def measured(case: Case, peak: ceilings.Asked, passes: int, threads: int) -> dict[str, object]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    best, ceiling = in_turn(case.call, lambda: peak()["gmacs"], passes, clock)
    gmacs = case.products / best / 1e9
    return {
        "operation": case.name,
        "microseconds": round(best * 1e6, 1),
        "gmacs": round(gmacs, 1),
        "peak_gmacs": round(ceiling, 1),
        "of_floor": round(gmacs / ceiling, 3),
    }


def weights_of(names: Sequence[str]) -> Iterator[tuple[str, Weights]]:
    memory = Memory(COLD_BYTES)
    for name in names:
        if name == "bfloat16":
            yield name, lambda rows, columns: torch.randn(rows, columns).to(DTYPE) * 0.05
        else:
            format = format_named(name)
            yield name, lambda rows, columns, f=format: memory.matrix(f, rows, columns)  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--isa", nargs="*", default=[""], help="instruction sets; default: the best"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--formats", nargs="*", default=NAMES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    found: list[dict[str, object]] = []
    for isa in args.isa:
        ops = CpuOps(args.threads, isa)
        with peak(args.threads, ops.name) as loop:
            for name, weights in weights_of(args.formats):
                for rows in args.rows:
                    for make in (layer_case, expert_case):
                        row: dict[str, object] = {"kernels": ops.name, "format": name, "rows": rows}
                        row |= measured(make(ops, weights, rows), loop, args.passes, args.threads)
                        found.append(row)
                        print(
                            f"{ops.name:10} {name:28} {rows:5} {row['operation']:32} "
                            f"{row['gmacs']:>7} GMAC/s {row['of_floor']:>6.0%}",
                            flush=True,
                        )
    save(args.json, {"threads": args.threads, "rows": found})


if __name__ == "__main__":
    main()
