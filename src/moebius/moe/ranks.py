"""Which experts a rank holds, and over what it exchanges rows: what may change between two steps.

How rows travel in a step is in moebius.moe.all_to_all.
"""

from collections.abc import Mapping

from torch import Tensor

from moebius.errors import ConfigError, PeerError
from moebius.moe.all_to_all import RECEIVED, AllToAllDispatcher
from moebius.moe.dispatch import Dispatcher, LocalDispatcher
from moebius.moe.placement import Placement
from moebius.ops import Ops
from moebius.ops.program import Rows
from moebius.parallel.exchange import Exchange


class ExpertRank:
    """One rank's part in sharing experts out: what the dispatchers of all its layers ask.

    tokens     the most of a step, at any rank
    received   how many rows may come in a step, named as programs count them

    Placement and exchange may become others between two steps, the same at all ranks. Until it
    joins an exchange, a rank can be planned for and can compute nothing.

    Raises ConfigError for a rank that the placement does not have, and for an exchange that was
    made for another one or for other steps.
    """

    def __init__(
        self, placement: Placement, rank: int, tokens: int, exchange: Exchange | None = None
    ) -> None:
        self.tokens = tokens
        self.number = rank  # where all are there
        self.received = Rows(RECEIVED, placement.ranks * tokens)
        self._exchange: Exchange | None = None
        self.placement = placement
        self.place(placement, rank)
        if exchange is not None:
            self.join(exchange)

    def place(self, placement: Placement, rank: int) -> None:
        """Experts lie as `placement` says, and this is rank `rank` of its ranks.

        The exchange that was joined is kept where it has as many ranks; else another is to be.
        """
        self.check(placement, rank)
        exchange = self._exchange
        if exchange is not None and (exchange.rank, exchange.size) != (rank, placement.ranks):
            self._exchange = None
        self.placement = placement
        self.rank = rank
        self._held = {layer: frozenset(each.held[rank]) for layer, each in placement.layers.items()}
        self._owners = {layer: each.owners(rank) for layer, each in placement.layers.items()}

    def check(self, placement: Placement, rank: int) -> None:
        """Raises ConfigError where `place` would."""
        if not 0 <= rank < placement.ranks:
            raise ConfigError(
                f"rank {rank} is none of the {placement.ranks} that experts are placed on; they "
                "are counted from 0"
            )
        most = self.received.most // self.tokens
        if placement.ranks > most:
            raise ConfigError(
                f"experts are placed on {placement.ranks} ranks, but memory was planned for {most}"
            )
        self.require(placement.experts)

    def require(self, experts: Mapping[int, int]) -> None:
        """Raises ConfigError where these are not how many experts each layer has."""
        placed = self.placement.experts
        for layer in sorted(experts.keys() | placed.keys()):
            wanted = experts.get(layer, 0)
            found = placed.get(layer, 0)
            if wanted != found:
                raise ConfigError(
                    f"{found} experts are placed for layer {layer}, which has {wanted}"
                )

    def join(self, exchange: Exchange) -> None:
        """Steps from now on trade their rows over `exchange`."""
        here = (
            f"rank {self.rank} of {self.placement.ranks} with steps of up to {self.tokens} tokens"
        )
        spec = exchange.spec
        there = f"rank {exchange.rank} of {spec.size} with steps of up to {spec.tokens} tokens"
        if here != there:
            raise ConfigError(f"{here} was to join an exchange that was made for {there}")
        self._exchange = exchange

    @property
    def exchange(self) -> Exchange:
        """The one that was joined. Raises PeerError before that."""
        if self._exchange is None:
            raise PeerError(
                f"rank {self.rank} of {self.placement.ranks} has joined no group yet",
                ranks=(self.rank,),
            )
        return self._exchange

    def held(self, layer: int) -> frozenset[int] | None:
        """The experts of a layer that lie here; None for a layer that has no router."""
        return self._held.get(layer)

    def holds(self, layer: int, expert: int) -> bool:
        """Whether this expert of a layer lies here."""
        return expert in self._held[layer]

    def owners(self, layer: int) -> Tensor:
        """LayerPlacement.owners, for this rank's own rows."""
        return self._owners[layer]

    def dispatcher(self, ops: Ops, layer: int) -> Dispatcher:
        """How the tokens of a layer get to their experts."""
        if layer not in self.placement.layers:
            return LocalDispatcher()
        return AllToAllDispatcher(ops, self, layer)
