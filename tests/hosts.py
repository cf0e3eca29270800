"""Hosts that serve one model together: `moebius serve` on each of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from namespaces import Where, inside

ASK = Path(__file__).parent / "hosts_ask.py"
START_SECONDS = 120.0


class Serving:
    """One `moebius serve`, and what it says."""

    def __init__(self, where: Where, *options: str, **variables: str) -> None:
        self.where = where
        self.options = options
        self.lines: list[str] = []
        self._said = threading.Condition()
        self.process = where.popen(
            *(sys.executable, "-m", "moebius", "serve", *options),
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env=os.environ | variables,
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

    def said(self, pattern: str) -> int:
        """How often it has."""
        return len(self._with(pattern))

    @property
    def gone(self) -> bool:
        return self.process.poll() is not None

    @property
    def children(self) -> list[int]:
        """Its engines' processes."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended
                fields = path.read_text().rpartition(")")[2].split()
                if fields[1] == str(self.process.pid) and fields[0] != "Z":
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
            with suppress(ProcessLookupError):  # it has ended with the one above
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


class Together:
    """The hosts, the front's first, and what clients on the front's host get."""

    def __init__(self, nodes: list[Serving]) -> None:
        self.nodes = nodes
        self.url = self._address()

    @property
    def front(self) -> Serving:
        return self.nodes[0]

    def start_again(self, number: int) -> None:
        """The same command on the same host."""
        before = self.nodes[number]
        before.close()
        self.nodes[number] = Serving(before.where, *before.options)
        if number == 0:
            self.url = self._address()

    def ask(self, bodies: Sequence[dict[str, Any]]) -> Asking:
        return Asking(self.front.where, self.url, bodies)

    def group(self) -> dict[str, Any]:
        """What the front says of its ranks."""
        with inside(self.front.where):
            answer = urllib.request.urlopen(f"{self.url}/v1/moe/stats", timeout=30)
        found: dict[str, Any] = json.load(answer)["group"]
        return found

    def computing(self) -> list[bool]:
        return [rank["computing"] for rank in self.group()["ranks"]]

    def wait_for_all(self) -> None:
        """Until all ranks compute together."""
        wait_until(lambda: all(self.computing()), 60)

    def _address(self) -> str:
        """The front's, once it serves."""
        return re.findall(r"http://\S+:\d+", self.front.wait_for("serving on"))[0]


@contextmanager
def hosts(
    wheres: Sequence[Where], model: str, endpoint: str, key: Path, *options: str
) -> Iterator[Together]:
    """A command on each host."""
    shared = (model, "--nnodes", str(len(wheres)), "--rdzv-endpoint", endpoint)
    shared += ("--cluster-key-file", str(key), "--threads", "1", *options)
    started: list[Serving] = []
    try:
        for node, where in enumerate(wheres):
            own = ("--port", "0") if node == 0 else ()
            started.append(Serving(where, *shared, "--node-rank", str(node), *own))
        yield Together(started)
    finally:
        for each in started:
            each.close()


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

    def wait_for_tokens(self) -> Asking:
        """Until each has some."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"
        return self

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


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
