"""What scheduler and Python take of a decoding step: its time less that of the recorded kernels and
of the arg-max.

    .venv/bin/python benchmarks/step_overhead.py [--model bundled] [--sequences 32 256] [--steps 60]
    [--json FILE]

Every sequence has a prompt of 200 tokens and decodes greedily; the first steps are not timed.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.models.hub import resolve_model
from moebius.ops.cpu import RecordedProgram
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from records import save

PROMPT = 200
WARM_UP = 5


class Kernels:
    """Adds up the seconds spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def submit(engine: Engine, sequences: int, steps: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=steps + 2 * WARM_UP, ignore_eos=True)
    for i in range(sequences):
        draw = random.Random(i)
        prompt = [draw.randrange(engine.info.limits.vocab_size) for _ in range(PROMPT)]
        limits = engine.info.limits
        asked = EngineRequest.create(str(i), prompt, params, limits, arrival=0.0, seed=0)
        engine.add(Request(asked))


def measure(directory: Path, sequences: int, steps: int, threads: int) -> dict[str, float]:
    """Medians over the steps, in milliseconds."""
    config = EngineConfig(
        max_model_len=512,
        max_num_seqs=sequences,
        kv_cache_memory_bytes=2**30,
        threads=threads,
        enable_prefix_caching=False,
    )
    with closing(load_engine(directory, config)) as engine:
        submit(engine, sequences, steps)
        while any(
            request.num_computed_tokens < PROMPT for request in engine.scheduler.requests.values()
        ):
            engine.step()
        kernels = Kernels()
        kernels.wrap(RecordedProgram, "run")
        kernels.wrap(engine.runner.ops, "argmax")
        whole = []
        python = []
        for _ in range(WARM_UP + steps):
            kernels.seconds = 0.0
            start = time.perf_counter()
            engine.step()
            whole.append(1000 * (time.perf_counter() - start))
            python.append(whole[-1] - 1000 * kernels.seconds)
    step = statistics.median(whole[WARM_UP:])
    outside = statistics.median(python[WARM_UP:])
    return {"sequences": sequences, "step_ms": step, "python_ms": outside, "share": outside / step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = [
        measure(resolve_model(args.model), n, args.steps, args.threads) for n in args.sequences
    ]
    for one in found:
        print(
            "{sequences} sequences: {step_ms:.2f} ms a step, {python_ms:.2f} ms of it Python: "
            "{share:.1%}".format(**one)
        )
    save(args.json, {"model": Path(args.model).name, "steps": found})


if __name__ == "__main__":
    main()
