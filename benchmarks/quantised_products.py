"""Products of one row with weights in blocks of GGUF's types, and as Hugging Face's directories
have them: GB/s of the weights that they read, and the share of what a plain read loop gives.

    python benchmarks/quantised_products.py --json benchmarks/quantised_products.json --isa all

The floor is the time in which the weights' bytes are read, once; what else a product reads and
computes has to hide behind it. A pass of the read loop (probe.cpp, as many threads, huge pages)
comes before each pass of a product, and the best of each count: what slows a pass down is no
property of the machine. Weights are cycled through so many bytes that none is in a cache when its
turn comes again. They are random: whatever numbers they stand for, the work is the same.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops import ExpertWeights, Matrix
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import BLOCK_FORMATS, Format, format_named
from records import save

sys.path.insert(0, str(Path(__file__).parent / "peers"))

import ceilings
from sizes import MADE

# More than any processor's last cache that this runs on.
COLD_BYTES = 160 * 2**20
DTYPE = torch.bfloat16
M2 = MADE["m2"]
# Beside those of GGUF.
OTHERS = (
    "bfloat16",
    "fp8[128x128,float32]",
    "fp8[1x0,bfloat16]",
    "mxfp4_planes",
    "int4[128,bfloat16]",
    "int4[128,float16,int8 zeros]",
    "int8[0,bfloat16]",
    "affine4[64,bfloat16]",
)
NAMES = (*(each.name for each in BLOCK_FORMATS), *OTHERS)


@dataclass(frozen=True)
class Experts:
    """One layer's: so many, of which `top_k` compute a row."""

    name: str
    count: int
    top_k: int
    hidden: int
    width: int


# (name, outputs, inputs): a square layer, M2's projections and head, and a head of 150,000 entries.
LAYERS = (
    ("layer", 2048, 2048),
    ("m2's q, k and v", (M2.heads + 2 * M2.kv_heads) * M2.head_dim, M2.hidden),
    ("m2's head", M2.vocab, M2.hidden),
    ("head", 151_936, 2048),
)
EXPERTS = (
    Experts("m2's experts", M2.experts, M2.top_k, M2.hidden, M2.width),
    Experts("experts", 128, 8, 2048, 768),
    Experts("gpt-oss's experts", 32, 4, 2880, 2880),
)


@dataclass(frozen=True)
class Case:
    """Products that read so many bytes of weights, none of them twice."""

    name: str
    call: Callable[[], object]
    nbytes: int


class Memory:
    """Random bytes that matrices are views of, one behind the other, round and round."""

    def __init__(self, nbytes: int) -> None:
        words = torch.randint(-(2**31), 2**31, (nbytes // 4,), dtype=torch.int32)
        self._bytes = words.view(torch.uint8)
        self._at = 0

    def matrix(self, format: Format, rows: int, columns: int) -> Matrix:
        planes = [self._plane(*plane) for plane in format.planes(rows, columns)]
        return Matrix(format, (rows, columns), tuple(planes))

    def _plane(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if self._at + nbytes > len(self._bytes):
            self._at = 0
        plane = self._bytes[self._at : self._at + nbytes].view(dtype).view(shape)
        self._at += -(-nbytes // 64) * 64
        return plane


def holds(format: Format, columns: int) -> bool:
    """Whether rows of so many columns are whole blocks or groups."""
    try:
        format.planes(1, columns)
    except ValueError:
        return False
    return True


def layer_cases(ops: CpuOps, format: Format, memory: Memory) -> Iterator[Case]:
    for name, outputs, inputs in LAYERS:
        if not holds(format, inputs):
            continue
        nbytes = memory.matrix(format, outputs, inputs).nbytes
        count = max(1, COLD_BYTES // nbytes)
        layers = [
            ops.prepare_linear((memory.matrix(format, outputs, inputs), None), dtype=DTYPE)
            for _ in range(count)
        ]
        x = torch.randn(1, inputs).to(DTYPE)

        def call(x: Tensor = x, layers: Sequence[object] = layers) -> None:
            for layer in layers:
                ops.linear(x, layer)  # type: ignore[arg-type]

        yield Case(f"{name} {inputs} -> {outputs}", call, nbytes * count)


def expert_cases(ops: CpuOps, format: Format, memory: Memory) -> Iterator[Case]:
    for e in EXPERTS:
        if not (holds(format, e.hidden) and holds(format, e.width)):
            continue
        kinds = [
            [memory.matrix(format, rows, columns) for _ in range(e.count)]
            for rows, columns in ((e.width, e.hidden), (e.width, e.hidden), (e.hidden, e.width))
        ]
        each = sum(kind[0].nbytes for kind in kinds)
        handle = ops.prepare_experts(ExpertWeights(*kinds), "silu", DTYPE)
        x = torch.randn(1, e.hidden).to(DTYPE)
        share = torch.full((1, e.top_k), 1 / e.top_k)
        # Each expert once in every turn: as few as are chosen would lie in a cache.
        order = torch.randperm(e.count)
        turns = [ids.view(1, -1) for ids in order.split(e.top_k)]
        rounds = max(1, COLD_BYTES // (each * e.count))

        def call(x=x, turns=turns * rounds, share=share, handle=handle) -> None:  # type: ignore[no-untyped-def]
            for ids in turns:
                ops.experts(x, share, ids, handle)

        name = f"{e.name} {e.top_k} of {e.count}, {e.hidden} x {e.width}"
        yield Case(name, call, each * e.count * rounds)


def in_turn(
    call: Callable[[], object],
    ceiling: Callable[[], float],
    passes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Passes of a ceiling and of a call, in turn: the shortest call's seconds, the best ceiling."""
    highest = 0.0
    shortest = float("inf")
    call()
    for _ in range(passes):
        highest = max(highest, ceiling())
        start = clock()
        call()
        shortest = min(shortest, clock() - start)
    return shortest, highest


def measured(case: Case, read: Callable[[], dict[str, float]], passes: int) -> dict[str, object]:
    best, ceiling = in_turn(case.call, lambda: read()["anonymous_gbs"], passes)
    gbs = case.nbytes / best / 1e9
    return {
        "operation": case.name,
        "microseconds": round(best * 1e6, 1),
        "megabytes": round(case.nbytes / 1e6, 1),
        "gbs": round(gbs, 2),
        "read_gbs": round(ceiling, 2),
        "of_floor": round(gbs / ceiling, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--isa", nargs="*", default=[""], help="instruction sets, or all; default: the best"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--formats", nargs="*", default=NAMES)
    parser.add_argument("--only", default="", help="operations whose names hold this; default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    memory = Memory(3 * COLD_BYTES)
    rows: list[dict[str, object]] = []
    with ceilings.reader(args.threads) as read:
        for isa in _cpu.available() if args.isa == ["all"] else args.isa:
            ops = CpuOps(args.threads, isa)
            for format in map(format_named, args.formats):
                cases = (*layer_cases(ops, format, memory), *expert_cases(ops, format, memory))
                for case in cases:
                    if args.only not in case.name:
                        continue
                    row = {"kernels": ops.name, "format": format.name}
                    row |= measured(case, read, args.passes)
                    rows.append(row)
                    print(
                        f"{row['kernels']:16} {row['format']:28} {row['operation']:40} "
                        f"{row['gbs']:>7} GB/s {row['of_floor']:>6.0%} of {row['read_gbs']}",
                        flush=True,
                    )
    save(args.json, {"threads": args.threads, "rows": rows})


if __name__ == "__main__":
    main()
