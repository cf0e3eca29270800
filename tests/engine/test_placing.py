"""Where experts begin: in order, or by the loads of a file, which is checked."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from moebius.engine.config import EngineConfig
from moebius.engine.expert_share import ExpertShare
from moebius.engine.load import prepare
from moebius.engine.placing import near_nodes, start_placement
from moebius.errors import ConfigError
from moebius.inspect.config import InspectConfig
from moebius.inspect.corpus import Document
from moebius.inspect.run import write_report
from moebius.moe.placement import Placement
from oracle import FAMILY, TINY


def test_by_order_with_spares_unless_a_file_says_more(tiny_model: Path) -> None:
    for word in ("linear", "balanced"):
        config = EngineConfig(ranks=2, expert_placement=word, spare_experts=1)
        found = start_placement(tiny_model, config)
        assert found.held == {layer: ((0, 1, 2), (2, 3, 0)) for layer in (0, 1)}


@pytest.mark.parametrize("name", ["counts", "pairs"])
def test_by_the_loads_of_a_file(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """By hand: 9 and 1 against 5 and 4 in layer 0; 0 and 3 of 4 are alike in layer 1."""
    file = tmp_path / "loads.json"
    rows = [{"layer": 1, name: [2, 2, 2, 2]}, {"layer": 0, name: [9, 5, 4, 1]}]
    file.write_text(json.dumps({"layers": rows, "more": 1}))
    config = EngineConfig(ranks=2, expert_placement=str(file))
    held = start_placement(tiny_model, config).held
    assert [set(each) for each in held[0]] == [{0, 3}, {1, 2}]
    assert [len(each) for each in held[1]] == [2, 2]


def test_groups_of_experts_go_to_nodes(tmp_path: Path) -> None:
    """The published example of DeepSeek's load balancer, but for replicas: groups weigh 262, 330,
    116 and 325; one node gets 330 and 116, the other 325 and 262."""
    model = {**TINY, **FAMILY["dots1"], "n_routed_experts": 12, "n_group": 4, "topk_group": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dots1", **model}))
    nodes = near_nodes(tmp_path, (2, 2))
    assert nodes.sizes == (2, 2) and set(nodes.groups.values()) == {4}
    (layer, *_) = nodes.groups
    file = tmp_path / "loads.json"
    pairs = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    rows = [{"layer": each, "pairs": pairs} for each in nodes.groups]
    file.write_text(json.dumps({"layers": rows}))
    config = EngineConfig(ranks=4, expert_placement=str(file))
    held = start_placement(tmp_path, config, nodes).held[layer]
    halves = [{*held[0], *held[1]}, {*held[2], *held[3]}]
    assert {*range(3, 9)} in halves and {0, 1, 2, 9, 10, 11} in halves


def test_what_a_file_brings_is_in_the_log(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In order the first rank of two would have 1,800 of 2,000 pairs."""
    file = tmp_path / "loads.json"
    layers = [{"layer": layer, "pairs": [900, 900, 100, 100]} for layer in range(2)]
    file.write_text(json.dumps({"layers": layers}))
    with caplog.at_level(logging.INFO):
        start_placement(tiny_model, EngineConfig(ranks=2, expert_placement=str(file)))
    assert "layer 0 are placed by" in caplog.text and "1.80 -> 1.00" in caplog.text


def test_what_inspect_writes_is_such_a_file(tiny_model: Path, tmp_path: Path) -> None:
    config = InspectConfig(max_tokens=300, row_length=50, step_tokens=100)
    found = write_report(tiny_model, [Document("a", "text", "some words " * 100)], tmp_path, config)
    loads = {row["layer"]: row["counts"] for row in found["layers"]}
    file = str(tmp_path / "report.json")
    placed = start_placement(tiny_model, EngineConfig(ranks=2, expert_placement=file))
    assert placed == Placement.balanced(loads, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "layers is to be a list of objects; use report.json"),
        ({"layers": [3]}, "layers is to be a list of objects"),
        ({"layers": [{"layer": "a"}]}, "a layer's number is 'a'"),
        ({"layers": [{"layer": 0}]}, "counts of layer 0 is to be a list of counts"),
        ({"layers": [{"layer": 0, "pairs": [1, -2]}]}, "pairs of layer 0 is -2"),
        ({"layers": [{"layer": 0, "pairs": [1, True]}]}, "pairs of layer 0 is True"),
        ({"layers": [{"layer": 0, "pairs": [1] * 4}]}, "loads of 0 experts of layer 1"),
        ({"layers": [{"layer": n, "pairs": [1] * 5} for n in (0, 1)]}, "loads of 5 experts"),
        ({"layers": [{"layer": n, "pairs": [1] * 4} for n in (0, 1, 7)]}, "layer 7, which has 0"),
        ({"layers": [{"layer": n, "pairs": [1] * 4} for n in (0, 1, 1)]}, "stands there twice"),
        ({"layers": [{"layer": n, "pairs": [0] * 4} for n in (0, 1)]}, "no expert got a token"),
    ],
)
def test_a_file_with_other_things_is_refused(
    tiny_model: Path, tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        start_placement(tiny_model, EngineConfig(ranks=2, expert_placement=str(file)))


def test_options_that_mean_nothing_are_refused(tiny_model: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"ranks": 2, "spare_experts": -1}, "spare_experts is -1; it must be at least 0"),
        ({"spare_experts": 1}, "spare_experts is 1, but one rank holds all experts; set ranks"),
        ({"expert_placement": "balanced"}, "expert_placement is 'balanced', but one rank"),
        ({"ranks": 2, "expert_placement": ""}, "expert_placement is empty"),
    ]
    for options, said in refused:
        with pytest.raises(ConfigError, match=said):
            EngineConfig(**options)
    with pytest.raises(ConfigError, match="is 'balance', which is no file; use linear"):
        start_placement(tiny_model, EngineConfig(ranks=2, expert_placement="balance"))
    with pytest.raises(ConfigError, match="5 ranks cannot share the 4 experts"):
        start_placement(tiny_model, EngineConfig(ranks=5))


def test_the_plan_counts_spares_and_what_moves(tiny_model: Path) -> None:
    """An expert of tiny_model is three matrices of 24 by 32 float32, in two layers."""
    expert = 3 * 24 * 32 * 4

    def weights(**options: Any) -> tuple[int, int]:
        config = EngineConfig(ranks=2, kv_cache_memory_bytes=2**20, **options)
        found = prepare(tiny_model, config).plan.weights
        return found.mapped + found.copied, found.moving

    plain, still = weights()
    assert still == 0
    assert weights(spare_experts=1) == (plain + 2 * expert, 0)
    assert weights(spare_experts=2) == (plain + 4 * expert, 0)
    # A layer's two experts may come before the two that were there go.
    assert weights(expert_placement="balanced") == (plain, 2 * expert)
    assert weights(expert_placement="balanced", spare_experts=1) == (plain + 2 * expert, 3 * expert)


def test_a_rank_with_fewer_experts_has_room_for_one_more(tmp_path: Path) -> None:
    from tiny import write_model

    write_model(tmp_path, num_experts=5)
    expert = 3 * 24 * 32 * 4
    config = EngineConfig(ranks=2, expert_placement="balanced", kv_cache_memory_bytes=2**20)
    moving = [
        prepare(
            tmp_path, config, ExpertShare(rank, 2, start_placement(tmp_path, config))
        ).plan.weights.moving
        for rank in range(2)
    ]
    assert moving == [3 * expert, (3 + 2) * expert]
