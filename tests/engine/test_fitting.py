"""A cache that fits beside what a device's largest step really takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebius.engine.config import EngineConfig
from moebius.engine.fitting import DeviceMemory, fitted, largest_step, told_of_memory
from moebius.engine.load import prepare
from moebius.engine.memory import MemoryPlan
from moebius.engine.workspace import StepRows
from moebius.errors import MemoryPlanError
from moebius.models.store.load import load_decoder
from moebius.ops.reference import ReferenceOps
from oracle import save_tiny

CPU = torch.device("cpu")


class Counted(DeviceMemory):
    """A device with so much free, of which a step needs so much."""

    def __init__(self, total: int, free: int, step: int) -> None:
        self.total = total
        self._free = free
        self._step = step
        self.steps = 0

    def free(self) -> int:
        return self._free

    def watch(self) -> Callable[[], int]:
        before = self.steps
        return lambda: self._step * (self.steps - before)

    def make_step(self) -> None:
        self.steps += 1


@pytest.fixture
def plan(tiny_model: Path) -> MemoryPlan:
    return prepare(tiny_model, EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=64)).plan


def test_a_plan_that_fits_stays_but_for_the_workspace(plan: MemoryPlan) -> None:
    memory = Counted(total=2**24, free=2**23, step=2**21)
    found = fitted(plan, memory, memory.make_step, graphs=2**16)
    assert found == replace(plan, workspace=2**21 + 2**16)
    assert memory.steps == 1


def test_a_cache_is_made_smaller_than_planned(
    plan: MemoryPlan, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: 1 MiB free, less 512 KiB for the step, 64 KiB for graphs and 1 % of 2 MiB."""
    memory = Counted(total=2**21, free=2**20, step=2**19)
    found = fitted(plan, memory, memory.make_step, graphs=2**16)
    room = 2**20 - 2**19 - 2**16 - 2**21 // 100
    assert found.num_blocks == room // plan.cache.block < plan.num_blocks
    assert found.max_model_len == plan.max_model_len
    assert "less than planned" in caplog.text and "the largest step takes 512" in caplog.text
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING


def test_what_was_asked_for_and_does_not_fit_is_refused_with_the_numbers(plan: MemoryPlan) -> None:
    memory = Counted(total=2**21, free=2**20, step=2**19)
    room = 2**20 - 2**19 - 2**21 // 100
    with pytest.raises(MemoryPlanError) as refused:
        fitted(plan, memory, memory.make_step, asked=2**20)
    said = str(refused.value)
    assert "a KV cache of 1020.0 KiB does not fit" in said and "\n" not in said
    assert f"lower --kv-cache-memory-bytes to {room}" in said


def test_a_device_that_others_fill_is_refused(plan: MemoryPlan) -> None:
    memory = Counted(total=2**21, free=2**18, step=2**19)
    with pytest.raises(MemoryPlanError, match=r"there is no room for a KV cache: once weights \("):
        fitted(plan, memory, memory.make_step)
    memory = Counted(total=2**21, free=2**21 // 100 + 100, step=0)
    with pytest.raises(MemoryPlanError, match="one sequence of 64 tokens needs"):
        fitted(plan, memory, memory.make_step)


def test_too_little_memory_while_loading_is_one_line(plan: MemoryPlan) -> None:
    with pytest.raises(MemoryPlanError) as told, told_of_memory(plan, CPU):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB"
        )
    said = str(told.value)
    assert "CUDA out of memory" in said and "\n" not in said
    assert "weights take" in said and "the KV cache 1020.0 KiB" in said


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_the_largest_step_is_as_large_as_it_may_be(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a sequence has positions: then it is several sequences'."""
    save_tiny(tmp_path, model_type, max_position_embeddings=16)
    seen = []
    embed = ReferenceOps.embed

    def watched(self: ReferenceOps, ids: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append(len(ids))
        return embed(self, ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ReferenceOps, "embed", watched)
    decoder = load_decoder(tmp_path, torch.float32, ops=ReferenceOps())
    specs = decoder.config.caches(torch.float32)
    largest_step(decoder, specs, CPU, StepRows(32, 8, sequences=3, context=16), 4)()
    assert seen == [32, 8], "tokens, and rows whose logits are asked for"
