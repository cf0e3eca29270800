"""A server under mixed requests for an hour, a third of them cancelled: does anything pile up?

    .venv/bin/python benchmarks/soak.py [--model bundled] [--seconds 3600] [--rate 10]
        [--cancelled 0.33] [--seed 1] [--json FILE]

Requests come at `rate` a second, drawn at random: texts and chats, streamed and whole, greedy and
drawn, one choice and two, with log-probabilities, stop strings and schemas, prompts that others
have asked for and new ones. So many of them are cancelled by hanging up at a random time: before
the body is whole, while they wait, in the middle of the answer, or after it.

First the tokenizer's cache of words, which is bounded, is filled. Every few seconds the resident
memory of each of the server's processes, its threads and its open files are noted. Reported, behind
a warm-up of a quarter of the time, is the slope of memory in MB an hour (Theil and Sen: the median
of the slopes between all pairs of notes, with the quartiles beside it; aim: at most 1), and what is
left once nobody asks for anything: requests, blocks that are in use, threads and open files beyond
those after the warm-up. Ends with exit code 1 where something is left, or a request that was not
cancelled did not get a whole answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import statistics
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from records import processor, save
from server_process import served

_NOTES = 240
_MB = 10**6
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name"],
}
_CACHED = "def fibonacci(n):\n    " * 8
_IN_USE = (
    "moebius_num_requests_running",
    "moebius_num_requests_waiting",
    "moebius_kv_cache_usage_perc",
)


@dataclass
class Notes:
    """What one of the server's processes held, at which second."""

    pid: int
    at: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def take(self, now: float) -> None:
        root = Path(f"/proc/{self.pid}")
        status = (root / "status").read_text()
        self.at.append(now)
        self.resident.append(1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0]))
        self.threads.append(int(re.findall(r"Threads:\s+(\d+)", status)[0]))
        self.files.append(len(list((root / "fd").iterdir())))

    def slope(self, since: float) -> list[float]:
        """Quartiles of the growth of memory, in MB an hour."""
        known = [(at, size) for at, size in zip(self.at, self.resident, strict=True) if at >= since]
        slopes = [
            (later - earlier) / _MB / (end - begin) * 3600
            for (begin, earlier), (end, later) in itertools.combinations(known, 2)
        ]
        return statistics.quantiles(slopes, n=4)


def processes_of(front: int) -> list[Notes]:
    """The front's, and the engine's that it has started."""
    children = Path(f"/proc/{front}/task").glob("*/children")
    engines = [int(pid) for each in children for pid in each.read_text().split()]
    return [Notes(pid) for pid in (front, *engines)]


def drawn(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    body: dict[str, Any] = {
        "max_tokens": rng.randint(1, 48),
        "temperature": rng.choice([0, 1]),
        "seed": rng.randrange(2**31),
        "stream": rng.random() < 0.5,
        "n": rng.choice([1, 1, 1, 2]),
    }
    if rng.random() < 0.2:
        body["stop"] = ["\n\n", "return"]
    if rng.random() < 0.1:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": _SCHEMA},
        }
    known = _CACHED if rng.random() < 0.5 else "".join(rng.choices("abcdefgh (=):\n", k=200))
    text = known[: rng.randint(4, len(known))]
    if rng.random() < 0.5:
        if rng.random() < 0.3:
            body["logprobs"] = 2
        return "/v1/completions", {**body, "prompt": text}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}


def fill_tokenizer(url: str, rng: random.Random) -> None:
    """It remembers so many words; what it takes for them is no leak."""
    for _ in range(20):
        words = " ".join("".join(rng.choices("abcdefgh", k=8)) for _ in range(1000))
        body = json.dumps({"prompt": words}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/tokenize", body, headers)).read()


class Load:
    """Requests by sockets alone; `outcomes` counts what came of them."""

    def __init__(self, url: str, rng: random.Random, cancelled: float) -> None:
        self.outcomes: Counter[str] = Counter()
        host, port = url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        self._rng = rng
        self._cancelled = cancelled

    async def ask(self) -> None:
        rng = self._rng
        path, asked = drawn(rng)
        body = json.dumps(asked).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            if rng.random() < self._cancelled:
                self.outcomes["cancelled"] += 1
                if rng.random() < 0.2:
                    writer.write(head + body[: rng.randrange(len(body))])
                else:
                    writer.write(head + body)
                # Most answers take some tenths of a second.
                await asyncio.sleep(rng.expovariate(5))
                writer.transport.abort()
                return
            writer.write(head + body)
            answer = await asyncio.wait_for(reader.read(), 120)
            self.outcomes[self._came_of(answer, asked["stream"])] += 1
        except (OSError, TimeoutError) as error:
            self.outcomes[type(error).__name__] += 1
        finally:
            writer.close()

    @staticmethod
    def _came_of(answer: bytes, stream: bool) -> str:
        status = answer.split(maxsplit=2)[1].decode() if answer else "nothing"
        if status != "200":
            return status
        whole = b"data: [DONE]" in answer if stream else b'"usage"' in answer
        return "whole" if whole else "cut off"


async def soak(
    url: str, processes: list[Notes], args: argparse.Namespace
) -> tuple[Counter[str], float]:
    """Ask until the time is over, and take notes; the outcomes, and when all was answered."""
    rng = random.Random(args.seed)
    load = Load(url, rng, args.cancelled)
    began = time.monotonic()
    tasks: set[asyncio.Task[None]] = set()
    due = noted = 0.0
    while (now := time.monotonic() - began) < args.seconds:
        if now >= due:
            due += rng.expovariate(args.rate)
            task = asyncio.create_task(load.ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if now >= noted:
            noted += args.seconds / _NOTES
            for process in processes:
                process.take(now)
        await asyncio.sleep(max(0.0, min(due, noted) - (time.monotonic() - began)))
    await asyncio.gather(*tasks)
    return load.outcomes, time.monotonic() - began


def in_use(url: str) -> dict[str, float]:
    """What requests hold, by the server's own metrics, once it has been idle for a moment."""
    time.sleep(3.0)
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    found = {}
    for name in _IN_USE:
        values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        if not values:
            raise SystemExit(f"the server does not tell {name}")
        found[name] = sum(map(float, values))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--cancelled", type=float, default=1 / 3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with served(args.model, "--kv-cache-memory-bytes", str(2**25)) as (url, front):
        processes = processes_of(front)
        fill_tokenizer(url, random.Random(args.seed))
        outcomes, ended = asyncio.run(soak(url, processes, args))
        left = in_use(url)
        for process in processes:
            process.take(ended)
    warm = args.seconds / 4
    found: dict[str, Any] = {
        "seconds": args.seconds,
        "requests": dict(outcomes),
        "left": left,
    }
    for name, process in zip(("front", "engine"), processes, strict=True):
        first = next(i for i, at in enumerate(process.at) if at >= warm)
        low, slope, high = process.slope(warm)
        found[name] = {
            "MB an hour": slope,
            "quartiles": [low, high],
            "MB": [size / _MB for size in process.resident[:: _NOTES // 24]],
            "threads more": process.threads[-1] - process.threads[first],
            "files more": process.files[-1] - process.files[first],
        }
    print(json.dumps(found, indent=2))
    save(args.json, {"processor": processor(), "seed": args.seed, "rate": args.rate, **found})
    piled = any(left.values()) or any(
        found[name][what] > 0
        for name in ("front", "engine")
        for what in ("threads more", "files more")
    )
    return 1 if piled or set(outcomes) - {"whole", "cancelled"} else 0


if __name__ == "__main__":
    sys.exit(main())
