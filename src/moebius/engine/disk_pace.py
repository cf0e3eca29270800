"""Whether reading a prefix beats computing it: both as fast as they were measured to be."""

_WEIGHT = 0.3
"""Of the latest measurement against all before it."""
_PROMPT_TOKENS = 64
"""A step of so many tokens tells how fast prompts are computed; with fewer, it is the weights'
bytes that take the time."""
_LEAST_WAIT = 0.25
_FIRST_WAIT = 10.0


class Pace:
    """Seconds a token of a prompt, and bytes a second of a disk; None while nothing was measured.

    One thread tells what was computed, another what was read.
    """

    def __init__(self) -> None:
        self.seconds_per_token: float | None = None
        self.bytes_per_second: float | None = None

    def computed(self, tokens: int, seconds: float) -> None:
        """A step took this long."""
        if tokens >= _PROMPT_TOKENS and seconds > 0:
            self.seconds_per_token = _mean(self.seconds_per_token, seconds / tokens)

    def read(self, nbytes: int, seconds: float) -> None:
        if seconds > 0:
            self.bytes_per_second = _mean(self.bytes_per_second, nbytes / seconds)

    def worth(self, tokens: int, nbytes: int) -> bool:
        """Whether so many bytes are read sooner than so many tokens are computed. What was not
        measured yet is tried."""
        if self.seconds_per_token is None or self.bytes_per_second is None:
            return True
        return nbytes / self.bytes_per_second < tokens * self.seconds_per_token

    def patience(self, tokens: int) -> float:
        """Seconds to wait at most: then they could have been computed."""
        if self.seconds_per_token is None:
            return _FIRST_WAIT
        return max(_LEAST_WAIT, tokens * self.seconds_per_token)


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + _WEIGHT * (now - before)
