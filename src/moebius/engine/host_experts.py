"""Which experts lie in the host's memory beside a device, and how many the device has room for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from moebius.engine.config import EngineConfig
from moebius.engine.memory import MemoryPlan
from moebius.engine.placing import read_loads
from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.layout import Source
from moebius.models.store import PlannedWeight
from moebius.moe.crossing import CrossingRows
from moebius.moe.on_host import HostExperts
from moebius.ops import Feature, Operation, Ops, Use
from moebius.ops.formats import dtype_name

# The sequences that `auto` leaves room for in the KV cache are so long, where the model allows it.
SENSIBLE_LENGTH = 4096
# The part of a device's memory that `auto` leaves to what an allocator loses between blocks.
_SPARE_PARTS = 32


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Each layer's experts, those first that a device is to have first; `words` says which these
    are."""

    layers: Mapping[int, tuple[int, ...]]
    words: str

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig) -> "ExpertOrder":
        """The busiest first where loads are known, else by number; ties to the lowest number.

        Raises ConfigError for a model without experts, or that has not as many as are to be on the
        device, and for a file that does not hold this model's loads.
        """
        experts = model.experts
        if not experts:
            raise ConfigError(
                f"this {model.model_type} model has no experts, which is what may lie in the "
                "host's memory beside a device; leave experts out"
            )
        wanted = config.device_experts
        most = max(experts.values())
        if isinstance(wanted, int) and wanted > most:
            raise ConfigError(
                f"experts is {wanted}, which is how many of each layer's lie on the device, but a "
                f"layer of this model has {most}; use 0 to {most}, auto, cpu or device"
            )
        if config.expert_placement == "linear":
            in_order = {layer: tuple(range(count)) for layer, count in experts.items()}
            return cls(in_order, "the first by number")
        loads = read_loads(Path(config.expert_placement), experts)
        busiest = {
            layer: tuple(sorted(range(len(row)), key=lambda e: -row[e]))
            for layer, row in loads.items()
        }
        return cls(busiest, f"the busiest by {config.expert_placement}")

    @property
    def most(self) -> int:
        """Of any layer."""
        return max(map(len, self.layers.values()))

    def on_host(self, count: int) -> dict[int, tuple[int, ...]]:
        """What `count` of each layer on the device leave."""
        return {layer: numbers[count:] for layer, numbers in self.layers.items()}

    def sizes(self, sources: Sequence[Source], weights: Sequence[PlannedWeight]) -> list[int]:
        """Bytes of 0, 1, 2, ... experts of each layer on a device, where they are held so."""
        places = {
            (layer, e): at for layer, row in self.layers.items() for at, e in enumerate(row, 1)
        }
        sizes = [0] * (self.most + 1)
        for source, weight in zip(sources, weights, strict=True):
            if source.expert is not None:
                sizes[places[source.expert]] += weight.nbytes
        for at in range(1, len(sizes)):
            sizes[at] += sizes[at - 1]
        return sizes


def on_host(
    model: ModelConfig, order: ExpertOrder, count: int, ops: Ops, most: CrossingRows
) -> HostExperts | None:
    """All experts but `count` of each layer; None where that leaves none. Raises ConfigError where
    the host's operations lack what these experts ask for."""
    if count >= order.most:
        return None
    for part in model.feed_forward:
        if part.router is not None:
            features = frozenset() if part.gated else frozenset({Feature.TWO_MATRICES})
            if ops.capability(Use(Operation.EXPERT_ROWS, most.dtype, features)) is None:
                raise ConfigError(
                    f"experts in the host's memory are computed by the {ops.name} kernels, which "
                    f"do not compute in {dtype_name(most.dtype)}; use --dtype bfloat16 or float32"
                )
    return HostExperts(ops, order.on_host(count), model.experts, most)


def crossing_rows(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> CrossingRows:
    """The most that a step's rows are."""
    top_k = max(part.router.top_k for part in model.feed_forward if part.router is not None)
    return CrossingRows(config.max_num_batched_tokens, top_k, model.hidden_size, dtype)


def batch_invariant(host: HostExperts) -> bool:
    """Whether the rows that the host computes are (promise P1)."""
    return host.ops.batch_invariant([Use(Operation.EXPERT_ROWS, host.most.dtype)])


def least_cache(plan: MemoryPlan, config: EngineConfig) -> int:
    """Bytes of KV cache that `auto` leaves room for on a device: what is asked for; or what
    max_num_seqs sequences of a sensible length take, but no more than half of what there is without
    experts, unless one sequence that is asked for takes more.

    plan: without any experts on the device.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    several = plan.most_blocks(min(plan.max_model_len, SENSIBLE_LENGTH)) * plan.max_num_seqs
    one = 0 if config.max_model_len is None else plan.most_blocks(config.max_model_len)
    block = plan.cache.block
    return max(min(several * block + plan.states, plan.left // 2), one * block + plan.states)


def most_on_device(plan: MemoryPlan, sizes: Sequence[int], cache: int) -> int:
    """How many experts of each layer a device has room for beside so many bytes of KV cache.

    plan: without any. sizes: ExpertOrder.sizes.
    """
    room = plan.left - cache - plan.available // _SPARE_PARTS
    return max(count for count, size in enumerate(sizes) if size <= max(room, 0))


def placement_name(host: HostExperts) -> str:
    """What tells where experts lie, and by what the host computes its own, from another such."""
    digest = blake2b(digest_size=4, person=b"moebius-experts")
    for layer in sorted(host.experts):
        digest.update(repr((layer, sorted(host.on_host(layer)))).encode())
    return f"{host.ops.name}-{digest.hexdigest()}"
