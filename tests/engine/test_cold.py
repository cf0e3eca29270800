"""A model whose experts may stay on disk: what it needs of memory, and what it answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.test_engine import make, prompts, run, tokens
from moebius import machine
from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine, prepare
from moebius.engine.weight_bytes import WeightBytes
from moebius.errors import ConfigError, MemoryPlanError
from tiny import write_model

MIB = 2**20
WEIGHTS = WeightBytes(
    mapped=100 * MIB, copied=3 * MIB, parameters=9, experts=80 * MIB, largest_layer=10 * MIB
)


def test_one_layers_experts_have_to_fit_worked_by_hand() -> None:
    cold = replace(WEIGHTS, cold=True)
    assert (WEIGHTS.total, WEIGHTS.on_disk) == (103 * MIB, 0)
    assert (cold.total, cold.on_disk) == (33 * MIB, 70 * MIB)
    assert cold.parts == "30.0 MiB mapped, 3.0 MiB copied"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """48 MiB of experts in two layers, and little else."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
    write_model(tmp_path, **sizes)
    return tmp_path


def give(monkeypatch: pytest.MonkeyPatch, mebibytes: int) -> None:
    memory = machine.Memory(mebibytes * MIB, 700 * MIB, "cgroup")
    monkeypatch.setattr(machine, "memory", lambda: memory)


SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 128}


def test_a_model_larger_than_the_memory_is_refused_or_stays_on_disk(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = prepare(large, EngineConfig(**SMALL)).plan
    experts = everything.weights.experts
    needed = everything.weights.total + everything.workspace
    give(monkeypatch, needed // MIB - 20)
    with pytest.raises(MemoryPlanError, match=r"MiB available.*--mmap-cold"):
        prepare(large, EngineConfig(**SMALL))

    plan = prepare(large, EngineConfig(**SMALL, mmap_cold=True)).plan
    rows = {what: (size, remark) for what, size, remark in plan.rows()}
    assert plan.weights.on_disk == experts // 2
    assert plan.weights.total == everything.weights.total - experts // 2
    size, remark = rows["on disk"]
    assert size == f"{experts / 2 / MIB:.1f} MiB"
    assert remark.startswith("experts, read as they are needed; ")
    left = plan.available - plan.weights.total - plan.workspace - plan.kv_cache
    assert f"{left / MIB:.1f} MiB of them fit" in remark


def test_answers_are_the_same_from_disk(large: Path) -> None:
    answers = []
    for cold in (False, True):
        engine = load_engine(large, EngineConfig(**SMALL, mmap_cold=cold))
        asked = [make(engine, f"r{n}", prompt, max_tokens=8) for n, prompt in enumerate(prompts(3))]
        answers.append({id: tokens(steps) for id, steps in run(engine, asked).items()})
        engine.close()
    assert answers[0] == answers[1] and len(answers[0]) == 3


def test_there_must_be_experts_that_are_read_in_place(tmp_path: Path) -> None:
    sizes = {"mlp_only_layers": [0, 1]}
    write_model(tmp_path, **sizes)
    with pytest.raises(ConfigError, match=r"--mmap-cold.*has none that are read where they lie"):
        prepare(tmp_path, EngineConfig(mmap_cold=True))
