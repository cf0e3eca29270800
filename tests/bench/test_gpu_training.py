"""Training's stages of benchmarks/gpu.sh, rehearsed without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.test_gpu import ROOT, gpu

pytest.importorskip("triton")

# One process for all stages: importing what each of them needs takes longer than the stage.
IN_TURN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpu, gpu_training
from claims import measure
measure._CURVE_ROWS = 8
for stage in ("environment", "training", "grouped", "claim-2"):
    sys.argv[1:2] = [stage]
    (gpu if stage in gpu.STAGES else gpu_training).main()
"""


def test_training_is_rehearsed(tmp_path: Path) -> None:
    options = ["first", "--out", str(tmp_path), "--device", "cpu", "--small"]
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, str(ROOT / "benchmarks"), *options],
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    check(records)


@pytest.mark.exhaustive
def test_the_script_trains(tmp_path: Path) -> None:
    """A process each, as on a card."""
    stages = "environment:120 training:200 grouped:120 claim-2:200"
    code, records, said = gpu(tmp_path, stages, "--device", "cpu", "--small")
    assert code == 0, said
    check(records)


def check(records: dict[str, Any]) -> None:
    check_training(records["training"])
    check_grouped(records["grouped"])
    pair = records["claim-2"]
    assert pair["finished"] and pair["steps"] == 10 and "time ratio" in pair["figures"]
    assert [point["step"] for point in pair["curves"]["dense"]] == [5, 10]


def check_training(training: dict[str, Any]) -> None:
    assert training["finished"] and training["small"] and not training["kernels"]
    for step in training["first_steps"]:
        assert step["loss"] == step["cpu_loss"] and step["norm"] == step["cpu_norm"]
    for dtype in ("bfloat16", "float32"):
        assert training[f"{dtype}_twice"] == {"losses": True, "tensors_that_differ": 0}
        for tokens in (8 * 32, 4 * 32):
            found = training[f"{dtype}_{tokens}_tokens"]
            rate = sorted(tokens / each for each in found["step_s"])
            assert found["tokens_per_second"] == pytest.approx(rate[1])
            assert found["share_of_matrix_peak"] > 0 and math.isfinite(found["loss"])


def check_grouped(records: dict[str, Any]) -> None:
    for dtype in ("bfloat16", "float32"):
        of = records[f"small_{dtype}"]
        assert of.keys() == {"ours", "grouped_mm", "dense"}
        for each in of.values():
            assert each["forward_s"] > 0 and each["share_with_backward"] > 0
