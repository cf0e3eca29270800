"""Random schedules of the same requests over ranks that share a model's experts.

All ranks are in this process, each on a thread of its own; they exchange through shared memory as
those of several processes do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import torch

from moebius.engine.client import StepOutput
from moebius.engine.rank import RankEngine
from moebius.engine.shared_head import SHARED_ROWS
from moebius.errors import PeerError
from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.placement import LayerPlacement, Placement
from moebius.moe.ranks import ExpertRank
from moebius.ops.cpu import CpuOps
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange
from random_schedules import Answer, Schedule, Seen, Wish, constraints, note, parts, request_of

MOST_TOKENS = 2048
"""Of a step, in any random schedule."""
SECONDS = 60.0
_EPOCHS = count(1)


def random_placement(decoder: Decoder, ranks: int, rng: random.Random) -> Placement:
    """Evenly in order, or anyhow: some experts at several ranks, some ranks with most of them."""
    experts = decoder.config.experts
    if rng.random() < 0.3:
        return Placement.linear(experts, ranks)
    layers = {}
    for layer, number in experts.items():
        held: list[set[int]] = [set() for _ in range(ranks)]
        for rank, e in enumerate(rng.sample(range(number), ranks)):
            held[rank].add(e)
        for e in range(number):
            held[rng.randrange(ranks)].add(e)
            if rng.random() < 0.2:
                held[rng.randrange(ranks)].add(e)
        layers[layer] = LayerPlacement(number, tuple(tuple(sorted(each)) for each in held))
    return Placement(layers)


def load_ranks(
    directory: Path,
    dtype: torch.dtype,
    placement: Placement,
    threads: int = 1,
    *,
    ordered: bool = False,
) -> list[Decoder]:
    """The decoder of each rank, with kernels of its own; ordered: see CpuOps."""
    checkpoint = open_checkpoint(directory)
    return [
        load_decoder(
            checkpoint,
            dtype,
            ops=CpuOps(threads, ordered=ordered),
            ranks=ExpertRank(placement, rank, MOST_TOKENS),
        )
        for rank in range(placement.ranks)
    ]


@contextmanager
def engines_of(
    decoders: Sequence[Decoder], schedules: Sequence[Schedule]
) -> Iterator[list[RankEngine]]:
    """An engine around each decoder; they are in one group."""
    config = decoders[0].config
    top_k = max(part.router.top_k for part in config.feed_forward if part.router is not None)
    size = len(decoders)
    spec = ExchangeSpec(
        size,
        MOST_TOKENS,
        config.hidden_size,
        top_k,
        decoders[0].dtype,
        gathered=SHARED_ROWS,
        width=config.vocab_size,
    )
    epoch = Epoch("test", next(_EPOCHS))
    with Segment(spec, epoch, cores=1) as segment, ExitStack() as stack:
        engines = []
        for rank, decoder in enumerate(decoders):
            assert decoder.ranks is not None
            runner, scheduler, info = parts(decoder, schedules[rank])
            made = RankEngine(
                runner, scheduler, info, use=decoder.ranks.join, constraints=constraints(info)
            )
            made.on_parted = _fail
            exchange = SharedMemoryExchange(segment.place, spec, rank, epoch, timeout=SECONDS)
            made.join(exchange, 0)
            stack.callback(made.close)
            engines.append(made)
        yield engines


def answers_of_ranks(
    decoders: Sequence[Decoder],
    asked: Sequence[Wish],
    homes: Sequence[int],
    schedules: Sequence[Schedule],
) -> Seen:
    """As `answers`, of wish i at rank homes[i]; each rank has a schedule of its own, but arrivals
    and rounds are those of the first."""
    first = schedules[0]
    rounds = []
    with (
        engines_of(decoders, schedules) as engines,
        ThreadPoolExecutor(len(engines)) as threads,
    ):
        number = 0
        for _ in range(first.rounds):
            found: dict[str, Answer] = {wish.id: ([], [], []) for wish in asked}
            coming = sorted(zip(first.arrivals, range(len(asked)), strict=True))
            step = 0
            while coming or any(engine.has_work for engine in engines):
                while coming and coming[0][0] <= step:
                    place = coming.pop(0)[1]
                    home = engines[homes[place]]
                    home.add(request_of(asked[place], home))
                    number += 1
                for engine in engines:
                    engine.hear(number)
                if engines[0].has_work:
                    for outputs in threads.map(_step, engines):
                        for output in outputs:
                            note(output, found)
                step += 1
            rounds.append(found)
        return Seen(
            rounds,
            sum(engine.scheduler.preemptions for engine in engines),
            sum(engine.scheduler.prefix_hits for engine in engines),
        )


def _step(engine: RankEngine) -> list[StepOutput]:
    try:
        return engine.step()
    except BaseException:
        engine.leave()  # nobody shall wait for it
        raise


def _fail(error: PeerError) -> None:
    raise AssertionError(f"a rank was lost: {error}")
