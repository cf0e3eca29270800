"""Which of several ranks that share a model's experts an engine is to be, and its memory."""

from dataclasses import dataclass, replace
from pathlib import Path

from moebius.engine.config import EngineConfig
from moebius.engine.place import NodeMemory, places
from moebius.engine.placing import start_placement
from moebius.engine.plan_words import human_bytes, node_names
from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.moe.placement import Placement
from moebius.moe.ranks import ExpertRank


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """Which of several ranks that share a model's experts an engine is to be.

    placement: what each of them holds; None: in order, as evenly as it goes. neighbours: of these
    on this host, itself among them, that have not taken their memory yet. memory: of the nodes that
    it is bound to; None: it is bound to none.
    """

    rank: int
    ranks: int
    placement: Placement | None = None
    neighbours: int = 1
    memory: NodeMemory | None = None

    @property
    def memory_apart(self) -> bool:
        """Whether its weights are copied to the nodes that it is bound to."""
        return self.memory is not None and self.memory.apart

    @classmethod
    def on_this_host(
        cls, directory: Path, config: EngineConfig
    ) -> tuple["ExpertShare", EngineConfig]:
        """The rank that has least memory, as if all were here, with what it computes with."""
        found = places(config.ranks, config.threads)
        rank = min(range(config.ranks), key=lambda each: found[each].room)
        placement = start_placement(directory, config)
        share = cls(rank, config.ranks, placement, config.ranks, found[rank].memory)
        return share, replace(config, threads=found[rank].threads)

    def of(self, model: ModelConfig, config: EngineConfig) -> ExpertRank:
        """The rank of this model. Raises ConfigError for a model without experts, or with fewer
        of them than ranks, and for a placement that is not for it."""
        if not model.experts:
            raise ConfigError(
                f"this {model.model_type} model has no experts, which is what ranks share"
            )
        placement = self.placement or Placement.linear(model.experts, self.ranks)
        if placement.ranks != self.ranks:
            raise ConfigError(
                f"experts are placed on {placement.ranks} ranks, but there are {self.ranks}"
            )
        return ExpertRank(placement, self.rank, config.max_num_batched_tokens)


def part_of_host(host: int, owner: str, share: ExpertShare, common: int) -> tuple[int, str]:
    """Bytes that a rank may take, and of what: of its host's, or of its nodes' where that is less.
    `common` are there once, for all ranks."""

    def part(available: int, ranks: int) -> int:
        return (available - common) // ranks + common

    found = part(host, share.neighbours)
    memory = share.memory
    if memory is None:
        return found, owner
    own = part(memory.available, min(memory.ranks, share.neighbours))
    if own >= found:
        return found, owner
    of_node = f"{node_names(memory.nodes)}'s {human_bytes(memory.available)}"
    return own, f"{of_node}, which {memory.ranks} ranks share" if memory.ranks > 1 else of_node
