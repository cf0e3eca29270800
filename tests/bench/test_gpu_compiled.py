"""What benchmarks/gpu_compiled.py reads of a compiler's output, and that no kernel of published models' sizes spills."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# As nvdisasm prints a kernel: a loop without products, one with two, and what jumps forwards.
CODE = """
.text.some_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   LDSM.16.M88.4 R4, [R8] ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R4, R6, R12 ;
        /*0060*/                   HMMA.16816.F32.BF16 R16, R4, R7, R16 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   EXIT ;
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_compiled")


def test_a_step_is_the_loop_with_the_products(program: Any) -> None:
    assert program.step_of(CODE) == {"step_instructions": 4, "step_products": 2}
    assert program.step_of(CODE.replace("HMMA", "FFMA")) == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
def test_no_product_spills(capability: int, tmp_path: Path) -> None:
    """But for some bytes, of a tile that is worth more than these; those of linear layers with many
    rows are moved between two parts of a sum alone."""
    out = tmp_path / "compiled.json"
    command = [
        sys.executable,
        BENCHMARKS / "gpu_compiled.py",
        f"--capability={capability}",
        f"--json={out}",
    ]
    subprocess.run(command, check=True, timeout=580)
    kernels = json.loads(out.read_text())["kernels"]
    assert {"gate_up", "down", "linear", "linear_split", "attend_split"} <= {
        each["kernel"] for each in kernels
    }
    spilling = {
        f"{each['operation']}: {each['kernel']}": each["stack_bytes"]
        for each in kernels
        if each["stack_bytes"] > (256 if each["kernel"] == "linear" else 80)
    }
    assert not spilling
