"""This machine's ceilings, measured now: memory bandwidth (probe.cpp) and the bfloat16 matrix peak (torch).

    python ceilings.py --threads 2 --file PEERS/models/m1/model.safetensors

Prints one JSON object. The best pass counts, for all three: what slows a pass down is no property of the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

from common import peers_folder

SIDE = 2048
PRODUCTS = 20


def bandwidth(threads: int, file: Path) -> dict[str, float]:
    """GB/s of a plain read loop: `anonymous_gbs` over huge pages, `mapped_gbs` over the file. Needs g++."""
    source, program = Path(__file__).with_name("probe.cpp"), peers_folder() / "probe"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        options = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        subprocess.run(["g++", *options, str(source), "-o", str(program)], check=True)
    answer = subprocess.run([program, str(threads), file], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout)


def matrix_peak(threads: int) -> float:
    """GFLOP/s of a product of two 2048 x 2048 bfloat16 matrices."""
    import torch

    torch.set_num_threads(threads)
    left, right = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--file", type=Path, required=True)
    given = parser.parse_args()
    print(json.dumps(bandwidth(given.threads, given.file) | {"matrix_gflops": round(matrix_peak(given.threads), 1)}))


if __name__ == "__main__":
    main()
