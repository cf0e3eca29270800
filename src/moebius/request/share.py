"""Whose a request is, and how much of an engine its owner gets beside others."""

from dataclasses import dataclass

from moebius.errors import RequestError, check_number

MAX_ACCOUNT = 64
MIN_WEIGHT = 0.1
MAX_WEIGHT = 1000.0


@dataclass(frozen=True, slots=True)
class Share:
    """Requests that wait take turns by account; one of weight 2 gets twice what one of weight 1
    gets.

    account   the owner's name, of at most MAX_ACCOUNT characters; "": nobody tells owners apart
    """

    account: str = ""
    weight: float = 1.0

    def check(self) -> None:
        """RequestError where this is no name, or no weight."""
        if not isinstance(self.account, str) or len(self.account) > MAX_ACCOUNT:
            raise RequestError(
                f"account is {self.account!r:.100}; it must be a name of at most {MAX_ACCOUNT} "
                "characters",
                param="account",
            )
        check_number("weight", self.weight, MIN_WEIGHT, MAX_WEIGHT)


NOBODY = Share()
"""Of every request of a server that knows no keys, and of `LLM`'s."""
