"""Commands of moebius, each with a card of its own and in a process of its own, forked from this one
once it has imported what they import: that takes most of a short command's time.

A line of stdin is a command as JSON: its `arguments`, its `card`, environment `variables`, and the
file that takes its `stderr`. The line of stdout that answers it is its exit code.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import sitecustomize


def become(asked: dict[str, Any]) -> None:
    sitecustomize.CARD.clear()
    sitecustomize.CARD.update(asked["card"])
    os.environ.update(asked["variables"])
    os.environ["MOEBIUS_TEST_CARD"] = json.dumps(asked["card"])  # for the processes that it starts
    nothing = os.open(os.devnull, os.O_RDWR)
    stderr = os.open(asked["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for ours, its in enumerate((nothing, nothing, stderr)):
        os.dup2(its, ours)
    sys.argv = ["moebius", *asked["arguments"]]
    from moebius.cli.main import script

    script()
    sys.exit(0)


def main() -> None:
    import moebius.cli.commands
    import moebius.cluster.engines
    import moebius.engine.load
    import moebius.server.app
    import moebius.train.trainer  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
