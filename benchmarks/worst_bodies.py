"""How long a stream and /health/live wait while the worst bodies arrive beside them.

    .venv/bin/python benchmarks/worst_bodies.py [--model bundled] [--rounds 3] [--only WORD] [--json
    FILE]

The server runs in a process of its own. For each kind of tests/server/worst_bodies.py a stream is
started, then the body is sent, and until it is answered two things are timed: the longest pause
between two events of the stream, and the slowest answer of /health/live, which is asked all the
time. Each figure is the median of the rounds, in milliseconds; the first kind, "nothing", is half a
second without a body. The goal is 100 ms, on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from moebius.files import json_record, write_file
from server.worst_bodies import WorstBody, worst_bodies

GOAL_MS = 100.0
NOTHING = WorstBody("nothing", "", b"", status=0)


def request(path: str, body: bytes = b"") -> bytes:
    method = "POST" if body else "GET"
    head = f"{method} {path} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_answer(sock: socket.socket) -> tuple[int, bytes]:
    """Status and body of one answer with a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    size = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
    parts = [body]
    while sum(map(len, parts)) < size:
        parts.append(_received(sock))
    return int(lines[0].split()[1]), b"".join(parts)


def _received(sock: socket.socket) -> bytes:
    data = sock.recv(2**20)
    if not data:
        raise ConnectionError("the server hung up")
    return data


class Watch:
    """A stream and /health/live, each on a thread: when events came, and how long answers took."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model
        self.events: list[float] = []
        self.slowest = 0.0
        self._stop = threading.Event()
        self._begun = threading.Event()
        self._threads = [
            threading.Thread(target=self._stream),
            threading.Thread(target=self._health),
        ]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        assert self._begun.wait(30), "the stream did not begin"
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def longest_pause(self, start: float, end: float) -> float:
        """Seconds, over the pauses that touch the time from `start` to `end`."""
        pairs = zip(self.events, self.events[1:], strict=False)
        return max((b - a for a, b in pairs if b >= start and a <= end), default=float("inf"))

    def _stream(self) -> None:
        body = {
            "model": self._model,
            "prompt": "def f(",
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
        }
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as sock:
            sock.sendall(request("/v1/completions", json.dumps(body | {"temperature": 0}).encode()))
            while not self._stop.is_set() and b"[DONE]" not in (data := _received(sock)):
                self.events += [time.perf_counter()] * (b"data: " in data)
                self._begun.set()

    def _health(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as sock:
            while not self._stop.is_set():
                start = time.perf_counter()
                sock.sendall(request("/health/live"))
                status, _ = read_answer(sock)
                assert status == 200
                self.slowest = max(self.slowest, time.perf_counter() - start)
                time.sleep(0.002)


class Times(NamedTuple):
    """Milliseconds: the stream's longest pause, the slowest health, and the body's own answer."""

    pause: float
    health: float
    answer: float


def measure(port: int, model: str, worst: WorstBody) -> Times:
    """What a stream and `/health/live` see beside a body."""
    with Watch(port, model) as watch:
        time.sleep(0.1)
        watch.slowest = 0.0
        start = time.perf_counter()
        if worst is NOTHING:
            time.sleep(0.5)
        else:
            with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
                sock.sendall(request(worst.path, worst.body))
                status, answer = read_answer(sock)
                good = status == worst.status if worst.status else status < 500
                assert good, f"{worst.name}: {status} {answer[:300]!r}"
        end = time.perf_counter()
        time.sleep(0.1)
    return Times(
        pause=1000 * watch.longest_pause(start, end),
        health=1000 * watch.slowest,
        answer=1000 * (end - start),
    )


@contextmanager
def serving(model: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "moebius",
        "serve",
        model,
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (
                    "the server did not start"
                )
                time.sleep(0.05)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    kinds = []
    with serving(given.model) as port:
        measure(port, given.model, NOTHING)  # the first requests of a server are slower
        for worst in (NOTHING, *worst_bodies()):
            if worst is not NOTHING and given.only not in worst.name:
                continue
            rounds = [measure(port, given.model, worst) for _ in range(given.rounds)]
            kind: dict[str, Any] = {"kind": worst.name, "bytes": len(worst.body)}
            for name in Times._fields:
                median = statistics.median(getattr(one, name) for one in rounds)
                kind[name] = round(median, 1)
            kinds.append(kind)
            mark = " over" if max(kind["pause"], kind["health"]) > GOAL_MS else ""
            print(
                f"{worst.name:34} pause {kind['pause']:7.1f}  health {kind['health']:7.1f}  "
                f"answer {kind['answer']:8.1f} ms{mark}",
                flush=True,
            )
    slowest = {name: max(kind[name] for kind in kinds) for name in ("pause", "health")}
    print(
        f"longest pause {slowest['pause']} ms, slowest health {slowest['health']} ms; the goal is "
        f"{GOAL_MS:g} ms"
    )
    if given.json:
        record = {
            "model": given.model,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "rounds": given.rounds,
            "goal_ms": GOAL_MS,
            "slowest_ms": slowest,
            "kinds_ms": kinds,
        }
        write_file(given.json, json.dumps(record, indent=1) + "\n", ours=json_record)


if __name__ == "__main__":
    main()
