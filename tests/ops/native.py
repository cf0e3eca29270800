"""What the tests share that build csrc's own test programs and run them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, seconds: float = 3600) -> str:
    """Its output; the test fails with all of it where the command fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"{command[0]} returned {done.returncode}:\n{done.stdout}"
    return done.stdout


def build(name: str, *settings: str, targets: Sequence[str] = ()) -> Path:
    """The folder with the test programs (or some), built anew where a source changed; skips where there is no cmake."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    folder = ROOT / "build" / name
    run(cmake, "-S", ROOT, "-B", folder, "-DMOEBIUS_TESTS=ON", *settings)
    run(
        cmake,
        "--build",
        folder,
        "--parallel",
        str(len(os.sched_getaffinity(0))),
        *(["--target", *targets] if targets else []),
    )
    return folder
