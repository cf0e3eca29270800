"""How a bug is seeded: a subclass with one method done wrong, registered by what is wrong."""

from __future__ import annotations

from collections.abc import Callable

from moebius.schedule.blocks import BlockPool
from moebius.schedule.scheduler import Scheduler
from moebius.schedule.states import StatePool

BUGS: dict[str, type[Scheduler] | type[BlockPool]] = {}
FAMILIES: dict[str, str] = {}
"""Where not every family of models can show a bug, one that can: it is found sooner there."""


def bug(description: str, family: str | None = None) -> Callable[[type], type]:
    """A scheduler or a block pool with a bug."""

    def register(cls: type) -> type:
        BUGS[description] = cls
        if family is not None:
            FAMILIES[description] = family
        return cls

    return register


def bug_of_states(
    description: str, family: str = "all kinds"
) -> Callable[[type[StatePool]], type[StatePool]]:
    """A block pool whose pool of states has the bug."""

    def register(cls: type[StatePool]) -> type[StatePool]:
        class Seeded(BlockPool):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                if self.states is not None:
                    self.states.__class__ = cls

        bug(description, family)(Seeded)
        return cls

    return register
