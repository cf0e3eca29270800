"""Where experts lie at the start: in order, or by the loads that a file tells.

The file is what was measured before: report.json of `moebius inspect`, or what `GET /v1/moe/stats`
has answered.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError
from moebius.files import read_json
from moebius.models.description import describe
from moebius.moe.placement import ALIKE, Nodes, Placement

log = logging.getLogger(__name__)

# The name of a layer's pairs in `moebius inspect`, and in /v1/moe/stats.
_PAIRS = ("counts", "pairs")


def near_nodes(directory: Path, sizes: tuple[int, ...]) -> Nodes:
    """Nodes of so many ranks each, and the groups of experts of the model in `directory`."""
    return Nodes(sizes, describe(directory).config.expert_groups)


def start_placement(directory: Path, config: EngineConfig, nodes: Nodes = ALIKE) -> Placement:
    """What the ranks of the model in `directory` hold until something better is known.

    Raises ConfigError for a model without experts, or with fewer of them than ranks, and for a file
    that does not hold this model's loads.
    """
    model = describe(directory).config
    if not model.experts:
        raise ConfigError(
            f"this {model.model_type} model has no experts, which is what ranks share"
        )
    spare = config.spare_experts
    if config.expert_placement in ("linear", "balanced"):
        return Placement.linear(model.experts, config.ranks, spare, nodes)
    path = Path(config.expert_placement)
    loads = read_loads(path, model.experts)
    placed = Placement.balanced(loads, config.ranks, spare=spare, nodes=nodes)
    linear = Placement.linear(model.experts, config.ranks, spare, nodes).imbalance(loads)
    for layer, balanced in placed.imbalance(loads).items():
        log.info(
            "experts of layer %d are placed by %s; the busiest rank's tokens over the mean: "
            "%.2f -> %.2f",
            layer,
            path,
            linear[layer],
            balanced,
        )
    return placed


def read_loads(path: Path, experts: Mapping[int, int]) -> dict[int, list[int]]:
    """How many (token, choice) pairs each expert of each layer got.

    experts: how many the model's layers have. Raises ConfigError for what is no file, are no such
    loads, or another model's.
    """
    if not path.is_file():
        raise ConfigError(
            f"expert_placement is {str(path)!r}, which is no file; use linear, balanced, or a file "
            "with loads"
        )
    rows = read_json(path).get("layers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            f"{path}: layers is to be a list of objects; use report.json of moebius inspect, or an "
            "answer of GET /v1/moe/stats"
        )
    loads = dict(_row(path, row) for row in rows)
    if len(loads) < len(rows):
        raise ConfigError(f"{path}: a layer stands there twice")
    for layer in sorted(loads.keys() | experts.keys()):
        found = len(loads.get(layer, ()))
        wanted = experts.get(layer, 0)
        if found != wanted:
            raise ConfigError(
                f"{path}: loads of {found} experts of layer {layer}, which has {wanted}; they are "
                "another model's"
            )
    if not any(map(any, loads.values())):
        raise ConfigError(f"{path}: no expert got a token; measure with some")
    return loads


def _row(path: Path, row: Mapping[str, Any]) -> tuple[int, list[int]]:
    layer = _count(path, "a layer's number", row.get("layer"))
    name = next((name for name in _PAIRS if name in row), _PAIRS[0])
    pairs = row.get(name)
    what = f"{name} of layer {layer}"
    if not isinstance(pairs, list):
        raise ConfigError(f"{path}: {what} is to be a list of counts, one for each expert")
    return layer, [_count(path, what, each) for each in pairs]


def _count(path: Path, what: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{path}: {what} is {value!r}; it must be a whole number of at least 0")
    return value
