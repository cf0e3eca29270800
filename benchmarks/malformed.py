"""Malformed requests by the ten thousand at a real server: each is answered 4xx in the error's
shape, at once, and a neighbour's tokens do not change.

    .venv/bin/python benchmarks/malformed.py --requests 10000

Half of them are bodies that schemathesis makes against our own /openapi.json, to be wrong on
purpose (negative mode); half are bytes on a socket, made of good requests by cutting, doubling and
changing them. Where a body happens to be right, the server may answer it.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from records import save

POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "def f(", "max_tokens": 1, "stop": ["a"], "logit_bias": {"5": 1}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}
NEIGHBOUR = {"prompt": "def fibonacci(n):", "max_tokens": 24, "seed": 7, "temperature": 1}
SECONDS = 10.0


@dataclass
class Tally:
    """What came of the requests: how many of each status, how long refusals took, what was
    wrong."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def note(self, status: int, body: bytes, seconds: float, what: str) -> None:
        self.statuses[str(status)] += 1
        if status == 200:
            return
        self.seconds.append(seconds)
        if not 400 <= status < 500 and status not in (501, 505):
            self.wrong.append(f"{status} to {what}")
        elif body and not _is_error(body):
            self.wrong.append(f"no error's shape: {body[:80]!r} to {what}")

    def percentile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _is_error(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
        return set(error) == {"message", "type", "param", "code"}
    except (ValueError, LookupError, TypeError):
        return False


@contextmanager
def served(model: str) -> Iterator[int]:
    """A server of its own on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moebius", "serve", model, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await_ready(port)
            yield port
            assert server.poll() is None, "the server has ended"
        finally:
            server.terminate()
            server.wait(30)


def _await_ready(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if get(port, "/health/ready")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not become ready")


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


class Poster:
    """Posts bodies over one connection, which is opened again where the server closes it."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)

    def __call__(self, path: str, data: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        try:
            self._connection.request("POST", path, data, headers)
            response = self._connection.getresponse()
            return response.status, response.read()
        except (OSError, ValueError):
            self._connection.close()
            raise


class Neighbour:
    """A client that asks the same all the while, and compares."""

    def __init__(self, port: int) -> None:
        self._post = Poster(port)
        self._expected = self._ask()
        self._ended = threading.Event()
        self.answers = 0
        self.different = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _ask(self) -> str:
        status, body = self._post("/v1/completions", json.dumps(NEIGHBOUR).encode())
        assert status == 200, body
        text: str = json.loads(body)["choices"][0]["text"]
        return text

    def _run(self) -> None:
        while not self._ended.is_set():
            self.answers += 1
            self.different += self._ask() != self._expected

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def wrong_bodies(port: int, count: int, number: int, tally: Tally) -> None:
    """`count` bodies that schemathesis makes wrong on purpose."""
    import schemathesis
    from schemathesis import GenerationMode

    document = json.loads(get(port, "/openapi.json")[1])
    schema = schemathesis.openapi.from_dict(document)
    post = Poster(port)
    for path in POSTS:
        strategy = schema[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE)
        _each_of(strategy, count // len(POSTS), number, partial(_post_case, post, path, tally))


def _post_case(post: Poster, path: str, tally: Tally, case: Any) -> None:
    data = json.dumps(case.body, default=str).encode("utf-8", "replace")
    _timed(lambda: post(path, data), tally, f"{path} {data[:200]!r}")


def _each_of(strategy: Any, count: int, number: int, check: Callable[[Any], None]) -> None:
    """Call `check` with `count` examples."""
    left = count

    def one(case: Any) -> None:
        nonlocal left
        left -= 1
        check(case)

    while left > 0:
        quiet = settings(
            max_examples=left,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        quiet(seed(number + left)(given(strategy)(one)))()


def _timed(ask: Callable[[], tuple[int, bytes]], tally: Tally, what: str) -> None:
    start = time.perf_counter()
    try:
        status, body = ask()
    except (OSError, ValueError) as error:
        tally.wrong.append(f"{type(error).__name__} to {what}")
        return
    tally.note(status, body, time.perf_counter() - start, what)


def wrong_bytes(port: int, count: int, number: int, tally: Tally) -> None:
    """`count` requests whose bytes were changed, on sockets of their own."""
    rng = random.Random(number)
    for _ in range(count):
        path = rng.choice(POSTS)
        data = _mangled(rng, _request(path, json.dumps(GOOD[path]).encode()))
        _timed(lambda data=data: _exchange(port, data), tally, repr(data[:300]))


def _request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _mangled(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        match rng.randrange(3):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.randrange(1, 8)]
            case _:
                changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
    return bytes(changed)


def _exchange(port: int, data: bytes) -> tuple[int, bytes]:
    """What the server says to these bytes, behind which nothing comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    if not head:  # the bytes end before a request does: a client that left
        return 499, b""
    return int(head.split(b" ", 2)[1]), b"" if b"chunked" in head.lower() else body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the record here")
    given_args = parser.parse_args()
    half = given_args.requests // 2
    tally = Tally()
    with served(given_args.model) as port:
        neighbour = Neighbour(port)
        try:
            wrong_bodies(port, half, given_args.seed, tally)
            wrong_bytes(port, given_args.requests - half, given_args.seed, tally)
        finally:
            neighbour.end()
        ready = get(port, "/health/ready")[0]
    record = {
        "requests": sum(tally.statuses.values()) + len(tally.wrong),
        "statuses": dict(sorted(tally.statuses.items())),
        "refusal_ms": {"p50": tally.percentile(0.5), "p99": tally.percentile(0.99)},
        "wrong": tally.wrong[:20],
        "neighbour": {"answers": neighbour.answers, "different": neighbour.different},
        "ready_after": ready == 200,
        "seed": given_args.seed,
    }
    print(json.dumps(record, indent=2))
    save(given_args.out, record)
    sys.exit(bool(tally.wrong) or neighbour.different > 0 or ready != 200)


if __name__ == "__main__":
    main()
