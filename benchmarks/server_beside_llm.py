"""What HTTP, texts and a process of its own cost beside `LLM`: the same requests, served and not.

    .venv/bin/python benchmarks/server_beside_llm.py MODEL [--pairs 5] [--threads 2] [--streams 64]
        [--json FILE]

A `moebius serve` of this checkout and an `LLM` in this process answer the same requests in turns:
64 at once (prompts of 32 to 128 tokens, 32 tokens of answer each), over HTTP as 64 streams. The one
that does not answer sleeps. Which goes first changes from pair to pair; no prompt comes twice.

`ratio` is the server's throughput over LLM's, of a pair (aim: at least 0.95), median and half the
distance between the quartiles. The client shares the processors with the server, so its processor
time is given, too: seconds a run, and as a share of all that the machine's processors had to give.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

from before_after import in_turn
from records import processor, save
from second_process import samples
from server_process import served

_TOKENS = 32
_PROMPTS = (32, 128)
_CACHE_BYTES = 2**29


class Server:
    """Asked over HTTP, as many streams."""

    def __init__(self, url: str) -> None:
        from moebius.bench.client import Target

        self.client: list[float] = []
        body = {"temperature": 0, "ignore_eos": True}
        self._target = Target(url, "/v1/completions", "m", body=body)

    def seconds(self, asked: list[Any]) -> float:
        from moebius.bench.client import run_load

        before = time.process_time()
        found, seconds = asyncio.run(
            run_load(self._target, asked, [0.0] * len(asked), max_concurrency=None)
        )
        self.client.append(time.process_time() - before)
        failed = [record.error for record in found if record.error]
        if failed:
            raise RuntimeError(failed[0])
        return seconds


class Here:
    """An LLM in this process."""

    def __init__(self, model: str, threads: int, streams: int) -> None:
        from moebius import LLM, SamplingParams

        self._llm = LLM(
            model,
            threads=threads,
            max_num_seqs=streams,
            kv_cache_memory_bytes=_CACHE_BYTES,
        )
        self._params = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)

    def seconds(self, asked: list[Any]) -> float:
        prompts = [list(sample.prompt) for sample in asked]
        before = time.perf_counter()
        self._llm.generate(prompts, self._params, progress=False)
        return time.perf_counter() - before

    def close(self) -> None:
        self._llm.close()


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    options = ("--threads", str(args.threads), "--max-num-seqs", str(args.streams))
    options += ("--kv-cache-memory-bytes", str(_CACHE_BYTES), "--served-model-name", "m")
    here = Here(model, args.threads, args.streams)
    try:
        with served(model, *options) as server_here:
            server = Server(server_here.url)

            def run(who: Server | Here, pair: int) -> float:
                # in_turn gives both the same number; each has its own prompts in its own cache.
                return who.seconds(samples(pair, args.streams, _PROMPTS, _TOKENS))

            found = in_turn(args.pairs, lambda n: run(here, n), lambda n: run(server, n))
    finally:
        here.close()
    low, ratio, high = statistics.quantiles([llm / http for llm, http in found], n=4)
    seconds = statistics.median(http for _, http in found)
    client = statistics.median(server.client[1:])
    tokens = args.streams * _TOKENS
    return {
        "ratio": ratio,
        "spread": (high - low) / 2,
        "llm tokens per second": tokens / statistics.median(llm for llm, _ in found),
        "server tokens per second": tokens / seconds,
        "client processor seconds": client,
        "client share of processors": client / (seconds * len(os.sched_getaffinity(0))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for model in args.models:
        name = Path(model).name
        results[name] = measure(model, args)
        for what, value in results[name].items():
            print(f"{name:8} {what:28} {value:.3f}", flush=True)
    record = {"processor": processor(), "threads": args.threads, "streams": args.streams}
    save(args.json, {**record, "models": results})


if __name__ == "__main__":
    main()
