"""How often engines may be started again before that is no help any more."""


class RestartBudget:
    """At most `most` restarts in a row without a finished request between them.

    An engine that dies again and again without serving anything will not be mended by yet another
    start, however long each takes; one that serves in between is worth starting, and so is one that
    had lasted `seconds`. A request that is found to be what ends engines has them started three
    times: of these restarts one counts.
    """

    def __init__(self, most: int = 5, seconds: float = 600.0) -> None:
        self.most = most
        self.seconds = seconds
        self._restarts = 0
        self._culprits = 0

    def spend(self, lasted: float) -> bool:
        """Count a restart that is about to be made; False where it is one too many.

        lasted: for how many seconds the engine was there whose place it takes; 0 where it did not
        start at all.
        """
        if lasted >= self.seconds:
            self.finished()
        if self._restarts >= self.most:
            return False
        self._restarts += 1
        return True

    def finished(self) -> None:
        """A request has been answered."""
        self._restarts = 0
        self._culprits = 0

    def explained(self) -> None:
        """The last restarts were a request's doing, and it has ended for that."""
        self._culprits += 1
        self._restarts = min(self._restarts, self._culprits)
