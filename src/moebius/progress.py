"""How work that takes long tells how far it is, to whoever shows it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int], object]
"""Hears how much more is done."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Gets what is done and how much of it there is: steps, rows or bytes."""


def silent(what: str, total: int) -> AbstractContextManager[Advance]:
    """No progress shown."""
    return nullcontext(lambda amount=1: None)
