"""Moving experts between ranks that go on making steps.

A rank that is told of another placement reads what it lacks on a thread of its own, beside its
steps. Before each step the ranks tell each other which placement they have ready; once that is the
same at all, all compute by it from this very step on, and let go of what is others'.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping

from moebius.engine.faults import failure, say
from moebius.errors import MoebiusError
from moebius.models.decoder import Decoder
from moebius.models.store.load import ExpertMove, Loader
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops.cuda import device_for_threads

log = logging.getLogger(__name__)

Held = Mapping[int, tuple[tuple[int, ...], ...]]
"""What each rank holds, for some layers."""


class ExpertMoves:
    """One rank's part. Used on its engine's thread only.

    moved    is called with a placement's number once it is computed by
    failed   is called with the number of one that this rank cannot have, and why, on another thread
    """

    def __init__(self, loader: Loader, decoder: Decoder) -> None:
        self.number = 0
        self.moved: Callable[[int], None] = lambda number: None
        self.failed: Callable[[int, MoebiusError], None] = lambda number, error: None
        self._loader = loader
        self._decoder = decoder
        self._asked = 0
        self._arrived: queue.SimpleQueue[tuple[int, ExpertMove]] = queue.SimpleQueue()
        self._ready: tuple[int, ExpertMove] | None = None

    @property
    def placement(self) -> Placement:
        """What is computed by now."""
        return self._ranks.placement

    def ask(self, number: int, held: Held) -> None:
        """Have these layers as `held` says soon, and the others as they are; what was asked for
        before is not wanted any more."""
        self._asked = number
        self._ready = None
        threading.Thread(
            target=self._bring,
            args=(number, held, device_for_threads()),
            name="experts",
            daemon=True,
        ).start()

    def ready(self) -> int:
        """The number of the newest placement that this rank can compute by."""
        while not self._arrived.empty():
            number, move = self._arrived.get()
            if number == self._asked:
                self._ready = (number, move)
        return self.number if self._ready is None else self._ready[0]

    def agreed(self, number: int) -> None:
        """All ranks have said that they are ready for this placement: it is computed by from now
        on."""
        if self._ready is None or self._ready[0] != number:
            return
        move = self._ready[1]
        self._ready = None
        self._loader.move_experts(self._decoder, move)
        self.number = number
        self.moved(number)

    def set(self, number: int, placement: Placement, rank: int) -> None:
        """Compute by a placement, as rank `rank` of its ranks, when this returns: no step is made
        meanwhile. Raises ConfigError and WeightsError."""
        self._asked = number
        self._ready = None
        if (placement, rank) != (self.placement, self._ranks.rank):
            move = self._loader.bring_experts(self._decoder, placement, rank)
            self._loader.move_experts(self._decoder, move)
        self.number = number

    @property
    def _ranks(self) -> ExpertRank:
        ranks = self._decoder.ranks
        assert ranks is not None, "this decoder holds all experts"
        return ranks

    def _bring(self, number: int, held: Held, take_device: Callable[[], None]) -> None:
        try:
            take_device()
            some = {layer: LayerPlacement.of(each) for layer, each in held.items()}
            placement = Placement({**self.placement.layers, **some})
            self._arrived.put((number, self._loader.bring_experts(self._decoder, placement)))
        except MoebiusError as error:
            self._fail(number, error)
        except Exception as error:
            self._fail(number, failure("moving experts", error))

    def _fail(self, number: int, error: MoebiusError) -> None:
        say(log.error, "experts stay where they are: %s", error)
        self.failed(number, error)
