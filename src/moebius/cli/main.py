"""The `moebius` command. Whatever it imports, it imports where an interruption already ends it in
order."""

import sys


def main() -> None:
    """Run a command. Whatever ends it early is one line on stderr: exit code 2 for what was asked
    for wrongly."""
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
    """`main`, and out: with torch loaded, Python's dismantling of its modules takes most of a
    second."""
    import atexit
    import gc
    import os
    import threading

    gc.set_threshold(
        100_000
    )  # walking torch's million objects again and again, while they are made, takes half of one
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int | None) or not all(
            thread.daemon for thread in threading.enumerate()[1:]
        ):
            raise
        atexit._run_exitfuncs()
        os._exit(end.code or 0)
