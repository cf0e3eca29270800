"""What it costs that the engine of a server is a process of its own.

    .venv/bin/python benchmarks/second_process.py MODEL [MODEL ...] [--pairs 7] [--threads 2]
        [--firsts 40] [--json FILE]

Two servers of this checkout run at a time, one with its engine on a thread, one with it in another
process. A client sends both the same requests over HTTP, streamed, in turns: 16 requests at once
(prompts of 32 to 128 tokens, 32 tokens of answer each), and one request after the other (8 tokens,
1 of answer) for the time to the first token. Which server goes first changes from pair to pair.

Throughput is the ratio apart / together of a pair's seconds: above 1 is worse. The first token is
the difference apart - together of neighbouring requests, in milliseconds: medians, and half the
distance between the quartiles. On a machine that others use, look at the lower quartiles of both:
a step whose threads have to share a processor takes twice as long. `outside` is the part of the
first token in which the engine does not compute, as the server's own metrics say: from the arrival
to the first step, and from that step's end to the event loop. Beside them stand seconds of
processor time a run: of all of a server's processes, and of the client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from before_after import compared, in_turn
from records import processor, save

TOGETHER = "together"
APART = "apart"
KINDS = (TOGETHER, APART)
_REQUESTS = 16
_TOKENS = 32
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """One of the two, and what its runs took."""

    pids: list[int]
    url: str
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)

    def processor_time(self) -> float:
        """Seconds of processor time of its processes so far."""
        total = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / _TICKS


def serve(kind: str, model: str, threads: int) -> None:
    """A server: prints its port and its processes, and serves until it is told to end."""
    from moebius.engine.config import EngineConfig
    from moebius.engine.supervisor import EngineProcess
    from moebius.engine.wire import Launch
    from moebius.front.choices import draw_prefix_key
    from moebius.models.hub import resolve_model
    from moebius.server.listen import reserve

    directory = resolve_model(model)
    config = EngineConfig(threads=threads, max_num_seqs=32, kv_cache_memory_bytes=2**29)
    key = draw_prefix_key()
    with reserve("127.0.0.1", 0) as sockets:
        if kind == TOGETHER:
            from moebius.engine.in_process import InProcessClient
            from moebius.engine.load import load_engine

            engine = load_engine(directory, config, prefix_key=key)
            client = InProcessClient(engine, step_deadline=60.0)
            run(directory, client, key, sockets, [os.getpid()])
            return
        with EngineProcess() as process:
            client = process.launch(Launch(str(directory), config, key, frozenset(), "warning"))
            run(directory, client, key, sockets, [os.getpid(), process.pid])


def run(directory: Path, client: Any, key: bytes, sockets: Any, pids: list[int]) -> None:
    import gc

    from moebius.server.app import create_app
    from moebius.server.run import run_server
    from moebius.server.settings import ServerSettings
    from moebius.text import GenerationDefaults, Tokenizer

    app = create_app(
        client,
        Tokenizer.load(directory),
        GenerationDefaults(),
        ServerSettings(("m",)),
        prefix_key=key,
    )
    gc.freeze()
    told = json.dumps({"port": sockets[0].getsockname()[1], "pids": pids})
    run_server(app, sockets, on_start=lambda: print(told, flush=True))


@contextmanager
def servers(model: str, threads: int) -> Iterator[dict[str, Server]]:
    programs = {}
    try:
        for kind in KINDS:
            command = [sys.executable, __file__, "--serve", kind, model, "--threads", str(threads)]
            programs[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        found = {}
        for kind, program in programs.items():
            assert program.stdout is not None
            told = json.loads(program.stdout.readline())
            found[kind] = Server(told["pids"], f"http://127.0.0.1:{told['port']}")
        yield found
    finally:
        for program in programs.values():
            program.terminate()
            program.wait()


def samples(draw: int, count: int, sizes: tuple[int, int], output: int) -> list[Any]:
    """Prompts of random tokens, so many as no cache knows them from an earlier draw."""
    from moebius.bench.workload import Sample

    drawn = random.Random(f"{draw} {count}")
    made = []
    for _ in range(count):
        prompt = tuple(drawn.randrange(300, 1000) for _ in range(drawn.randint(*sizes)))
        made.append(Sample(prompt, len(prompt), output))
    return made


def ask(server: Server, asked: Sequence[Any], concurrency: int | None) -> list[Any]:
    from moebius.bench.client import Target, run_load

    body = {"temperature": 0, "ignore_eos": True}
    target = Target(server.url, "/v1/completions", "m", body=body)
    before = server.processor_time()
    own = time.process_time()
    records, seconds = asyncio.run(
        run_load(target, asked, [0.0] * len(asked), max_concurrency=concurrency)
    )
    server.client.append(time.process_time() - own)
    server.processor.append(server.processor_time() - before)
    server.seconds.append(seconds)
    failed = [record.error for record in records if record.error]
    if failed:
        raise RuntimeError(failed[0])
    return records


def batches(both: dict[str, Server], pairs: int) -> dict[str, Any]:
    """Many requests at once."""

    def one(kind: str, pair: int) -> float:
        ask(both[kind], samples(pair, _REQUESTS, (32, 128), _TOKENS), None)
        return both[kind].seconds[-1]

    found = in_turn(pairs, *(lambda pair, kind=kind: one(kind, pair) for kind in KINDS))
    result = compared(found)
    for kind, server in both.items():
        result[f"{kind} processor seconds"] = statistics.median(server.processor[1:])
        result[f"{kind} client processor seconds"] = statistics.median(server.client[1:])
        result[f"{kind} tokens per second"] = (
            _REQUESTS * _TOKENS / statistics.median(server.seconds[1:])
        )
    return result


def firsts(both: dict[str, Server], count: int) -> dict[str, Any]:
    """One request after the other; the first two of each server warm up."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    waits: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(count + 2):
        for kind in KINDS if number % 2 else reversed(KINDS):
            before = outside(both[kind])
            (record,) = ask(both[kind], samples(number, 1, (8, 8), 1), 1)
            found[kind].append(record.ttft * 1000)
            waits[kind].append((outside(both[kind]) - before) * 1000)
    result = {}
    for name, times in (("first token", found), ("outside", waits)):
        pairs = zip(times[TOGETHER][2:], times[APART][2:], strict=True)
        low, median, high = statistics.quantiles([apart - here for here, apart in pairs], n=4)
        result[name] = {
            "together ms": statistics.median(times[TOGETHER][2:]),
            "apart ms": statistics.median(times[APART][2:]),
            "difference ms": median,
            "spread ms": (high - low) / 2,
            "together lower quartile ms": statistics.quantiles(times[TOGETHER][2:], n=4)[0],
            "apart lower quartile ms": statistics.quantiles(times[APART][2:], n=4)[0],
        }
    return result


