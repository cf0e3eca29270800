"""Measures what steps and exchanges cost here, for `moebius plan MODEL --ranks N --costs FILE`.

    .venv/bin/python benchmarks/step_costs.py --model DIRECTORY [--threads 1] [--at-once 2]
    [--rounds 5] --json FILE

Steps: one process with all experts, or --at-once of them at the same time, as ranks of one host
compute; decoding of 1 to 32 sequences behind short and longer prompts, and chunks of prompts; the
fastest of the rounds of each. Exchanges: between two ranks of this host, as benchmarks/exchange.py
measures them, for rows of this model. What is predicted for more ranks, or for hosts of their own,
is these figures' extrapolation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import exchange as exchanges
from moebius.bench.costs import Costs, ExchangeCosts, ExpertSizes, Measured, StepCosts
from moebius.bench.predict import context
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.engine.place import place
from moebius.files import anyone, write_file
from moebius.models.hub import resolve_model
from moebius.models.store import open_checkpoint
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request

# Sequences that decode, and tokens of each one's prompt.
DECODING = ((1, 32), (1, 384), (2, 32), (4, 32), (8, 32), (8, 256), (16, 32), (32, 32))
CHUNKS = (16, 64, 128, 256, 512)
STEPS = 6
ITEMSIZE = torch.bfloat16.itemsize


class Steps:
    """One engine, and the steps that it makes."""

    def __init__(self, directory: Path, threads: int) -> None:
        config = EngineConfig(
            dtype="bfloat16",
            device="cpu",
            max_model_len=576,
            max_num_seqs=32,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=2**29,
            enable_prefix_caching=False,
            threads=threads,
        )
        self._engine: Engine = load_engine(directory, config)
        self._sizes = ExpertSizes.of(open_checkpoint(directory).config, ITEMSIZE)
        self._draw = random.Random(0)
        self._number = 0

    def close(self) -> None:
        self._engine.close()

    def decoding(self, sequences: int, prompt: int) -> list[Measured]:
        for _ in range(sequences):
            self._ask(prompt, STEPS)
        steps = self._all()
        return [one for one in steps if one.tokens == sequences][-STEPS + 1 :]

    def chunk(self, tokens: int) -> list[Measured]:
        self._ask(tokens, 1)
        return self._all()

    def _ask(self, prompt: int, output: int) -> None:
        engine = self._engine
        self._number += 1
        limits = engine.info.limits
        ids = [self._draw.randrange(limits.vocab_size) for _ in range(prompt)]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        asked = EngineRequest.create(
            str(self._number), ids, params, limits, arrival=engine.clock(), seed=0
        )
        engine.add(Request(asked))

    def _all(self) -> list[Measured]:
        """Every step until there is no work."""
        engine = self._engine
        plans = []
        plan = engine.scheduler.plan
        engine.scheduler.plan = lambda now: plans.append(plan(now)) or plans[-1]  # type: ignore[method-assign, func-returns-value]
        found = []
        try:
            while engine.has_work:
                begun = time.perf_counter()
                engine.step()
                taken = time.perf_counter() - begun
                made = plans[-1]
                experts = self._sizes.read(made.num_tokens)
                found.append(Measured(made.num_tokens, context(made), experts, taken))
        finally:
            engine.scheduler.plan = plan  # type: ignore[method-assign]
        return found


def measure_steps(directory: Path, threads: int, rounds: int) -> list[Measured]:
    """The fastest step of each kind."""
    with closing(Steps(directory, threads)) as steps:
        steps.decoding(1, 32)
        best: dict[tuple[str, int, int], Measured] = {}
        for _ in range(rounds):
            for sequences, prompt in DECODING:
                for one in steps.decoding(sequences, prompt):
                    _keep(best, ("decoding", sequences, prompt), one)
            for tokens in CHUNKS:
                for one in steps.chunk(tokens):
                    _keep(best, ("chunk", tokens, 0), one)
    return list(best.values())


def _keep(
    best: dict[tuple[str, int, int], Measured], kind: tuple[str, int, int], one: Measured
) -> None:
    if kind not in best or one.seconds < best[kind].seconds:
        best[kind] = one


def serve(pipe: Connection, directory: Path, args: argparse.Namespace, rank: int) -> None:
    place(rank, args.at_once, args.threads).take()
    pipe.send(measure_steps(directory, args.threads, args.rounds))


def steps_at_once(directory: Path, args: argparse.Namespace) -> list[Measured]:
    """Of as many processes at the same time; what the first one measured."""
    context_ = multiprocessing.get_context("spawn")
    pipes = []
    processes = []
    for rank in range(args.at_once):
        ours, theirs = context_.Pipe()
        process = context_.Process(target=serve, args=(theirs, directory, args, rank))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found: list[list[Measured]] = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return found[0]


def measure_exchanges(sizes: ExpertSizes, hidden: int) -> dict[str, ExchangeCosts]:
    found = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        groups = [
            exchanges.Group(kind, 2, Path(folder), stack, hidden=hidden, top_k=sizes.top_k)
            for kind in exchanges.KINDS
        ]
        rows: dict[str, list[exchanges.Result]] = {kind: [] for kind in exchanges.KINDS}
        for row in exchanges.results(groups, 5, 300):
            rows[row.kind].append(row)
        for kind, each in rows.items():
            found[kind] = ExchangeCosts.fit(
                [row.bytes_out for row in each], [row.fastest / 1e6 for row in each]
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    directory = resolve_model(args.model)
    model = open_checkpoint(directory).config
    sizes = ExpertSizes.of(model, ITEMSIZE)
    measured = steps_at_once(directory, args)
    costs = Costs(
        directory.name,
        machine_name(),
        args.threads,
        args.at_once,
        StepCosts.fit(measured, sizes),
        measure_exchanges(sizes, model.hidden_size),
    )
    write_file(args.json, costs.text() + "\n", ours=anyone)
    for one in measured:
        guess = costs.steps.seconds(
            one.tokens, one.context, one.experts, one.tokens * sizes.top_k * sizes.layers
        )
        print(
            f"{one.tokens:5} tokens, {one.context:7} pairs: {1000 * one.seconds:8.2f} ms, "
            f"fitted {1000 * guess:8.2f}"
        )
    print(asdict(costs))


def machine_name() -> str:
    """The processor's, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


if __name__ == "__main__":
    main()
