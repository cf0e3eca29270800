"""How often engines may be started again before that is no help any more."""

from collections import deque
from collections.abc import Callable


class RestartBudget:
    """At most `most` restarts within `seconds` without a finished request between them.

    An engine that dies again and again without serving anything will not be mended by yet another
    start; one that serves in between is worth starting. `clock` is monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float], most: int = 5, seconds: float = 600.0) -> None:
        self.most = most
        self.seconds = seconds
        self._clock = clock
        self._restarts: deque[float] = deque()

    def spend(self) -> bool:
        """Count a restart that is about to be made; False where it is one too many."""
        now = self._clock()
        while self._restarts and now - self._restarts[0] > self.seconds:
            self._restarts.popleft()
        if len(self._restarts) >= self.most:
            return False
        self._restarts.append(now)
        return True

    def finished(self) -> None:
        """A request has ended."""
        self._restarts.clear()
