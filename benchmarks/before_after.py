"""Two checkouts of Moebius in turn: is one slower than the other?

    .venv/bin/python benchmarks/before_after.py BEFORE [AFTER] [--models MODEL ...]
        [--workloads w1 w2 w4 start] [--pairs 7] [--threads 2] [--json FILE]

BEFORE and AFTER are folders with sources and built kernels (`src/moebius/_cpu*.so`); AFTER is this
checkout by default. Both keep the model loaded, in a process each, and serve the same requests one
after the other, so that they meet the same moments of a shared machine. The workloads are those of
benchmarks/peers: one stream (w1), 64 requests of which 32 run (w2), one prompt of 2,048 tokens
(w4). `start` is the time from starting a process to its first token. Memory stands beside them.

A figure is the ratio after / before of seconds, or of bytes: above 1 is worse. Which checkout goes
first changes from pair to pair. A ratio counts as worse where its median exceeds 1.02, and 1 by
more than the spread of the pairs, half the distance between their quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from workloads import workload  # noqa: E402

from records import processor, save  # noqa: E402

TOLERANCE = 0.02
START = "start"

Answers = list[list[dict[str, Any]]]


class Worker:
    """A checkout's engine in a process of its own."""

    def __init__(self, checkout: Path, model: str, threads: int) -> None:
        program = [sys.executable, __file__, str(checkout), "--serve", model]
        environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
        self._process = subprocess.Popen(
            [*program, "--threads", str(threads)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, name: str, draw: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(name, draw, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(model: str, threads: int) -> None:
    """A worker: a line of standard input names a workload and its draw; answers are JSON lines."""
    from moebius import LLM, SamplingParams

    llm = LLM(model, threads=threads, max_num_seqs=32, kv_cache_memory_bytes=2**30)
    print(json.dumps({"memory": resident()}), flush=True)
    for line in sys.stdin:
        name, draw = line.split()
        requests = workload(name, llm.client.info.limits.vocab_size, int(draw)).requests
        params = [
            SamplingParams(temperature=0, max_tokens=one.output, ignore_eos=True)
            for one in requests
        ]
        prompts = [one.prompt for one in requests]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, progress=False)
        wall = time.perf_counter() - start
        ids = zlib.crc32(str([output.outputs[0].token_ids for output in outputs]).encode())
        answer = {"wall": wall, "memory": resident(), "answers": ids}
        print(json.dumps(answer), flush=True)


def resident() -> int:
    """Memory that this process has of its own now, in bytes: pages of files apart."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not tell RssAnon")


def cold_start(checkout: Path, model: str, threads: int) -> float:
    """Seconds from starting `moebius generate` to its end, one token later."""
    command = [sys.executable, "-m", "moebius", "generate", "--model", model, "def main("]
    command += ["--max-tokens", "1", "--threads", str(threads), "--max-model-len", "256"]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def in_turn(pairs: int, *sides: Callable[[int], float]) -> list[list[float]]:
    """What each side measures in each pair, the first pair left out as a warm-up."""
    found = []
    for pair in range(pairs + 1):
        values = [0.0, 0.0]
        for side in (0, 1) if pair % 2 else (1, 0):
            values[side] = sides[side](pair)
        found.append(values)
    return found[1:]


def compared(values: list[list[float]]) -> dict[str, Any]:
    ratios = sorted(after / before for before, after in values)
    low, _, high = statistics.quantiles(ratios, n=4)
    median = statistics.median(ratios)
    spread = (high - low) / 2
    return {
        "before": statistics.median(before for before, _ in values),
        "after": statistics.median(after for _, after in values),
        "ratio": median,
        "spread": spread,
        "worse": median > 1 + max(TOLERANCE, spread),
        "pairs": ratios,
    }


@contextmanager
def workers(checkouts: list[Path], model: str, threads: int) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        made = []
        for checkout in checkouts:
            made.append(Worker(checkout, model, threads))
            stack.callback(made[-1].close)
        yield made


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    checkouts = [args.before, args.after]
    results = {}
    with workers(checkouts, model, args.threads) as made:
        for name in [name for name in args.workloads if name != START]:
            answers: Answers = [[], []]

            def timed(side: int, pair: int, name: str = name, answers: Answers = answers) -> float:
                answers[side].append(made[side].run(name, pair))
                seconds: float = answers[side][-1]["wall"]
                return seconds

            walls = in_turn(args.pairs, lambda pair: timed(0, pair), lambda pair: timed(1, pair))
            results[name] = compared(walls)
            results[name]["memory"] = [side[-1]["memory"] for side in answers]
            drawn = [[answer["answers"] for answer in side] for side in answers]
            results[name]["same_answers"] = drawn[0] == drawn[1]
            print(f"{Path(model).name} {name}: {shown(results[name])}", flush=True)
    if START not in args.workloads:
        return results
    starts = in_turn(
        args.pairs,
        *(lambda _, one=one: cold_start(one, model, args.threads) for one in checkouts),
    )
    results[START] = compared(starts)
    print(f"{Path(model).name} {START}: {shown(results[START])}", flush=True)
    return results


def shown(result: dict[str, Any]) -> str:
    memory = [f"{nbytes / 2**20:.0f}" for nbytes in result.get("memory", ())]
    text = (
        f"{result['before']:.3f} and {result['after']:.3f} s, ratio {result['ratio']:.3f} "
        f"+- {result['spread']:.3f}{', worse' if result['worse'] else ''}"
    )
    if "same_answers" in result and not result["same_answers"]:
        text += ", other answers"
    return text + (f"; own memory {' and '.join(memory)} MiB" if memory else "")


def revision(checkout: Path) -> str:
    """The commit of a checkout; its name where git knows none."""
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    told = subprocess.run(asked, capture_output=True, text=True)
    return told.stdout.strip() or checkout.name


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--models", nargs="+", default=["bundled"])
    parser.add_argument("--workloads", nargs="+", default=["w1", "w2", "w4", START])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads)
        return 0
    results = {Path(model).name: measure(args, model) for model in args.models}
    record = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "before": revision(args.before),
        "after": revision(args.after),
        "threads": args.threads,
        "models": results,
    }
    save(args.json, record)
    return int(any(one["worse"] for model in results.values() for one in model.values()))


if __name__ == "__main__":
    sys.exit(main())
