"""The command line's border: whatever ends a command becomes one line and an exit code."""

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from moebius.errors import EngineError, MoebiusError, in_one_line, wants_traceback

USAGE = 2
"""What was asked for cannot be done: the line says what would be right."""
FAILED = 1
INTERRUPTED = 130
NO_READER = 141
"""What a shell reports of a program that SIGPIPE ended."""
TERMINATED = 143
"""What a shell reports of a program that SIGTERM ended."""


def open_streams() -> None:
    """Put /dev/null in the place of stdin, stdout and stderr where they came closed.

    Python has None for them then, and the next file that is opened gets their number: what a
    library writes to the terminal would end up in it.
    """
    streams = (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_WRONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    )
    for number, (name, flags, mode) in enumerate(streams):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, flags)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


@contextmanager
def ended_in_order() -> Iterator[None]:
    """Let SIGTERM end what is in the block as Ctrl-C does: what was begun is taken back."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report(error: BaseException) -> int:
    """Say on stderr what ended a command, in one line; the exit code.

    MOEBIUS_TRACEBACK=1 shows where it happened as well, whatever it was.
    """
    error = _cause(error)
    if wants_traceback():
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return NO_READER
    if isinstance(error, OSError):
        _drop_output()
    print(f"moebius: {in_one_line(error)}", file=sys.stderr)
    wished = isinstance(error, MoebiusError) and not isinstance(error, EngineError)
    return USAGE if wished else FAILED


def _cause(error: BaseException) -> BaseException:
    """The first error of a group: tasks that ran side by side end because one of them failed."""
    while isinstance(error, BaseExceptionGroup):
        told = [each for each in error.exceptions if not isinstance(each, asyncio.CancelledError)]
        error = (told or error.exceptions)[0]
    return error


def _drop_output() -> None:
    """Nobody takes what stdout still holds; flushing it again at the end would only fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError:
        return  # closed already
