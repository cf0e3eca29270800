"""What planning the next step while one runs could save.

    .venv/bin/python benchmarks/plan_ahead.py [--model bundled] [--sequences 1 32 256] [--steps 200]
        [--threads 2] [--json FILE]

The scheduler could plan a step before the last one's tokens are known: its counters advance when it
plans. This measures the most that this can bring. The kernels of a decoding step are called again
and again, and beside them stands all of Python that a step takes: planning, building the batch,
updating, making outputs, by an engine whose model computes nothing. In turn: the kernels alone, one
after the other, and Python on a second thread while the kernels run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.models.hub import resolve_model
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from records import save

PROMPT = 200
WARM_UP = 5


def decoding(directory: Path, sequences: int, steps: int, threads: int) -> Engine:
    """An engine whose sequences all decode, greedily, for so many steps more."""
    config = EngineConfig(
        max_model_len=PROMPT + 8 * steps + 64,
        max_num_seqs=sequences,
        max_num_batched_tokens=max(2048, sequences),
        kv_cache_memory_bytes=2**30,
        threads=threads,
        enable_prefix_caching=False,
    )
    engine = load_engine(directory, config)
    params = SamplingParams(temperature=0, max_tokens=8 * steps, ignore_eos=True)
    for i in range(sequences):
        draw = random.Random(i)
        prompt = [draw.randrange(engine.info.limits.vocab_size) for _ in range(PROMPT)]
        asked = EngineRequest.create(
            str(i), prompt, params, engine.info.limits, arrival=0.0, seed=0
        )
        engine.add(Request(asked))
    while any(one.num_computed_tokens < PROMPT for one in engine.scheduler.requests.values()):
        engine.step()
    return engine


def kernels_of(engine: Engine) -> Callable[[], object]:
    """Calls what a step of this engine computes: hidden states, logits, the most likely ids."""
    runner = engine.runner
    seen: list[Any] = []
    execute = runner.execute
    runner.execute = lambda inputs: seen.append(inputs) or execute(inputs)  # type: ignore
    engine.step()
    runner.execute = execute  # type: ignore[method-assign]
    inputs = seen[-1]
    rows = range(len(inputs.seq_lens_host))

    def compute() -> object:
        runner.execute(inputs)
        return runner.ops.argmax(runner.logits(rows))

    return compute


def python_of(engine: Engine) -> Callable[[], object]:
    """Makes a step of this engine without computing: every token is the same."""
    whole = engine.runner

    def argmax(logits: Sequence[int], rows: Sequence[int] | None = None) -> list[int]:
        return [7] * len(logits if rows is None else rows)

    hidden_TD = whole.execute(whole._zeros(1))
    engine.runner = SimpleNamespace(  # type: ignore[assignment]
        device=whole.device,
        execute=lambda inputs: hidden_TD,
        logits=list,
        ops=SimpleNamespace(argmax=argmax),
    )
    return engine.step


class Beside:
    """Calls a function on a thread of its own, when asked to."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._start = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._start.acquire()
            self._function()
            self._done.release()

    def start(self) -> None:
        self._start.release()

    def wait(self) -> None:
        self._done.acquire()


def measure(directory: Path, sequences: int, steps: int, threads: int) -> dict[str, float]:
    """Medians over the steps, in milliseconds."""
    computing = decoding(directory, sequences, steps, threads)
    planning = decoding(directory, sequences, steps, threads)
    with closing(computing), closing(planning):
        kernels = kernels_of(computing)
        python = python_of(planning)
        beside = Beside(python)

        def in_turn() -> None:
            kernels()
            python()

        def at_once() -> None:
            beside.start()
            kernels()
            beside.wait()

        ways = {"kernels": kernels, "in_turn": in_turn, "at_once": at_once}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(WARM_UP + steps):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                found[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(times[WARM_UP:]) for name, times in found.items()}
    return {"sequences": sequences, **medians, "ratio": medians["in_turn"] / medians["at_once"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    directory = resolve_model(args.model)
    found = [measure(directory, n, args.steps, args.threads) for n in args.sequences]
    for one in found:
        print(
            "{sequences} sequences: kernels {kernels:.2f} ms, with Python in turn {in_turn:.2f}, "
            "at once {at_once:.2f}: {ratio:.3f} times as fast".format(**one)
        )
    record = {"model": Path(args.model).name, "threads": args.threads, "steps": found}
    save(args.json, record)


if __name__ == "__main__":
    main()
