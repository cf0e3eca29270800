"""What ranks exchange, counted. Nothing here imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an exchange has moved so far, between this rank and others.

    calls             of agree, dispatch and combine
    bytes_out         of rows that went to other ranks; counts and ids, far less, are left out
    bytes_in          of rows that came from them
    seconds_waited    for other ranks, and for what they send
    """

    calls: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    seconds_waited: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.calls + other.calls,
            self.bytes_out + other.bytes_out,
            self.bytes_in + other.bytes_in,
            self.seconds_waited + other.seconds_waited,
        )

    def __sub__(self, before: "Traffic") -> "Traffic":
        return Traffic(
            self.calls - before.calls,
            self.bytes_out - before.bytes_out,
            self.bytes_in - before.bytes_in,
            self.seconds_waited - before.seconds_waited,
        )
