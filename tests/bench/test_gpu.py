"""benchmarks/gpu.sh without a GPU: its stages rehearsed on a small model, and what it does when one does not finish."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def gpu(
    out: Path, stages: str, *arguments: str, python: str = sys.executable
) -> tuple[int, dict[str, Any], str]:
    """What the script returned, the records that it left, by stage, and what it said."""
    environment = os.environ | {
        "OUT": str(out),
        "PYTHON": python,
        "WHEELS": str(out / "none"),
        "STAGES": stages,
        "TMPDIR": str(out),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    records = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    return done.returncode, records, done.stdout + done.stderr


def test_a_stage_that_fails_or_is_stopped_leaves_a_record_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    """There are no weights to decode with; and nothing can import torch in a hundredth of a second."""
    code, records, said = gpu(
        tmp_path, "graphs:120 one_answer:0.01 environment:120", "--device", "cpu", "--small"
    )
    assert code == 1
    assert "run the stage checkpoint first" in said and "one_answer: stopped at its limit" in said
    assert not records["graphs"]["finished"] and records["environment"]["finished"]
    assert records["environment"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    code, records, said = gpu(tmp_path, "environment:120 graphs:120")
    assert code == 2 and not records
    assert (
        said.count(
            "torch finds no CUDA device; a rehearsal without one: benchmarks/gpu.sh --device cpu --small"
        )
        == 1
    )


def test_a_python_without_torch_is_told_what_to_do(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code, records, said = gpu(tmp_path, "environment:120 graphs:120", python=str(bare))
    assert code == 2 and not records
    assert said.count("has no torch; name a Python that has: PYTHON=PROGRAM") == 1
