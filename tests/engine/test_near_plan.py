"""What ranks on several nodes of memory are planned to take, on hosts made of files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebius import machine
from moebius.cli.commands import app
from moebius.engine import expert_share
from moebius.engine.config import EngineConfig
from moebius.engine.expert_share import ExpertShare
from moebius.engine.load import prepare
from moebius.engine.place import NodeMemory, places
from moebius.engine.plan_words import human_bytes
from moebius.errors import MemoryPlanError
from parallel.test_topology import Host

GIB = 2**30
# Of tiny_model: 2 layers of 4 experts of three matrices of 24 by 32 float32.
EXPERT = 3 * 24 * 32 * 4
CONFIG = EngineConfig(ranks=2, kv_cache_memory_bytes=2**20, max_model_len=512)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Eight processors, and 16 GiB of memory that may be taken; tests say on which nodes."""
    monkeypatch.setattr(machine, "_allowed_processors", lambda: 8)
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(16 * GIB, 32 * GIB, "machine"))
    monkeypatch.setattr(expert_share, "places", partial(places, root=tmp_path))
    return Host(tmp_path).allow("0-7")


def two_nodes(host: Host, *free: float) -> None:
    host.node(0, "0-3", 16, "10 20", free[0]).node(1, "4-7", 16, "20 10", free[1])


def test_each_rank_is_planned_to_copy_what_it_reads(host: Host, tiny_model: Path) -> None:
    host.node(0, "0-7", 32, "10", 16)
    mapped = prepare(tiny_model, CONFIG).plan.weights
    assert (mapped.near, mapped.nodes) == (0, ())
    two_nodes(host, 8, 8)
    copied = prepare(tiny_model, CONFIG)
    weights = copied.plan.weights
    assert (weights.mapped, weights.near, weights.copied) == (0, mapped.mapped, mapped.copied)
    assert (weights.total, weights.nodes) == (mapped.total, (0,))
    assert weights.common == weights.near - 2 * 2 * EXPERT
    assert not any(weight.mapped for weight in copied.weights)
    rows = {name: row for name, *row in copied.rows()}
    assert rows["weights"][1].endswith(
        f"copied, {human_bytes(weights.near)} copied to memory node 0"
    )
    assert rows["repeated"][0] == human_bytes(weights.common)


def test_experts_to_move_are_counted_as_before(host: Host, tiny_model: Path) -> None:
    two_nodes(host, 8, 8)
    config = EngineConfig(ranks=2, kv_cache_memory_bytes=2**20, expert_placement="balanced")
    assert prepare(tiny_model, config).plan.weights.moving == 2 * EXPERT


def test_it_is_planned_for_the_rank_with_least_memory(host: Host, tiny_model: Path) -> None:
    two_nodes(host, 8, 3)
    prepared = prepare(tiny_model, CONFIG)
    assert prepared.plan.available == 3 * GIB + 3 * 1024
    assert prepared.plan.available_of == "memory node 1's 3.0 GiB"
    assert prepared.plan.weights.nodes == (1,)
    assert prepared.decoder.ranks is not None and prepared.decoder.ranks.rank == 1
    # Where a node has more than the rank's share of the host, that is the limit.
    two_nodes(host, 9, 9)
    assert prepare(tiny_model, CONFIG).plan.available == 8 * GIB


def test_ranks_of_a_node_share_what_it_has(host: Host, tiny_model: Path) -> None:
    """All copies are there twice. One that starts again is alone in taking memory."""
    two_nodes(host, 6, 6)
    config = EngineConfig(ranks=4, kv_cache_memory_bytes=2**20)
    plan = prepare(tiny_model, config).plan
    assert plan.available == (6 * GIB + 3 * 1024) // 2
    assert plan.available_of == "memory node 0's 6.0 GiB, which 2 ranks share"
    memory = NodeMemory((0,), 6 * GIB, ranks=2, apart=True)
    again = prepare(tiny_model, config, ExpertShare(0, 4, neighbours=1, memory=memory)).plan
    assert again.available == 6 * GIB
    # What is mapped would be there once.
    memory = NodeMemory((0,), 6 * GIB, ranks=2, apart=False)
    mapped = prepare(tiny_model, config, ExpertShare(0, 4, neighbours=4, memory=memory)).plan
    assert mapped.weights.near == 0
    common = mapped.weights.mapped - 2 * EXPERT
    assert mapped.available == (6 * GIB - common) // 2 + common


def test_a_node_that_is_too_small_is_refused_with_the_numbers(host: Host, tiny_model: Path) -> None:
    two_nodes(host, 8, 100 / 2**20)
    with pytest.raises(
        MemoryPlanError,
        match=r"weights \(0 B mapped, 0 B copied, \d+\.\d KiB copied to memory node 1\).*"
        r"need more than the 103\.0 KiB available \(left of memory node 1's 103\.0 KiB\).*"
        r"use fewer --ranks",
    ):
        prepare(tiny_model, CONFIG)


def test_the_command_prints_copies(host: Host, tiny_model: Path) -> None:
    two_nodes(host, 8, 8)
    asked = ["plan", str(tiny_model), "--ranks", "2"]
    table = CliRunner().invoke(app, asked)
    assert table.exit_code == 0
    assert "copied to memory node 0" in table.stdout and "repeated" in table.stdout
    record = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    weights = record["weights"]
    assert weights["nodes"] == [0] and weights["mapped"] == 0
    assert weights["near"] - weights["common"] == 2 * 2 * EXPERT
