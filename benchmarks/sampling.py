"""What one step's sampling takes, for batches in which one request asks for more than the others.

    .venv/bin/python benchmarks/sampling.py [--vocab 150000] [--threads 2] [--repeats 15] [--json
    FILE]

The batches take turns, so that a busy machine slows all of them alike; printed are medians, in
milliseconds.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from moebius.engine.sampler import sample
from moebius.ops.cpu import CpuOps
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.schedule.request import Request
from records import save

CONTEXT = 1000
OUTPUT = 200
# How many greedy rows there are, and what the other row asks for.
BATCHES: dict[str, tuple[int, dict[str, Any] | None]] = {
    "32 greedy": (32, None),
    "31 greedy, one top_k 100,000": (31, {"top_k": 100_000}),
    "31 greedy, one top_p 0.95": (31, {"top_p": 0.95}),
    "31 greedy, one whole vocabulary": (31, {}),
    "31 greedy, one with 20 log-probabilities": (31, {"temperature": 0, "logprobs": 20}),
    "64 greedy": (64, None),
    "63 greedy, one penalised": (
        63,
        {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    ),
    "64 penalised": (0, {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.5}),
    "64 top_p 0.95": (0, {"top_p": 0.95}),
}


def requests(greedy: int, other: dict[str, Any] | None, vocab: int) -> list[Request]:
    seeded = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab, (CONTEXT,), generator=seeded).tolist()
    wishes: list[dict[str, Any]] = [{"temperature": 0}] * greedy
    if other is not None:
        wishes += [other] * (64 if greedy == 0 else 1)
    limits = ServingLimits(vocab, 10 * CONTEXT)
    found = []
    for i, wish in enumerate(wishes):
        asked = EngineRequest.create(
            str(i),
            tokens[:-OUTPUT],
            SamplingParams(max_tokens=CONTEXT, **wish),
            limits,
            arrival=0.0,
            seed=i,
            output_ids=tokens[-OUTPUT:],
        )
        found.append(Request(asked))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the engine does beside the kernels' own threads
    ops = CpuOps(args.threads)
    logits = 3 * torch.randn(64, args.vocab, generator=torch.Generator().manual_seed(0))
    batches = {
        name: requests(greedy, other, args.vocab) for name, (greedy, other) in BATCHES.items()
    }
    found: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(args.repeats + 1):  # the first warms up
        for name, batch in batches.items():
            start = time.perf_counter()
            sample(logits[: len(batch)], batch, ops)
            found[name].append(1000 * (time.perf_counter() - start))
    medians = {name: round(statistics.median(times[1:]), 2) for name, times in found.items()}
    for name, milliseconds in medians.items():
        print(f"{name:42} {milliseconds:8.2f} ms")
    record = {
        "kernels": ops.name,
        "vocab": args.vocab,
        "threads": args.threads,
        "milliseconds": medians,
    }
    save(args.json, record)


if __name__ == "__main__":
    main()
