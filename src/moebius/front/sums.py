"""Several engines' figures as those of one."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from moebius.engine.client import EngineStats, ExpertLoads, LayerLoad

_GAUGES = (
    "running",
    "most_running",
    "waiting",
    "deferred",
    "used_blocks",
    "cached_blocks",
    "total_blocks",
    "used_states",
    "cached_states",
    "total_states",
)
_TIMES = ("last_step", "now")
# Below this part of an even share an expert counts as dead (moe/health.py).
_DEAD_BELOW = 0.1


def add_stats(present: Sequence[EngineStats], past: EngineStats) -> EngineStats:
    """The engines that are there, and the counters of those that were before.

    Ready where all are, and there is one; the times are the latest.
    """
    names = [field.name for field in fields(EngineStats) if field.name != "ready"]
    total = past
    for stats in present:
        sums: dict[str, Any] = {name: _added(name, total, stats) for name in names}
        total = replace(total, **sums)
    ready = bool(present) and all(stats.ready for stats in present)
    return replace(total, ready=ready)


def counters_of(stats: EngineStats) -> EngineStats:
    """What stays of an engine that is gone: its counters, without its gauges."""
    zeros: dict[str, Any] = dict.fromkeys(_GAUGES, 0)
    return replace(stats, ready=False, disk=stats.disk.counters, **zeros)


def totals_of(loads: ExpertLoads) -> ExpertLoads:
    """What stays of the loads of an engine that is gone: the totals, without the window."""
    return ExpertLoads(0, tuple(_total_of(layer) for layer in loads.layers))


def add_loads(known: Sequence[ExpertLoads]) -> ExpertLoads:
    """The experts' loads by the tokens of all engines, over the most steps that one has made."""
    each = [loads for loads in known if loads.layers]  # one that has not answered yet says nothing
    if len(each) == 1:
        return each[0]
    if not each:
        return ExpertLoads()
    layers = zip(*(loads.layers for loads in each), strict=True)
    return ExpertLoads(
        max(loads.steps for loads in each), tuple(_add_layers(layer) for layer in layers)
    )


def _total_of(layer: LayerLoad) -> LayerLoad:
    return LayerLoad(
        layer=layer.layer,
        top_k=layer.top_k,
        tokens=0,
        max_over_mean=math.nan,
        cv=math.nan,
        router_entropy=math.nan,
        dead=(),
        pairs=(0,) * len(layer.pairs),
        total_pairs=layer.total_pairs,
    )


def _added(name: str, a: EngineStats, b: EngineStats) -> object:
    first = getattr(a, name)
    second = getattr(b, name)
    if name in _TIMES:
        return max(first, second)
    if isinstance(first, tuple):
        return tuple(x + y for x, y in zip(first, second, strict=True))
    return first + second


def _add_layers(layers: Sequence[LayerLoad]) -> LayerLoad:
    pairs = tuple(map(sum, zip(*(layer.pairs for layer in layers), strict=True)))
    total_pairs = tuple(map(sum, zip(*(layer.total_pairs for layer in layers), strict=True)))
    tokens = sum(layer.tokens for layer in layers)
    nats = sum(layer.router_entropy * layer.tokens for layer in layers if layer.tokens)
    mean = sum(pairs) / len(pairs)
    variance = sum((count - mean) ** 2 for count in pairs) / len(pairs)
    return LayerLoad(
        layer=layers[0].layer,
        top_k=layers[0].top_k,
        tokens=tokens,
        max_over_mean=max(pairs) / mean if tokens else math.nan,
        cv=math.sqrt(variance) / mean if tokens else math.nan,
        router_entropy=nats / tokens if tokens else math.nan,
        dead=tuple(e for e, count in enumerate(pairs) if tokens and count < _DEAD_BELOW * mean),
        pairs=pairs,
        total_pairs=total_pairs,
    )
