"""Measures what steps and exchanges cost here, for `moebius plan MODEL --ranks N --costs FILE`.

    .venv/bin/python benchmarks/step_costs.py --model DIRECTORY [--threads 1] [--at-once 2]
    [--rounds 5] --json FILE

Steps: one process with all experts, or --at-once of them at the same time, as ranks of one host
compute; decoding of 1 to 32 sequences behind short and longer prompts, and chunks of prompts; the
median of each. Exchanges: among as many ranks of this host (2 at least), as
benchmarks/exchange.py measures them, for rows of this model. What is predicted for other numbers of
ranks, or for hosts of their own, is these figures' extrapolation.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import exchange as exchanges
from moebius.bench.costs import (
    Costs,
    ExchangeCosts,
    ExpertSizes,
    Measured,
    StepCosts,
    StepWork,
)
from moebius.bench.predict import context, samples
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
from moebius.schedule.scheduler import StepPlan
from records import processor
from workers import Workers

# Sequences that decode, and tokens of each one's prompt.
DECODING = ((1, 32), (1, 384), (2, 32), (4, 32), (8, 32), (8, 256), (16, 32), (32, 32))
CHUNKS = (16, 64, 128, 256, 512)
STEPS = 6
Kind = tuple[str, int, int]
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
        self._loads = self.loads()
        self._draw = random.Random(0)
        self._number = 0

    def close(self) -> None:
        self._engine.close()

    def decoding(self, sequences: int, prompt: int) -> list[Measured]:
        for _ in range(sequences):
            self._ask(prompt, STEPS)
        steps = self._all()
        return [one for one in steps if one.work.tokens == sequences][-STEPS + 1 :]

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
                found.append(Measured(self._work(plans[-1]), taken))
        finally:
            engine.scheduler.plan = plan  # type: ignore[method-assign]
        return found

    def loads(self) -> dict[int, list[int]]:
        """Pairs that each layer's experts got so far."""
        layers = self._engine.expert_loads().layers
        return {layer.layer: list(layer.total_pairs) for layer in layers}

    def _work(self, plan: StepPlan) -> StepWork:
        """What a step was that has just been made."""
        before = self._loads
        self._loads = self.loads()
        experts = 0
        for layer, pairs in self._loads.items():
            experts += sum(old != new for old, new in zip(before[layer], pairs, strict=True))
        pairs = plan.num_tokens * self._sizes.top_k * self._sizes.layers
        return StepWork(plan.num_tokens, context(plan), samples(plan), experts, pairs)

    def round(self) -> dict[Kind, list[Measured]]:
        """Steps of every kind."""
        found: dict[Kind, list[Measured]] = {}
        for sequences, prompt in DECODING:
            found["decoding", sequences, prompt] = self.decoding(sequences, prompt)
        for tokens in CHUNKS:
            found["chunk", tokens, 0] = self.chunk(tokens)
        return found


def serve(pipe: Connection, directory: Path, args: argparse.Namespace, rank: int) -> None:
    """In a process: a round whenever one is asked for."""
    place(rank, args.at_once, args.threads).take()
    with closing(Steps(directory, args.threads)) as steps:
        steps.round()
        pipe.send(None)
        while pipe.recv() is not None:
            pipe.send((steps.round(), steps.loads()))


def steps_at_once(
    directory: Path, args: argparse.Namespace
) -> tuple[list[Measured], dict[int, list[int]]]:
    """The median step of each kind, of processes that compute at the same time, and what the
    experts got at one of them."""
    found: dict[Kind, list[Measured]] = {}
    loads: dict[int, list[int]] = {}
    with ExitStack() as stack:
        arguments = [(directory, args, rank) for rank in range(args.at_once)]
        workers = Workers(stack, serve, arguments)
        workers.answers()
        for _ in range(args.rounds):
            workers.tell_all("a round")
            answers = workers.answers()
            loads = answers[0][1]
            for answer, _ in answers:
                for kind, steps in answer.items():
                    found.setdefault(kind, []).extend(steps)
    return [median(steps) for steps in found.values()], loads


def median(steps: list[Measured]) -> Measured:
    return sorted(steps, key=lambda one: one.seconds)[len(steps) // 2]


def measure_exchanges(sizes: ExpertSizes, hidden: int, ranks: int) -> dict[str, ExchangeCosts]:
    found = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        groups = [
            exchanges.Group(kind, ranks, Path(folder), stack, hidden=hidden, top_k=sizes.top_k)
            for kind in exchanges.KINDS
        ]
        rows: dict[str, list[exchanges.Result]] = {kind: [] for kind in exchanges.KINDS}
        for row in exchanges.results(groups, 5, 300):
            rows[row.kind].append(row)
        for kind, each in rows.items():
            found[kind] = ExchangeCosts.fit(
                ranks, [row.bytes_out for row in each], [row.fastest / 1e6 for row in each]
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
    measured, loads = steps_at_once(directory, args)
    costs = Costs(
        directory.name,
        sizes,
        loads,
        processor(),
        args.threads,
        args.at_once,
        StepCosts.fit(measured, sizes),
        measure_exchanges(sizes, model.hidden_size, max(2, args.at_once)),
    )
    write_file(args.json, costs.text() + "\n", ours=anyone)
    for one in measured:
        work = one.work
        print(
            f"{work.tokens:5} tokens, {work.context:7} pairs, {work.samples:3} drawn, "
            f"{work.experts:5} experts: {1000 * one.seconds:8.2f} ms, fitted "
            f"{1000 * costs.steps.seconds(work):8.2f}"
        )
    print(asdict(costs))


if __name__ == "__main__":
    main()
