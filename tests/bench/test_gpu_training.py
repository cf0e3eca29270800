"""Training's stages of benchmarks/gpu.sh, rehearsed without a GPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.test_gpu import gpu

pytest.importorskip("triton")


def test_training_is_rehearsed(tmp_path: Path) -> None:
    stages = "environment:120 training:200 grouped:120 claim-2:200"
    code, records, said = gpu(tmp_path, stages, "--device", "cpu", "--small")
    assert code == 0, said
    training = records["training"]
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
    for dtype in ("bfloat16", "float32"):
        of = records["grouped"][f"small_{dtype}"]
        assert of.keys() == {"ours", "grouped_mm", "dense"}
        for each in of.values():
            assert each["forward_s"] > 0 and each["share_with_backward"] > 0
    pair = records["claim-2"]
    assert pair["finished"] and pair["steps"] == 10 and "time ratio" in pair["figures"]
    assert [point["step"] for point in pair["curves"]["dense"]] == [5, 10]
