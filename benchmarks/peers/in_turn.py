"""What share of the floor our engine reaches, when the machine's ceilings are measured in turn with
its steps.

    PEERS=FOLDER python in_turn.py [--models m1,m2] [--workloads w1,w2,w4] [--reps 3] [--json FILE]

On a machine whose memory and cores others share, run.py's floor (the best pass of the whole run) is
that of its best moment, and the engine's time is that of all its moments. Here a pass of
ceilings.py follows steps all along, so that both see the same moments: the floor is that of the
passes' medians, the share that floor over the steps' time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ceilings import Asked
from common import peers_folder
from drive_moebius import engine_config
from report import CEILINGS
from roofline import floor
from sizes import SIZES
from workloads import Workload, workload

from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.files import json_record, write_file
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request

# Seconds of steps between two passes. A pass takes some 0.07 s.
BETWEEN = 0.3


@contextmanager
def ceilings(file: Path, threads: int) -> Iterator[Asked]:
    program = Path(__file__).with_name("ceilings.py")
    asked = Asked(sys.executable, program, "--threads", threads, "--file", file, "--ask")
    asked()
    try:
        yield asked
    finally:
        asked.close()


def steps(engine: Engine, work: Workload, ask: Asked) -> tuple[list[float], list[dict[str, float]]]:
    """Every step's seconds, and the ceilings found between them."""
    for number, wanted in enumerate(work.requests):
        params = SamplingParams(temperature=0, max_tokens=wanted.output, ignore_eos=True)
        name = f"{work.name} {number}"
        engine.add(
            Request(
                EngineRequest.create(
                    name, wanted.prompt, params, engine.info.limits, arrival=engine.clock(), seed=0
                )
            )
        )
    seconds = []
    found = [ask()]
    since = 0.0
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
        since += seconds[-1]
        if since > BETWEEN or not engine.has_work:
            found.append(ask())
            since = 0.0
    return seconds, found


def share(
    model: str, work: Workload, seconds: list[float], found: list[dict[str, float]]
) -> dict[str, float]:
    """W1's first step, the prefill, is left out on both sides: it is compared by its decoding."""
    result = {key: statistics.median(one[key] for one in found) for key in CEILINGS}
    skip = 1 if work.name == "w1" else 0
    result |= {"passes": len(found), "seconds": sum(seconds[skip:])}
    for kind in ("anonymous", "mapped"):
        speeds = {"bandwidth": result[f"{kind}_gbs"], "matrix": result["matrix_gflops"]}
        ideal = floor(SIZES[model], work, **speeds, prefix_cache=False)
        result[f"share_{kind}"] = (ideal.seconds - skip * ideal.first_seconds) / result["seconds"]
    return result


def measure(model: str, names: list[str], reps: int, threads: int) -> Iterator[dict[str, Any]]:
    directory = peers_folder() / "models" / model
    config = engine_config(32, threads, prefix_cache=False)
    weights = max(directory.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with closing(load_engine(directory, config)) as engine, ceilings(weights, threads) as ask:
        for name in names:
            for rep in range(reps + 1):  # draw 0 warms up
                work = workload(name, SIZES[model].vocab, rep)
                seconds, found = steps(engine, work, ask)
                if rep:
                    yield {
                        "model": model,
                        "workload": name,
                        "draw": rep,
                        **share(model, work, seconds, found),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="m1,m2", type=lambda text: text.split(","))
    parser.add_argument("--workloads", default="w1,w2,w4", type=lambda text: text.split(","))
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for row in measure(model, given.workloads, given.reps, given.threads):
            rows.append(row)
            print(
                "{model} {workload}: {seconds:.2f} s; {mapped_gbs:.1f} GB/s mapped, "
                "{anonymous_gbs:.1f} anonymous, {matrix_gflops:.0f} GFLOP/s; {share_mapped:.0%}, "
                "{share_anonymous:.0%} of the floor".format(**row),
                flush=True,
            )
    if given.json:
        write_file(
            given.json,
            json.dumps({"threads": given.threads, "rows": rows}, indent=1) + "\n",
            ours=json_record,
        )


if __name__ == "__main__":
    main()
