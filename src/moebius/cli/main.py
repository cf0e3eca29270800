"""The `moebius` command. It imports all else where an interruption already ends it in order."""

import sys


def main() -> None:
    """Run a command.

    Whatever ends it early is one line on stderr; the exit code is 2 for what was asked wrongly.
    """
    try:
        _run()
    except SystemExit:
        raise
    except BaseException as error:
        from moebius.cli.border import report

        sys.exit(report(error))


def _run() -> None:
    from moebius.cli.border import open_streams

    open_streams()
    from moebius.cli.commands import app

    try:
        app()
    finally:
        sys.stdout.flush()


def script() -> None:
    """`main`, and out: with torch loaded, taking down Python's modules takes most of a second."""
    import atexit
    import gc
    import os
    import threading

    # Walking torch's million objects again and again, while they are made, takes half a second.
    gc.set_threshold(100_000)
    try:
        main()
    except SystemExit as end:
        others = threading.enumerate()[1:]
        if not isinstance(end.code, int | None) or not all(each.daemon for each in others):
            raise
        atexit._run_exitfuncs()
        os._exit(end.code or 0)
