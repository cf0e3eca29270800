"""RankEngine: one of several engines that make each step together, as each holds some experts."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from moebius.engine.client import EngineInfo, EngineStats, StepOutput
from moebius.engine.constraints import Constraints
from moebius.engine.engine import Engine
from moebius.engine.faults import say
from moebius.engine.lockstep import Lockstep
from moebius.engine.moves import ExpertMoves
from moebius.engine.runner import Runner
from moebius.engine.tier import NO_TIER, Tier
from moebius.engine.trace import TraceWriter
from moebius.errors import PeerError
from moebius.parallel.exchange import Exchange
from moebius.parallel.traffic import Traffic
from moebius.schedule.scheduler import Scheduler, StepPlan

log = logging.getLogger(__name__)


class RankEngine(Engine):
    """An engine that computes only while it is in a group, whose members may change.

    When a rank of the group is lost, this engine keeps its requests, its cache and its weights. It
    tells `on_parted`, and rests until it joins the next epoch.

    use     gives the model's dispatchers an exchange
    moves   of its experts, between two steps; None: they stay where they are
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        info: EngineInfo,
        constraints: Constraints | None = None,
        *,
        use: Callable[[Exchange], None],
        moves: ExpertMoves | None = None,
        trace: TraceWriter | None = None,
        tier: Tier = NO_TIER,
        torch_threads: int | None = None,
    ) -> None:
        super().__init__(
            runner,
            scheduler,
            info,
            constraints,
            trace=trace,
            tier=tier,
            torch_threads=torch_threads,
        )
        self._use = use
        self.moves = moves
        self.on_parted: Callable[[PeerError], None] = lambda error: None
        self.epoch_steps = 0
        """How many steps were made in this epoch, or in the last one where there is none now; an
        agreement that there is nothing to do counts as one."""
        # What earlier epochs have exchanged, and this one's exchange: others read both at once.
        self._exchanged: tuple[Traffic, Exchange | None] = (Traffic(), None)
        self._lockstep: Lockstep | None = None
        # How many sequences each rank may draw for, for which ranks make logits together; and
        # whether they do in this step.
        self._most_shared = 0
        self._shares = False

    @property
    def has_work(self) -> bool:
        """Whether the group awaits this rank; never without a group."""
        return self._lockstep is not None and self._lockstep.awake

    def join(self, exchange: Exchange, heard: int) -> None:
        """Compute in this epoch from now on; the former one is left.

        heard: how many requests the front has handed to the group so far.
        """
        self.leave()
        self.epoch_steps = 0
        self._exchanged = (self.traffic, exchange)
        self._use(exchange)
        shared = self.runner.programs.shared
        self._most_shared = shared.rows if shared is not None and shared.usable else 0
        self._lockstep = Lockstep(exchange, heard)

    def leave(self) -> None:
        """Compute no more, until the next `join`."""
        self._lockstep = None
        exchange = self._exchange
        if exchange is not None:
            exchange.close()
            self._exchanged = (self.traffic, None)

    @property
    def traffic(self) -> Traffic:
        """What was exchanged in all epochs so far; from any thread."""
        past, exchange = self._exchanged
        return past if exchange is None else past + exchange.traffic

    def stats(self) -> EngineStats:
        return replace(super().stats(), traffic=self.traffic)

    def hear(self, number: int) -> None:
        """The front has handed request `number` to this rank or to another one."""
        if self._lockstep is not None:
            self._lockstep.hear(number)

    def close(self) -> None:
        self.leave()
        super().close()

    def _step(self) -> list[StepOutput]:
        assert self._lockstep is not None, "a step is made in a group"
        moves = self.moves
        try:
            ready = 0 if moves is None else moves.ready()
            some_work = self._lockstep.agree(self.scheduler.has_work, ready, self._most_drawn)
        except PeerError as error:
            self._part(error)
            return []
        self._shares = self._lockstep.most_drawn <= self._most_shared
        if moves is not None and self._lockstep.ready is not None:
            moves.agreed(self._lockstep.ready)
        outputs = super()._step() if some_work else []
        if self._lockstep is not None:
            self.epoch_steps += 1
        return outputs

    def _computed(self, plan: StepPlan) -> list[StepOutput]:
        try:
            if plan.chunks:
                return super()._computed(plan)
            self.runner.execute_empty()
            if self._shares:
                self._logits(())
        except PeerError as error:
            self._part(error)
        return []

    def _fail_step(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        outputs = super()._fail_step(plan, error)
        # The others may be waiting for what this rank was about to send.
        exchange = self._exchange
        assert exchange is not None, "a step is made in a group"
        self._part(exchange.epoch.lost((exchange.rank,), "failed at a step"))
        return outputs

    def _logits(self, rows: Sequence[int]) -> Tensor:
        return self.runner.logits(rows, shared=self._shares)

    @property
    def _most_drawn(self) -> int:
        scheduler = self.scheduler
        return min(len(scheduler.requests), scheduler.config.max_num_seqs)

    @property
    def _exchange(self) -> Exchange | None:
        return self._exchanged[1]

    def _part(self, error: PeerError) -> None:
        exchange = self._exchange
        assert exchange is not None, "who is in no group cannot lose it"
        own = exchange.epoch.told((exchange.rank,))
        say(log.warning, "%s is without its group: %s", own, error)
        self.leave()
        self.on_parted(error)
