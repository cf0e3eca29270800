"""Can a tenant find out, through the prefix cache, what another one has asked?

    .venv/bin/python benchmarks/probing.py [--probes 400] [--model bundled] [--seed 1] [--json FILE]

`moebius serve` runs in a process of its own, with two keys. One key asks a prompt of 500 tokens;
another asks one that either begins with the same tokens or with none that anybody has asked, and
looks at what it could tell the two by: the time to its first token, and `cached_tokens` in the
answer's usage. Each is given as the area under the curve (AUC) of the guess "a hit is quicker" (or:
"has more cached tokens"): 0.5 is a coin's guess, 1 is certainty, and 0.55 is the goal.

The same is done with one key on both sides, where the cache is shared and a hit shows: what this
command would find where there was something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import records
from overload import opened, server

PROMPT = 500
IDS = range(100, 900)
VICTIM = "crowd"
PROBER = "one"


class Probe(NamedTuple):
    """seconds   to the first token"""

    hit: bool
    seconds: float
    cached: int


def auc(hits: Sequence[float], misses: Sequence[float]) -> float:
    """How likely a hit's value is above a miss's; ties count half (Mann and Whitney's U)."""
    above = sum((hit > miss) + 0.5 * (hit == miss) for hit in hits for miss in misses)
    return above / (len(hits) * len(misses))


async def asked(client: httpx.AsyncClient, key: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and the cached tokens that the usage tells."""
    body = {
        "prompt": prompt,
        "max_tokens": 1,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Authorization": f"Bearer {key}"}
    began = time.perf_counter()
    first = 0.0
    cached = 0
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - began
            usage = json.loads(line.removeprefix("data: ")).get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", cached)
    return first, cached


async def probes(
    url: str, prober: str, count: int, rng: random.Random, ids: range = IDS
) -> list[Probe]:
    """Half of them, in a random order, of a prompt that the victim has just asked."""
    kinds = [i % 2 == 0 for i in range(count)]
    rng.shuffle(kinds)
    found = []
    async with opened(url) as client:
        for hit in kinds:
            theirs = rng.choices(ids, k=PROMPT)
            await asked(client, VICTIM, theirs)
            mine = theirs if hit else rng.choices(ids, k=PROMPT)
            found.append(Probe(hit, *await asked(client, prober, [*mine[:-1], 99])))
    return found


def told(found: Sequence[Probe]) -> dict[str, Any]:
    hits = [each for each in found if each.hit]
    misses = [each for each in found if not each.hit]
    return {
        "probes": len(found),
        "auc_time": auc([-each.seconds for each in hits], [-each.seconds for each in misses]),
        "auc_cached_tokens": auc([each.cached for each in hits], [each.cached for each in misses]),
        "most_cached_tokens": max(each.cached for each in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--probes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    record: dict[str, Any] = {"processor": records.processor(), "seed": given.seed}
    with server(given.model) as url:
        record["another_key"] = told(asyncio.run(probes(url, PROBER, given.probes, rng)))
        few = min(given.probes, 40)
        record["the_same_key"] = told(asyncio.run(probes(url, VICTIM, few, rng)))
    print(json.dumps(record, indent=2))
    records.save(given.json, record)
    other = record["another_key"]
    return int(max(other["auc_time"], other["auc_cached_tokens"]) > 0.55)


if __name__ == "__main__":
    raise SystemExit(main())
