"""What a server does when more is asked of it than it can do.

    .venv/bin/python benchmarks/overload.py [flood] [keys] [readers] [--model bundled]
        [--threads N] [--seconds 20] [--seed 1] [--json FILE]

`moebius serve` runs in a process of its own, with two keys of a key file, 16 seats and, in the
flood, a queue as long: what waits behind a flood takes its time, at the peak's rate. The clients
need processors, too: with a thread for each of them the engine shares its own (--threads).

flood    clients ask one after the other, enough of them that the batch is full: the peak, in
         answers a second. Then requests come in an open loop at ten times that rate: how many
         answers a second are whole (goal: 95 % of the peak), how long a refusal takes (99 % within
         50 ms), and how long after the last of them an answer is as quick as before (5 s).
keys     one request alone: how long it takes. Then 500 of another key's are asked for at once, and
         beside them one after the other, until half of the 500 have their answers: how long each
         waits for its place (twice its time alone at the most, in the median), the longest of them,
         and, apart, the first, which comes while the server still reads the 500.
readers  the time between tokens of 20 streams, alone and beside 500 clients that read a byte a
         second (5 % more at the most).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))

import records
from server_process import served

KEYS = '[crowd]\nkey = "crowd"\n[one]\nkey = "one"\n'
TOKENS = 32
OVERLOAD = 10
CROWD = 500
SLOW = 500
NORMAL = 20


@dataclass(frozen=True)
class Asked:
    """How one request went: its status, seconds to its first byte and to its end, and gaps between
    events."""

    status: int
    first: float
    whole: float
    gaps: list[float] = field(default_factory=list)


@contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """The address of a server of its own, with two keys."""
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory) / "keys.toml"
        keys.write_text(KEYS)
        keys.chmod(0o600)
        with served(model, "--api-keys", str(keys), *options) as (url, _):
            yield url


async def ask(
    client: httpx.AsyncClient, key: str, prompt: list[int], tokens: int = TOKENS
) -> Asked:
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    began = time.perf_counter()
    arrived: list[float] = []
    headers = {"Authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        first = time.perf_counter() - began
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                arrived.append(time.perf_counter())
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrived)]
    return Asked(response.status_code, first, time.perf_counter() - began, gaps)


async def ask_plainly(url: str, key: str, prompt: list[int], tokens: int = TOKENS) -> Asked:
    """The whole answer at once, by a socket alone: it takes little of the processors that the
    server computes on, which httpx does not."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + body)
        status = int((await reader.readline()).split()[1])
        first = time.perf_counter() - began
        await reader.read()
        return Asked(status, first, time.perf_counter() - began)
    finally:
        writer.close()


def opened(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=600, limits=limits)


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(100, 900) for _ in range(rng.randint(4, 32))]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def flood(url: str, seconds: float, rng: random.Random) -> dict[str, Any]:
    ended: list[float] = []

    async def answer() -> Asked:
        asked = await ask_plainly(url, "crowd", prompt(rng))
        if asked.status == 200:
            ended.append(time.perf_counter())
        return asked

    def rate_from(began: float) -> float:
        """Answers a second behind a first quarter of the time, in which the batch fills."""
        warm = began + seconds / 4
        return sum(warm < at < began + seconds for at in ended) / (0.75 * seconds)

    async def one_after_the_other(until: float) -> None:
        while time.perf_counter() < until:
            await answer()

    began = time.perf_counter()
    await asyncio.gather(*(one_after_the_other(began + seconds) for _ in range(24)))
    peak = rate_from(began)
    normal = statistics.median(
        [(await ask_plainly(url, "one", prompt(rng))).whole for _ in range(5)]
    )

    rate = OVERLOAD * peak
    tasks: list[asyncio.Task[Asked]] = []
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < seconds:
        while len(tasks) < now * rate:
            tasks.append(asyncio.create_task(answer()))
        await asyncio.sleep(0.005)
    goodput = rate_from(began)
    stopped = time.perf_counter()
    while (await ask_plainly(url, "one", prompt(rng))).whole > 2 * normal:
        await asyncio.sleep(0.05)
    recovered = time.perf_counter() - stopped
    found = await asyncio.gather(*tasks, return_exceptions=True)
    answers = [each for each in found if isinstance(each, Asked)]
    refused = [each.first for each in answers if each.status == 503]
    return {
        "peak_answers_per_s": peak,
        "asked_per_s": len(tasks) / seconds,
        "goodput_of_peak": goodput / peak,
        "refused": len(refused),
        "refusal_p50_ms": 1e3 * percentile(refused, 0.5),
        "refusal_p99_ms": 1e3 * percentile(refused, 0.99),
        "normal_again_s": recovered,
        "otherwise": sum(not isinstance(e, Asked) or e.status not in (200, 503) for e in found),
    }


