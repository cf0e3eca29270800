"""Hosts that serve one model together, as tests have them: `moebius serve` on each of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASK = Path(__file__).parent / "hosts_ask.py"
START_SECONDS = 120.0


@dataclass(frozen=True)
class Where:
    """What a command on a host begins with, and what its environment has."""

    prefix: tuple[str, ...] = ()

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.prefix, *command], text=True, **options)


class Serving:
    """One `moebius serve`, and what it says."""

    def __init__(self, where: Where, *options: str, **variables: str) -> None:
        self.where = where
        self.lines: list[str] = []
        self._said = threading.Condition()
        command = (sys.executable, "-m", "moebius", "serve", *options)
        self.process = where.popen(
            *command,
            env=os.environ | variables,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, pattern: str, times: int = 1, seconds: float = START_SECONDS) -> str:
        """The line of its log that has the pattern, once there are so many of them."""
        with self._said:
            found = self._said.wait_for(
                lambda: self.gone or len(self._with(pattern)) >= times, seconds
            )
        assert found and len(self._with(pattern)) >= times, (pattern, self.lines)
        return self._with(pattern)[times - 1]

    @property
    def gone(self) -> bool:
        return self.process.poll() is not None

    @property
    def children(self) -> list[int]:
        """Its engines' processes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                if path.read_text().rpartition(")")[2].split()[1] == str(self.process.pid):
                    found.append(int(path.parent.name))
        return sorted(found)

    def end(self, seconds: float = 30.0) -> int:
        """SIGTERM; its exit status."""
        self.process.terminate()
        return self.process.wait(seconds)

    def kill_host(self) -> None:
        """All of its processes at once, as a host that loses power."""
        children = self.children
        self.process.kill()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if not self.gone:
            self.process.kill()
        self._reader.join()
        print(*self.lines, sep="\n")  # for who reads of a failure

    def _with(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as log:
            for line in log:
                with self._said:
                    self.lines.append(line.rstrip())
                    self._said.notify_all()
        self.process.wait()
        with self._said:
            self._said.notify_all()


@contextmanager
def hosts(
    wheres: Sequence[Where], model: str, endpoint: str, key: Path, *options: str
) -> Iterator[tuple[list[Serving], str]]:
    """A command on each host; all of them, and the front's address."""
    shared = (model, "--nnodes", str(len(wheres)), "--rdzv-endpoint", endpoint)
    shared += ("--cluster-key-file", str(key), "--threads", "1", *options)
    started: list[Serving] = []
    try:
        for node, where in enumerate(wheres):
            own = ("--port", "0") if node == 0 else ()
            started.append(Serving(where, *shared, "--node-rank", str(node), *own))
        line = started[0].wait_for("serving on")
        yield started, re.findall(r"http://\S+:\d+", line)[0]
    finally:
        for each in started:
            each.close()


def again(host: Serving) -> Serving:
    """The same command on the same host."""
    arguments = host.process.args
    assert isinstance(arguments, list)
    options = arguments[arguments.index("serve") + 1 :]
    return Serving(host.where, *options)


class Asking:
    """Requests that are sent to a front together, from its host."""

    def __init__(self, where: Where, url: str, bodies: Sequence[dict[str, Any]]) -> None:
        self._process = where.popen(
            sys.executable, str(ASK), url, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(bodies))
        self._process.stdin.close()
        self._process.stdin = None

    def wait_for_tokens(self) -> None:
        """Until each has some."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"

    def answers(self, seconds: float = 120.0) -> list[Any]:
        try:
            out, _ = self._process.communicate(timeout=seconds)
        finally:
            self._process.kill()
        assert self._process.returncode == 0
        found: list[Any] = json.loads(out.removeprefix("begun\n"))
        return found


def bodies(model: str, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests of several lengths, greedy and sampled."""
    return [
        {
            "model": model,
            "prompt": "naïve café " * (1 + 3 * number),
            "max_tokens": max_tokens + number,
            "temperature": 0.0 if number % 3 == 0 else 0.9,
            "seed": number,
            "logprobs": 2,
            "ignore_eos": True,
            "stream": True,
        }
        for number in range(count)
    ]


def wait_until(true: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
