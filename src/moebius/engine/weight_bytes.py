"""What weights take: in the files' place, in copies, on the way between ranks, on disk."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from moebius.engine.config import EngineConfig
from moebius.engine.plan_words import human_bytes, node_names
from moebius.errors import ConfigError
from moebius.models.layout import Source
from moebius.models.store import PlannedWeight
from moebius.moe.ranks import ExpertRank


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of weights that are read in place from the files (`mapped`), or converted (`copied`).

    `repacked` of those copied are codes and scales in another order than the files'; `split` are
    heads' matrices that were taken out of one (kv_b_proj), and widened. stored is the
    dtype that most of them have in the files. routed are of the experts that routers choose from,
    however they are held. moving is room for experts that come before others
    go, and for as many as a rank may come to hold. near are copied as they are, to the `nodes` of
    memory that a rank is bound to; `common` of these are of weights that every rank has. experts
    are the mapped ones that routers choose from, and `largest_layer` those of the layer with most:
    where they are `cold`, no more than these count, and the others may stay on disk.
    """

    mapped: int
    copied: int
    parameters: int
    stored: str = ""
    moving: int = 0
    near: int = 0
    common: int = 0
    nodes: tuple[int, ...] = ()
    experts: int = 0
    largest_layer: int = 0
    cold: bool = False
    repacked: int = 0
    split: int = 0
    routed: int = 0

    @property
    def total(self) -> int:
        """What there has to be memory for."""
        return self.mapped + self.copied + self.moving + self.near - self.on_disk

    @property
    def on_disk(self) -> int:
        """What need not be in memory all at once."""
        return self.experts - self.largest_layer if self.cold else 0

    @property
    def parts(self) -> str:
        """How they are held, for a person."""
        kept = self.mapped - self.on_disk
        plain = self.copied - self.repacked
        said = f"{human_bytes(kept)} mapped, {human_bytes(plain)} copied"
        if self.repacked:
            said += f", {human_bytes(self.repacked)} repacked"
        if self.split:
            of = human_bytes(self.split)
            said += f", of which {of} are kv_b_proj in plain numbers, split by heads"
        if self.near:
            said += f", {human_bytes(self.near)} copied to {node_names(self.nodes)}"
        return said


def common_bytes(sources: Sequence[Source], weights: Sequence[PlannedWeight]) -> int:
    """What all of a host's ranks map, and is there once."""
    return sum(
        weight.nbytes
        for source, weight in zip(sources, weights, strict=True)
        if weight.mapped and source.expert is None
    )


def count_weights(
    sources: Sequence[Source],
    weights: Sequence[PlannedWeight],
    stored: str,
    config: EngineConfig,
    ranks: ExpertRank | None,
) -> WeightBytes:
    """What these weights take, as an engine with this configuration holds them. Raises ConfigError
    where experts may stay on disk, and none are read in place."""
    near = [
        (weight.nbytes, source.expert is None)
        for source, weight in zip(sources, weights, strict=True)
        if weight.near
    ]
    layers = _mapped_experts(sources, weights)
    found = WeightBytes(
        mapped=sum(weight.nbytes for weight in weights if weight.mapped),
        copied=sum(weight.nbytes for weight in weights if not (weight.mapped or weight.near)),
        parameters=sum(weight.count for weight in weights),
        stored=stored,
        near=sum(nbytes for nbytes, _ in near),
        common=sum(nbytes for nbytes, common in near if common),
        experts=layers.total(),
        largest_layer=max(layers.values(), default=0),
        repacked=sum(weight.nbytes for weight in weights if weight.repacked),
        split=sum(weight.nbytes for weight in weights if weight.split),
        moving=0 if ranks is None else _moving_bytes(sources, weights, ranks, config),
        cold=config.mmap_cold,
        routed=_routed_bytes(sources, weights),
    )
    if found.cold and not found.experts:
        raise ConfigError(
            "--mmap-cold lets experts stay on disk, but this model has none that are read where "
            "they lie in its files; leave it out"
        )
    return found


def in_memory(
    sources: Sequence[Source], weights: Sequence[PlannedWeight], *, on_host: bool
) -> tuple[list[Source], list[PlannedWeight]]:
    """Those in the host's memory beside a device, or the others."""
    chosen = [weight.on_host == on_host for weight in weights]
    return list(compress(sources, chosen)), list(compress(weights, chosen))


def _routed_bytes(sources: Sequence[Source], weights: Sequence[PlannedWeight]) -> int:
    pairs = zip(sources, weights, strict=True)
    return sum(weight.nbytes for source, weight in pairs if source.expert is not None)


def _mapped_experts(sources: Sequence[Source], weights: Sequence[PlannedWeight]) -> Counter[int]:
    """Bytes of the experts that are read in place, by layer."""
    layers = Counter[int]()
    for source, weight in zip(sources, weights, strict=True):
        if weight.mapped and source.expert is not None:
            layers[source.expert[0]] += weight.nbytes
    return layers


def _moving_bytes(
    sources: Sequence[Source],
    weights: Sequence[PlannedWeight],
    ranks: ExpertRank,
    config: EngineConfig,
) -> int:
    """Room for a rank's experts to become others, where they are to: a layer at a time, and one
    more of a layer where they don't divide evenly."""
    if config.expert_placement != "balanced":
        return 0
    sizes: Counter[int] = Counter()
    for source, weight in zip(sources, weights, strict=True):
        if source.expert is not None:
            sizes[source.expert[0]] += weight.nbytes
    more = 0
    largest = 0
    for layer, count in ranks.placement.experts.items():
        held = len(ranks.held(layer) or ())
        most = min(count, -(-count // ranks.placement.ranks) + config.spare_experts)
        one = sizes[layer] // max(held, 1)
        more += one * max(most - held, 0)
        largest = max(largest, one * most)
    return more + largest
