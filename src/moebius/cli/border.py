"""The command line's border: whatever ends a command becomes one line and an exit code."""

import asyncio
import os
import sys
import traceback
from pathlib import Path

from moebius.errors import MoebiusError

USAGE = 2
"""What was asked for cannot be done: the line says what would be right."""
FAILED = 1
INTERRUPTED = 130
NO_READER = 141
"""What a shell reports of a program that SIGPIPE ended."""

_LONGEST = 600
_PACKAGE = Path(__file__).parent.parent


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


def report(error: BaseException) -> int:
    """Say on stderr what ended a command, in one line; the exit code.

    MOEBIUS_TRACEBACK=1 shows where it happened as well, whatever it was.
    """
    error = _cause(error)
    if os.environ.get("MOEBIUS_TRACEBACK", "0") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return NO_READER
    if isinstance(error, OSError):
        _drop_output()
    print(f"moebius: {_line(error)}", file=sys.stderr)
    return USAGE if isinstance(error, MoebiusError) else FAILED


def _cause(error: BaseException) -> BaseException:
    """The first error of a group: tasks that ran side by side end because one of them failed."""
    while isinstance(error, BaseExceptionGroup):
        told = [each for each in error.exceptions if not isinstance(each, asyncio.CancelledError)]
        error = (told or error.exceptions)[0]
    return error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    match error:
        case MoebiusError():
            return text or type(error).__name__
        case OSError(strerror=str(why)):
            return why if error.filename is None else f"{error.filename}: {why}"
        case MemoryError():
            return "out of memory" + (f": {text}" if text else "")
    kind = type(error).__name__
    what = f"{kind}: {text}" if text else kind
    return f"unexpected {what}{_place(error)}; MOEBIUS_TRACEBACK=1 shows how it came to that"


def _place(error: BaseException) -> str:
    """The last line of ours that was running."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not ours:
        return ""
    name = Path(ours[-1].filename).relative_to(_PACKAGE.parent)
    return f" (at {name}:{ours[-1].lineno})"


def _drop_output() -> None:
    """Nobody takes what stdout still holds; flushing it again at the end would only fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError:
        return  # closed already
