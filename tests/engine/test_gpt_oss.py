"""gpt-oss through the engine: what its windows give back, and how memory is planned at its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.windows import assert_windows_are_given_back
from moebius.engine.config import EngineConfig
from moebius.engine.kv_cache import block_bytes, lay_out
from moebius.engine.load import prepare
from moebius.engine.memory import CacheSizes, plan_memory
from moebius.engine.weight_bytes import WeightBytes
from moebius.files import read_json
from moebius.models.family import model_config
from moebius.ops.reference import ReferenceOps
from tiny_gpt_oss import PUBLISHED, in_mxfp4, write_gpt_oss


def test_blocks_behind_windows_are_planned_as_free_at_its_sizes() -> None:
    """12 layers keep all of 8,192 tokens, in 512 blocks of 16; 12 keep 127 tokens and a step's
    2,048, which touch at most 137 blocks. Without windows there would be 1,024."""
    config = model_config(read_json(PUBLISHED))
    specs = config.caches(torch.bfloat16)
    layout = lay_out(specs)
    assert sorted(layout.windows, key=str) == [128, None] and layout.rows == 12
    # Keys and values of 12 layers with 8 heads of 64, in two bytes.
    block = 16 * 12 * 2 * 8 * 64 * 2
    assert block_bytes(specs, ReferenceOps(), 16) == block
    plan = plan_memory(
        config,
        EngineConfig(kv_cache_memory_bytes=1300 * block, max_model_len=8192),
        WeightBytes(1000, 0, 500),
        dtype="bfloat16",
        device="cpu",
        cache=CacheSizes(layout.windows, block),
        available=2**40,
    )
    assert plan.most_blocks(8192) == 512 + 137
    assert plan.sequences(8192) == 2
    (row,) = (remark for name, _, remark in plan.rows() if name == "KV cache")
    assert row.endswith("freed behind windows of 128")


def test_an_engine_gives_back_what_its_windows_have_passed(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path)
    assert_windows_are_given_back(tmp_path, full=1, windowed=2)


@pytest.mark.parametrize("isa", ["", "reference"])
def test_a_plan_says_that_all_experts_are_mapped(
    tmp_path: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEBIUS_CPU_ISA", isa)
    in_mxfp4(tmp_path)
    prepared = prepare(tmp_path, EngineConfig(kv_cache_memory_bytes=2**20))
    (row,) = (remark for name, _, remark in prepared.rows() if name == "weights")
    # 2 layers, 3 experts, three matrices of 160 x 96 each, 17 bytes for 32 numbers.
    experts = 2 * 3 * 3 * 160 * 96 // 32 * 17
    assert prepared.plan.weights.mapped >= experts
    assert not prepared.plan.weights.repacked and "repacked" not in row
