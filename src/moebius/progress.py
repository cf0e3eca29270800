"""How work that takes long tells how far it is, to whoever shows it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Advance = Callable[[int], object]
"""Hears how much more is done."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Gets what is done and how much of it there is: steps, rows or bytes."""


def silent(what: str, total: int) -> AbstractContextManager[Advance]:
    """No progress shown."""
    return nullcontext(lambda amount=1: None)


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Advance]:
    """A bar on stderr while that is a terminal; yields what hears of bytes that are done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.update(task, advance=nbytes)