def outside(server: Server) -> float:
    """Seconds that all first tokens so far spent outside the engine's steps."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()

    def total(name: str) -> float:
        return float(
            re.findall(rf"^moebius_{name}_seconds_sum{{.*}} (\S+)$", text, re.MULTILINE)[0]
        )

    return total("time_to_first_token") - total("request_prefill_time")


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    with servers(model, args.threads) as both:
        result = firsts(both, args.firsts)
        for server in both.values():
            server.seconds.clear()
            server.processor.clear()
            server.client.clear()
        result["batch"] = batches(both, args.pairs)
    name = Path(model).name
    batch = result["batch"]
    for what in ("first token", "outside"):
        one = result[what]
        print(
            f"{name} {what}: {one['together ms']:.2f} and {one['apart ms']:.2f} ms, "
            f"{one['difference ms']:+.2f} +- {one['spread ms']:.2f} ms; lower quartiles "
            f"{one['together lower quartile ms']:.2f} and {one['apart lower quartile ms']:.2f} ms"
        )
    print(
        f"{name} batch: {batch['before']:.2f} and {batch['after']:.2f} s, ratio "
        f"{batch['ratio']:.3f} +- {batch['spread']:.3f}; processor seconds "
        + ", ".join(
            f"{kind} {batch[f'{kind} processor seconds']:.2f} (client "
            f"{batch[f'{kind} client processor seconds']:.2f})"
            for kind in KINDS
        ),
        flush=True,
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--firsts", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.models[0], args.threads)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the servers end, too
    results = {Path(model).name: measure(model, args) for model in args.models}
    save(args.json, {"processor": processor(), "threads": args.threads, "models": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
