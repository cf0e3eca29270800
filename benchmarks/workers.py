"""Processes of a benchmark that are told what to do, all at once, and answer."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any


class Workers:
    """A process for each of some arguments, which calls `work(pipe, *arguments)`.

    When `stack` closes they are told None, and waited for.
    """

    def __init__(
        self, stack: ExitStack, work: Callable[..., None], arguments: Sequence[Sequence[Any]]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for each in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, *each))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            stack.callback(process.join)
        stack.callback(self._end)

    def tell(self, orders: Sequence[Any]) -> None:
        """An order for each."""
        for pipe, order in zip(self._pipes, orders, strict=True):
            pipe.send(order)

    def tell_all(self, order: Any) -> None:
        self.tell([order] * len(self._pipes))

    def answers(self) -> list[Any]:
        """The next thing that each says. EOFError where one has ended."""
        return [pipe.recv() for pipe in self._pipes]

    def _end(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it has ended by itself
                pipe.send(None)