async def keys(url: str, rng: random.Random, crowd: int = CROWD) -> dict[str, Any]:
    async with opened(url) as client:
        alone = [await ask(client, "one", prompt(rng)) for _ in range(5)]
        tasks = [
            asyncio.create_task(ask_plainly(url, "crowd", prompt(rng), rng.randint(16, 48)))
            for _ in range(crowd)
        ]
        await asyncio.sleep(0)
        beside = []
        while sum(not task.done() for task in tasks) > crowd / 2:
            beside.append(await ask(client, "one", prompt(rng)))
        await asyncio.gather(*tasks)
    time_alone = statistics.median(each.whole for each in alone)
    waits = [each.first / time_alone for each in beside]
    later = waits[1:]
    return {
        "crowd": crowd,
        "alone_s": time_alone,
        "asked_beside": len(beside),
        "waited_over_alone": statistics.median(later),
        "longest_over_alone": max(later),
        "first_over_alone": waits[0],
    }


async def readers(url: str, rng: random.Random, slow: int = SLOW) -> dict[str, Any]:
    host, port = url.removeprefix("http://").split(":")

    async def dawdle() -> None:
        body = b'{"prompt": "x", "max_tokens": 1000, "ignore_eos": true, "stream": true}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer crowd\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection(host, int(port), limit=1)
        try:
            writer.write(head.encode() + body)
            while await reader.read(1):
                await asyncio.sleep(1.0)
        except ConnectionError:
            pass  # cut off
        finally:
            writer.close()

    async def normal(client: httpx.AsyncClient) -> float:
        asked = await asyncio.gather(*(ask(client, "one", prompt(rng), 64) for _ in range(NORMAL)))
        return statistics.median(gap for each in asked for gap in each.gaps)

    async with opened(url) as client:
        before = await normal(client)
        tasks = [asyncio.create_task(dawdle()) for _ in range(slow)]
        await asyncio.sleep(2.0)
        beside = await normal(client)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "slow": slow,
        "alone_ms": 1e3 * before,
        "beside_ms": 1e3 * beside,
        "over": beside / before - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", default=["flood", "keys", "readers"])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {
        "processor": records.processor(),
        "seed": given.seed,
        "threads": given.threads,
    }
    small = ["--max-num-seqs", "16", "--max-queue-requests", "16"]
    if given.threads is not None:
        small += ["--threads", str(given.threads)]
    for what in given.what:
        rng = random.Random(given.seed)
        many = () if what == "flood" else ("--max-queue-requests", "1024")
        with server(given.model, *small, *many) as url:
            if what == "flood":
                found[what] = asyncio.run(flood(url, given.seconds, rng))
            elif what == "keys":
                found[what] = asyncio.run(keys(url, rng))
            else:
                found[what] = asyncio.run(readers(url, rng))
        for name, value in found[what].items():
            print(
                f"{what:8} {name:22} {value:.3f}"
                if isinstance(value, float)
                else f"{what:8} {name:22} {value}",
                flush=True,
            )
    records.save(given.json, found)


if __name__ == "__main__":
    main()
