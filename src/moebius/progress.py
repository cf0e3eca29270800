"""How work that takes long tells how far it is, to whoever shows it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advance(Protocol):
    """Hears of each part that is done."""

    def __call__(self, amount: int = 1, /) -> object: ...


Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Gets what is done and how much of it there is: steps, rows or bytes."""


def silent(what: str, total: int) -> AbstractContextManager[Advance]:
    """No progress shown."""

    def nothing(amount: int = 1, /) -> None:
        pass

    return nullcontext(nothing)
