"""Requests that are cancelled in random states leave nothing behind: no block, task, thread or open
file. The short form of what benchmarks/soak.py does for an hour."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serving import serving

STATES = ("a part of the headers", "a part of the body", "at once", "some answer", "the whole")
ASKED = 40
SEATS = 3
"""Sequences in one step: most requests wait for one."""
POOLS = ("uvloop_", "tokenise_")
"""Names of threads of pools, the event loop's and ours, which grow up to a bound as needed."""


def held() -> Counter[str]:
    """What this process has of each, the server on its thread included."""
    gc.collect()
    # By type: to be asked for its __class__ makes an object of torch warn.
    tasks = [each for each in gc.get_objects() if issubclass(type(each), asyncio.Task)]
    return Counter(
        tasks=sum(not task.done() for task in tasks),
        threads=sum(not each.name.startswith(POOLS) for each in threading.enumerate()),
        files=len(os.listdir("/proc/self/fd")),
    )


def in_use(url: str) -> dict[str, float]:
    """Requests and blocks, by the server's own metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {
        name: float(line.rpartition(" ")[2])
        for name in names
        for line in lines
        if line.startswith(f"vllm:{name}{{")
    }


def request(url: str, rng: random.Random) -> bytes:
    body = {
        "prompt": rng.choice(["def f(", "a common beginning " * 8, "x" * rng.randrange(1, 300)]),
        "max_tokens": rng.randrange(20, 200),
        "ignore_eos": True,
        "stream": rng.random() < 0.7,
        "n": rng.choice([1, 1, 3]),
        "logprobs": rng.choice([None, 2]),
    }
    text = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


def ask_and_leave(url: str, seed: int) -> str:
    """Hang up in a random state; which it was."""
    rng = random.Random(seed)
    state = rng.choice(STATES)
    data = request(url, rng)
    end = data.index(b"\r\n\r\n")
    if state == "a part of the headers":
        data = data[: rng.randrange(1, end)]
    elif state == "a part of the body":
        data = data[: rng.randrange(end + 4, len(data))]
    place = urlsplit(url)
    with socket.create_connection((str(place.hostname), int(place.port or 0)), 60) as sock:
        sock.sendall(data)
        if state == "some answer":
            sock.recv(rng.randrange(1, 4000))
        elif state == "the whole":
            while sock.recv(65536):
                pass
        else:
            time.sleep(rng.choice([0, 0.01, 0.1]))
        if rng.random() < 0.3:  # a reset instead of an orderly end
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    return state


def soon(good: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not (found := good()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_nothing_is_left_of_requests_that_were_cancelled(tiny_model: Path) -> None:
    question = {"prompt": "def f(", "max_tokens": 20, "temperature": 0, "logprobs": 1}

    def answer(url: str) -> object:
        return httpx.post(f"{url}/v1/completions", json=question, timeout=60).json()["choices"]

    with serving(tiny_model, "tiny", max_num_seqs=SEATS) as url:
        with ThreadPoolExecutor(8) as pool:  # what is made once, is made here
            list(pool.map(lambda seed: ask_and_leave(url, seed), range(20)))
        expected = answer(url)
        idle = in_use(url)
        assert len(idle) == 3
        assert soon(lambda: not any(in_use(url).values()))
        before = held()
        with ThreadPoolExecutor(8) as pool:
            states = Counter(pool.map(lambda seed: ask_and_leave(url, seed), range(40, 40 + ASKED)))
        assert set(states) == set(STATES)
        assert soon(lambda: not any(in_use(url).values())), in_use(url)
        assert soon(lambda: held() <= before), (held(), before)
        assert answer(url) == expected
