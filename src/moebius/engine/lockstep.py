"""When ranks compute: all in the same step, or none.

A step exchanges tokens between ranks, so a rank without work takes part in the others' steps with
an empty batch; and where nobody has work, all sleep, which costs nothing.

Falling asleep must not miss a request on its way. The front counts what it hands to the group; each
request carries its number, and the other ranks are told the number too. Before each step the ranks
agree: each brings whether it has work, and the highest number it has heard of. They sleep only when
none has work and all have heard of the same number M. Then every request up to M is with its rank,
and finished; and a number above M, which reaches every rank, wakes all of them.
"""

from moebius.parallel.exchange import Exchange


class Lockstep:
    """One rank's part. Used on its engine's thread only."""

    def __init__(self, exchange: Exchange, heard: int = 0) -> None:
        """heard   the front's number when the group was formed"""
        self._exchange = exchange
        self._heard = heard
        self._settled = heard
        # Ranks that join a group don't know what the others were doing.
        self._running = True
        self.ready: int | None = None
        """What all brought as `ready` to the last step; None where they differed."""
        self.most_drawn = 0
        """The greatest number that any brought as `drawn` to the last step."""

    @property
    def awake(self) -> bool:
        """Whether the ranks are, or will be, waiting for this one to agree on a step."""
        return self._running or self._heard > self._settled

    def hear(self, number: int) -> None:
        """The front has handed out request `number`, to this rank or to another."""
        self._heard = max(self._heard, number)

    def agree(self, has_work: bool, ready: int = 0, drawn: int = 0) -> bool:
        """Whether all ranks make a step now. Raises PeerError.

        ready: the number of the placement of experts that this rank can compute by. drawn: of how
        many sequences it draws a token at most.
        """
        told = self._exchange.agree((int(has_work), self._heard, ready, drawn))
        numbers = [heard for _, heard, _, _ in told]
        some_work = any(work for work, *_ in told)
        self.ready = ready if all(each == ready for _, _, each, _ in told) else None
        self.most_drawn = max(most for *_, most in told)
        self._settled = max(numbers)
        self._running = some_work or min(numbers) < max(numbers)
        return some_work
