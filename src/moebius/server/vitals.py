"""What the live page is told: gauges as they are, and counts of what happened between two looks."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moebius.engine.client import (
    EngineClient,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    ExpertSpread,
    LayerLoad,
)
from moebius.server.recent import Binned, Recent

# Counters of EngineStats that a frame has the growth of.
_COUNTED = (
    "steps",
    "generation_tokens",
    "prompt_tokens",
    "prompt_tokens_cached",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
)


@dataclass(frozen=True, slots=True)
class Look:
    """An engine, or several as one, at one moment."""

    stats: EngineStats
    loads: ExpertLoads
    spread: ExpertSpread | None

    @classmethod
    def take(cls, client: EngineClient, spread: Callable[[], ExpertSpread | None]) -> "Look":
        """May wait for the engine, a second or two at most."""
        loads = client.expert_loads()
        return cls(client.stats(), loads, spread())


@dataclass(frozen=True, slots=True)
class Heard:
    """What the front door says of the same time.

    state            ready, not_ready or draining
    calls            API calls whose answer is not complete
    first_token, between_tokens   latencies as clients see them
    finished         sequences that ended, by reason
    refused          calls that got an error, by reason
    """

    state: str
    calls: int
    first_token: Binned
    between_tokens: Binned
    finished: dict[str, int]
    refused: dict[str, int]

    @classmethod
    def take(cls, recent: Recent, state: str, calls: int) -> "Heard":
        finished, refused = recent.take_ends()
        first = recent.first_token.take()
        return cls(state, calls, first, recent.between_tokens.take(), finished, refused)


@dataclass(frozen=True, slots=True)
class Places:
    """Blocks, or slots of states: used by sequences, cached for later ones, and all of them."""

    used: int
    cached: int
    total: int


@dataclass(frozen=True, slots=True)
class LayerPairs:
    """(token, choice) pairs that each of a layer's experts got."""

    layer: int
    top_k: int
    pairs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankWork:
    """What a rank did: the (token, choice) pairs of the experts that it holds, bytes and seconds as
    in Traffic. Ranks that hold the same expert share its pairs evenly."""

    rank: int
    computing: bool
    pairs: float
    bytes_out: int
    bytes_in: int
    seconds_waited: float


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that share a model's experts.

    imbalance   (layer, pairs of its busiest rank over the mean), of layers that computed something
    """

    epoch: int
    moves: int
    ranks: list[RankWork]
    imbalance: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Frame:
    """All that the page shows at one moment.

    seconds   that the counts are of, by the engine's clock; 0: it said nothing new
    counts    growth of the engine's counters; step_tokens are all tokens that were computed
    restarts, replayed   since the start
    """

    seconds: float
    heard: Heard
    running: int
    most_running: int
    waiting: int
    deferred: int
    blocks: Places
    states: Places
    counts: dict[str, int]
    restarts: int
    replayed: int
    layers: list[LayerPairs]
    group: Group | None


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while a page looks on, and how experts were loaded before it came.

    interval   seconds between two frames
    window     experts' loads of the last `window_steps` steps
    """

    model: str
    version: str
    fingerprint: str
    context: int
    block_size: int
    kv_bytes: int
    kv_dtype: str
    interval: float
    window_steps: int
    window: list[LayerPairs]


def frame(before: Look, now: Look, heard: Heard) -> Frame:
    """What happened between two looks."""
    stats = now.stats
    layers = _grown_layers(before.loads.layers, now.loads.layers)
    counts = {name: _grown(getattr(before.stats, name), getattr(stats, name)) for name in _COUNTED}
    counts["step_tokens"] = _grown(before.stats.step_tokens_sum, stats.step_tokens_sum)
    return Frame(
        seconds=max(stats.now - before.stats.now, 0.0),
        heard=heard,
        running=stats.running,
        most_running=stats.most_running,
        waiting=stats.waiting,
        deferred=min(stats.deferred, stats.waiting),
        blocks=Places(stats.used_blocks, stats.cached_blocks, stats.total_blocks),
        states=Places(stats.used_states, stats.cached_states, stats.total_states),
        counts=counts,
        restarts=stats.restarts,
        replayed=stats.replayed,
        layers=layers,
        group=None if now.spread is None else _group(before.spread, now.spread, layers),
    )


def facts(info: EngineInfo, model: str, version: str, interval: float, loads: ExpertLoads) -> Facts:
    return Facts(
        model=model,
        version=version,
        fingerprint=info.fingerprint,
        context=info.limits.max_model_len,
        block_size=info.block_size,
        kv_bytes=info.kv_bytes,
        kv_dtype=info.kv_dtype,
        interval=interval,
        window_steps=loads.steps,
        window=[LayerPairs(each.layer, each.top_k, each.pairs) for each in loads.layers],
    )


def _grown(before: int, now: int) -> int:
    """Less than before is an engine that began anew."""
    return max(now - before, 0)


def _grown_layers(before: Sequence[LayerLoad], now: Sequence[LayerLoad]) -> list[LayerPairs]:
    """What each expert got since; nothing where there was no look before, or at another model's."""
    known = {each.layer: each.total_pairs for each in before}
    found = []
    for each in now:
        earlier = known.get(each.layer, ())
        if len(earlier) != len(each.total_pairs):
            earlier = each.total_pairs
        pairs = tuple(map(_grown, earlier, each.total_pairs))
        found.append(LayerPairs(each.layer, each.top_k, pairs))
    return found


def _group(before: ExpertSpread | None, now: ExpertSpread, layers: Sequence[LayerPairs]) -> Group:
    pairs_of = {each.layer: each.pairs for each in layers}
    work = [0.0] * len(now.ranks)
    imbalance = []
    for layer in now.layers:
        loads = _rank_pairs(layer.held, pairs_of.get(layer.layer, ()))
        mean = sum(loads) / len(loads)
        if mean:
            imbalance.append((layer.layer, round(max(loads) / mean, 4)))
        work = [sum_ + load for sum_, load in zip(work, loads, strict=True)]
    earlier = now if before is None else before
    ranks = []
    for rank, then, pairs in zip(now.ranks, earlier.ranks, work, strict=True):
        traffic = rank.traffic - then.traffic
        ranks.append(
            RankWork(
                rank=rank.rank,
                computing=rank.computing,
                pairs=round(pairs, 1),
                bytes_out=max(traffic.bytes_out, 0),
                bytes_in=max(traffic.bytes_in, 0),
                seconds_waited=round(max(traffic.seconds_waited, 0.0), 4),
            )
        )
    return Group(now.epoch, now.moves, ranks, imbalance)


def _rank_pairs(held: Sequence[Sequence[int]], pairs: Sequence[int]) -> list[float]:
    """Each rank's part of a layer's pairs."""
    copies = Counter(expert for experts in held for expert in experts)
    return [
        sum(pairs[expert] / copies[expert] for expert in experts if expert < len(pairs))
        for experts in held
    ]
