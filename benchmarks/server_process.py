"""A server of this checkout, for as long as a benchmark needs one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Served(NamedTuple):
    """Where it answers, without /v1, and its front's process."""

    url: str
    pid: int


@contextmanager
def served(model: str, *options: str) -> Iterator[Served]:
    """`moebius serve MODEL` with these options on a free port, once it is ready; told to end, and
    waited for, afterwards."""
    command = [sys.executable, "-m", "moebius", "serve", model, "--port", "0"]
    command += ["--log-level", "error", *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        for line in child.stderr:
            found = re.search(r"serving on (\S+)/v1", line)
            if found:
                yield Served(found[1], child.pid)
                return
        raise SystemExit("the server did not start")
    finally:
        child.terminate()
        child.wait(60)
