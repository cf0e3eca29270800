"""This machine's ceilings, measured now: memory bandwidth (probe.cpp) and the matrix peak (torch).

    python ceilings.py --threads 2 --file PEERS/models/m1/model.safetensors

Prints one JSON object. The best pass counts, for all three: what slows a pass down is no property of the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

SIDE = 2048
PRODUCTS = 20
# Small products tell which dtype is the faster: a processor without bfloat16 products takes minutes for large ones.
TRIAL_SIDE = 256


def bandwidth(threads: int, file: Path | None = None) -> dict[str, float]:
    """GB/s of a plain read loop: `anonymous_gbs` over huge pages, `mapped_gbs` over the file (default: a new one).

    Needs g++.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        if file is None:
            file = Path(folder) / "file"
            file.write_bytes(bytes(2**26))
        options = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        subprocess.run(["g++", *options, Path(__file__).with_name("probe.cpp"), "-o", program], check=True)
        answer = subprocess.run([program, str(threads), file], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout)


def matrix_peak(threads: int) -> float:
    """GFLOP/s of a product of two 2048 x 2048 matrices, in bfloat16 or float32, whichever is faster here."""
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

    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    times = []
    for _ in range(products):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--file", type=Path, required=True)
    given = parser.parse_args()
    print(json.dumps(bandwidth(given.threads, given.file) | {"matrix_gflops": round(matrix_peak(given.threads), 1)}))


if __name__ == "__main__":
    main()
