"""Where the experts of a group of ranks are, and where they go while it serves."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moebius.engine import wire
from moebius.engine.client import ExpertLoads
from moebius.engine.faults import say
from moebius.errors import ConfigError, frames
from moebius.moe.placement import ALIKE, LayerPlacement, Nodes, Placement

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0
# Moving experts of a layer must make it so much more even: the busiest rank's tokens, over the
# mean. Less is within what one window differs from the next by.
MARGIN = 0.05
# Pairs (token, choice) that an expert has in the mean before anything is concluded from them.
_ENOUGH_PAIRS = 100


@dataclass
class Journey:
    """A placement that ranks are on their way to. `ended` is set when all are there, or none will
    be; `arrived` says which are."""

    number: int
    placement: Placement
    arrived: set[int] = field(default_factory=set)
    ended: threading.Event = field(default_factory=threading.Event)
    made: bool = False


class Places:
    """What each rank of a group holds. Used under the group's lock.

    now     the present one, of all ranks, the lost ones too
    moves   how often a layer's experts have moved
    """

    def __init__(self, first: Placement) -> None:
        self.now = first
        self.moves = 0
        self._number = 0
        self._journey: Journey | None = None

    def among(self, members: Sequence[int]) -> Placement | None:
        """What these ranks hold; None where an expert is at none of them."""
        try:
            return self.now.among(members)
        except ConfigError:
            return None

    def join(self) -> int:
        """A number for the present placement, by which the next epoch begins; where some ranks
        compute by the next one already, that is the present one."""
        if self._journey is not None and self._journey.arrived:
            self.now = self._journey.placement
        self._end(made=False)
        self._number += 1
        return self._number

    def begin(self, layers: Mapping[int, LayerPlacement]) -> tuple[wire.Move, Journey]:
        """All ranks are to hold these layers so: what to tell them."""
        self._end(made=False)
        self._number += 1
        self._journey = Journey(self._number, Placement({**self.now.layers, **layers}))
        held = {layer: each.held for layer, each in layers.items()}
        return wire.Move(self._number, held), self._journey

    def moved(self, number: int, rank: int) -> None:
        """A rank computes by what it was told."""
        journey = self._journey
        if journey is None or journey.number != number:
            return
        journey.arrived.add(rank)
        if len(journey.arrived) == self.now.ranks:
            self.now = journey.placement
            self.moves += 1
            self._end(made=True)

    def unmoved(self, number: int) -> wire.Move | None:
        """A rank cannot have what it was told: what to tell all, so that they let go of it."""
        if self._journey is None or self._journey.number != number:
            return None
        self._end(made=False)
        self._number += 1
        return wire.Move(self._number, {})

    def _end(self, *, made: bool) -> None:
        if self._journey is not None:
            self._journey.made = made
            self._journey.ended.set()
            self._journey = None


Move = Callable[[Mapping[int, LayerPlacement]], Journey | None]


class Balancer:
    """Moves experts, layer by layer, to where the measured loads want them.

    loads   of all ranks together, or None where they don't all compute
    places  what the ranks hold
    move    has all ranks hold some layers otherwise; None where they cannot now
    nodes   which ranks are near to each other
    """

    def __init__(
        self,
        loads: Callable[[], ExpertLoads | None],
        places: Places,
        move: Move,
        *,
        spare: int,
        nodes: Nodes = ALIKE,
        seconds: float = LOOK_SECONDS,
    ) -> None:
        self._loads = loads
        self._places = places
        self._move = move
        self._spare = spare
        self._nodes = nodes
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="balance", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> int:
        """Compare what is with what could be; how many layers' experts have moved."""
        measured = self._loads()
        loads = {} if measured is None else pairs_of(measured)
        wanted = self._better(loads)
        if not wanted:
            return 0
        before = self._places.now.imbalance(loads)
        moved = 0
        for layer, placement in wanted.items():
            if not self._moved(layer, placement):
                break
            moved += 1
        after = self._places.now.imbalance(loads)
        log.info(
            "experts of %d layers have moved; the busiest rank's tokens over the mean: %s",
            moved,
            ", ".join(f"layer {each}: {before[each]:.2f} -> {after[each]:.2f}" for each in wanted),
        )
        return moved

    def _better(self, loads: Mapping[int, Sequence[int]]) -> dict[int, LayerPlacement]:
        """The layers that would become more even by a margin, worst first."""
        now = self._places.now
        enough = {
            layer: pairs
            for layer, pairs in loads.items()
            if sum(pairs) >= _ENOUGH_PAIRS * len(pairs)
        }
        if not enough:
            return {}
        best = now.rebalanced(enough, spare=self._spare, nodes=self._nodes)
        found = now.imbalance(enough)
        possible = best.imbalance(enough)
        gains = {layer: found[layer] - possible[layer] for layer in enough}
        worst_first = sorted(gains, key=lambda layer: -gains[layer])
        return {layer: best.layers[layer] for layer in worst_first if gains[layer] >= MARGIN}

    def _moved(self, layer: int, placement: LayerPlacement) -> bool:
        """Whether a layer's experts have moved; without traffic that lasts until there is some."""
        journey = self._move({layer: placement})
        if journey is None:
            return False
        while not journey.ended.wait(1.0):
            if self._stopped.is_set():
                return False
        return journey.made

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self.look()
            except Exception as error:
                say(log.error, "experts were not balanced: %s", frames(error))


def pairs_of(loads: ExpertLoads) -> dict[int, tuple[int, ...]]:
    """What each expert of each layer got."""
    return {layer.layer: layer.pairs for layer in loads.layers}
