"""This machine's ceilings, measured now: memory bandwidth (probe.cpp) and the matrix peak (torch).

    python ceilings.py --threads 2 --file PEERS/models/m1/model.safetensors [--ask]

Prints one JSON object. The best pass counts, for all three: what slows a pass down is no property
of the machine. With --ask, one object for each line of standard input, of one pass: what the
machine gives at that moment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIDE = 2048
# A pass in turn with other work: short, but not so short that threads that have just woken up set
# its pace.
ASKED_SIDE = 1024
ASKED_PRODUCTS = 3
READS = 12
PRODUCTS = 20
# Small products tell which dtype is the faster: a processor without bfloat16 products takes minutes
# for large ones.
TRIAL_SIDE = 256


class Asked:
    """A program that answers each line of standard input by a JSON object."""

    def __init__(self, *command: Any) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(
            [str(part) for part in command], text=True, bufsize=1, **pipes
        )

    def __call__(self) -> dict[str, float]:
        self._process.stdin.write("\n")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def reader(threads: int, file: Path | None = None) -> Iterator[Asked]:
    """One pass of probe.cpp for each call, over huge pages and over the mapped file (default: a new
    one). Needs g++."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        if file is None:
            file = Path(folder) / "file"
            file.write_bytes(bytes(2**26))
        options = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        subprocess.run(
            ["g++", *options, Path(__file__).with_name("probe.cpp"), "-o", program], check=True
        )
        asked = Asked(program, threads, file)
        try:
            yield asked
        finally:
            asked.close()


def bandwidth(threads: int, file: Path | None = None) -> dict[str, float]:
    """GB/s of a plain read loop: `anonymous_gbs` over huge pages, `mapped_gbs` over the file
    (default: a new one)."""
    with reader(threads, file) as read:
        passes = [read() for _ in range(READS)]
    return {key: max(one[key] for one in passes) for key in passes[0]}


def matrix_peak(threads: int) -> float:
    """GFLOP/s of a product of two 2048 x 2048 matrices, in bfloat16 or float32, whichever is faster
    here."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = _seconds(SIDE, faster_dtype(), PRODUCTS)
    torch.set_num_threads(before)
    return 2 * SIDE**3 / best / 1e9


def faster_dtype() -> Any:
    """torch's bfloat16 or float32, by its products on this processor."""
    import torch

    return min((torch.bfloat16, torch.float32), key=lambda dtype: _seconds(TRIAL_SIDE, dtype, 5))


def _seconds(side: int, dtype: Any, products: int) -> float:
    import torch

    left = torch.randn(side, side).to(dtype)
    right = torch.randn(side, side).to(dtype)
    times = []
    for _ in range(products):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


def _answer(threads: int, file: Path) -> None:
    import torch

    torch.set_num_threads(threads)
    dtype = faster_dtype()
    with reader(threads, file) as read:
        for _ in sys.stdin:
            found = read()  # first: torch's threads go on spinning for a while after a product
            found["matrix_gflops"] = round(
                2 * ASKED_SIDE**3 / _seconds(ASKED_SIDE, dtype, ASKED_PRODUCTS) / 1e9, 1
            )
            print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--ask", action="store_true")
    given = parser.parse_args()
    if given.ask:
        _answer(given.threads, given.file)
    else:
        found = bandwidth(given.threads, given.file)
        print(json.dumps(found | {"matrix_gflops": round(matrix_peak(given.threads), 1)}))


if __name__ == "__main__":
    main()
