"""The papers' claims at small scale: train the runs, judge the rows by pass marks that were set
beforehand.

    python benchmarks/moe_claims.py --processes 2        trains what is missing, the first seed of
                                                         every run first
    python benchmarks/moe_claims.py --pair               row 2, on a quiet machine: two models
                                                         trained in turn
    python benchmarks/moe_claims.py --report             tables, verdicts and the chart, from what
                                                         there is

A run is a process with one thread; its figures are written to benchmarks/claims/runs when it ends,
and it is not run again while they are there. The corpus is the standard library of the Python that
runs this.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from claims.experiments import RUNS, SEEDS, STEPS, recipe_of, write_corpus
from moebius import machine
from moebius.files import json_record, make_directory, write_file

ROOT = Path(__file__).parent
RESULTS = ROOT / "claims" / "runs"


def one(name: str, seed: int, work: Path, steps: int, results: Path) -> None:
    """Make one run in this process and write its figures."""
    import torch

    from claims.measure import train, train_pair

    torch.set_flush_denormal(True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if name == "pair":
        result = train_pair(seed, work, steps)
    else:
        result = train(name, RUNS[name], seed, work, steps)
    make_directory(results)
    write_file(results / f"{name}-{seed}.json", json.dumps(result) + "\n", ours=json_record)


def make(
    names: list[str],
    seeds: list[int],
    work: Path,
    steps: int,
    processes: int,
    results: Path,
    threads: int,
) -> int:
    """Every run that is missing, in processes of their own; how many failed."""
    from moebius.train.data import prepare

    if not (work / "corpus" / "tables.jsonl").exists():
        write_corpus(work / "corpus")
    prepare(recipe_of("dense", RUNS["dense"], 1, work / "corpus"), work / "data")

    def start(job: tuple[int, str]) -> int:
        seed, name = job
        if (results / f"{name}-{seed}.json").exists():
            return 0
        call = [sys.executable, __file__, "--one", name, "--seed", str(seed), "--steps", str(steps)]
        call += ["--work", str(work), "--results", str(results)]
        print(f"{name}, seed {seed}", flush=True)
        return subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode

    with ThreadPoolExecutor(processes) as pool:
        return sum(code != 0 for code in pool.map(start, product(seeds, names)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", nargs="*", default=list(RUNS), choices=[*RUNS, "pair"], help="some of them only"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=ROOT.parent / "build" / "claims", help="corpus and tokens"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pair", action="store_true", help="row 2 alone, on all cores")
    parser.add_argument(
        "--report", action="store_true", help="train nothing; tables and docs/claims.png"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.seed, args.work, args.steps, args.results)
        return 0
    if args.report:
        from claims.chart import draw
        from claims.report import read, report

        results = read(args.results)
        print(report(results))
        draw(results, ROOT.parent / "docs" / "claims.png")
        return 0
    if args.pair:
        return make(["pair"], args.seeds, args.work, args.steps, 1, args.results, machine.threads())
    return make(args.runs, args.seeds, args.work, args.steps, args.processes, args.results, 1)


if __name__ == "__main__":
    sys.exit(main())
