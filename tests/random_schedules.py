"""Random schedules of the same requests, for promise P1: whatever happens around a request, its
bits are the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moebius.engine.client import EngineInfo, TokenLogprob
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.kv_cache import KVCache, lay_out
from moebius.engine.runner import Runner
from moebius.models.decoder import Decoder
from moebius.schedule.blocks import BlockPool
from moebius.schedule.engine_request import EngineRequest
from moebius.schedule.groups import CacheGroups, GroupSpec
from moebius.schedule.params import SamplingParams, ServingLimits
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler

MAX_MODEL_LEN = 256
# Models with windows: model type and what differs from its plainest configuration. In the last two
# some layers see all, so that there are several block tables; of unequal numbers of layers.
WINDOWED: dict[str, tuple[str, dict[str, object]]] = {
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "mixtral-window": ("mixtral", {"sliding_window": 7}),
    "qwen2-upper-window": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 33,
            "max_window_layers": 2,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3-upper-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
}


@dataclass(frozen=True)
class Wish:
    """A request that can be made again and again."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int


@dataclass(frozen=True)
class Schedule:
    """What may change around a request without changing it. arrivals[i] is the step in which wish i
    comes."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    arrivals: tuple[int, ...]
    rounds: int


# A request's tokens and log-probabilities; floats compare by their bits.
Answer = tuple[list[int], list[TokenLogprob], list[TokenLogprob]]


@dataclass(frozen=True)
class Seen:
    """Every round's answers, and what happened to get them."""

    rounds: list[dict[str, Answer]]
    preemptions: int
    prefix_hits: int


def wishes(count: int, vocab_size: int, rng: random.Random) -> list[Wish]:
    """Prompts of 1 to 150 tokens, some with a common beginning; greedy and drawn; some score their
    prompt."""
    common = [rng.randrange(vocab_size) for _ in range(90)]
    made = []
    for i in range(count):
        own = [rng.randrange(vocab_size) for _ in range(rng.choice((1, 2, 9, 30, 60)))]
        params = SamplingParams(
            temperature=rng.choice((0.0, 0.7, 1.3)),
            top_p=rng.choice((1.0, 0.8)),
            top_k=rng.choice((0, 0, 5)),
            max_tokens=rng.choice((1, 3, 8, 40)),
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=rng.choice((None, None, 2)),
        )
        made.append(
            Wish(
                f"r{i}",
                tuple(common[: rng.choice((0, 0, 40, 90))] + own),
                params,
                rng.getrandbits(60),
            )
        )
    return made


def random_schedule(count: int, rng: random.Random) -> Schedule:
    """Batches of 1 to 64, chunks of 1 to 2,048 tokens, blocks of 8 to 64, and caches too small for
    all at once."""
    block_size = rng.choice((8, 12, 16, 24, 32, 64))
    budget = rng.choice((1, 2, 5, 17, 64, 300, 2048))
    one = -(-MAX_MODEL_LEN // block_size)
    return Schedule(
        block_size=block_size,
        num_blocks=one + rng.choice((0, 2, one, 20 * one)),
        max_num_seqs=min(budget, rng.randint(1, 64)),
        max_num_batched_tokens=budget,
        prefix_caching=rng.random() < 0.7,
        arrivals=tuple(rng.choice((0, 0, rng.randint(0, 40))) for _ in range(count)),
        rounds=rng.choice((1, 2)),
    )


def build(decoder: Decoder, schedule: Schedule) -> Engine:
    """An engine around a decoder that is already loaded."""
    config = decoder.config
    specs = config.caches(decoder.dtype)
    windows = lay_out(specs).windows
    num_blocks = schedule.num_blocks * len(windows)
    pool = BlockPool(
        num_blocks,
        schedule.block_size,
        groups=CacheGroups(tuple(map(GroupSpec, windows))),
        enable_prefix_caching=schedule.prefix_caching,
        key=bytes(16),
    )
    settings = EngineConfig(
        max_num_seqs=schedule.max_num_seqs,
        max_num_batched_tokens=schedule.max_num_batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        enable_chunked_prefill=True,
        max_queue_requests=1000,
        max_queue_tokens=10**6,
    )
    cache = KVCache(
        specs,
        decoder.ops,
        num_blocks=num_blocks,
        block_size=schedule.block_size,
        device=torch.device("cpu"),
    )
    limits = ServingLimits(config.vocab_size, MAX_MODEL_LEN)
    info = EngineInfo(limits, frozenset(), schedule.block_size, num_blocks, "fp")
    return Engine(Runner(decoder, cache, torch.device("cpu")), Scheduler(settings, pool), info)


def answers(decoder: Decoder, asked: Sequence[Wish], schedule: Schedule) -> Seen:
    """Serve the wishes `rounds` times over (the second time with a warm cache), and collect every
    round's answers."""
    engine = build(decoder, schedule)
    rounds = []
    for _ in range(schedule.rounds):
        found: dict[str, Answer] = {wish.id: ([], [], []) for wish in asked}
        coming = sorted(zip(schedule.arrivals, range(len(asked)), strict=True))
        step = 0
        while coming or engine.has_work:
            while coming and coming[0][0] <= step:
                wish = asked[coming.pop(0)[1]]
                limits = engine.info.limits
                engine.add(
                    Request(
                        EngineRequest.create(
                            wish.id,
                            wish.prompt,
                            wish.params,
                            limits,
                            arrival=engine.clock(),
                            seed=wish.seed,
                        )
                    )
                )
            for output in engine.step():
                assert output.error is None, output.error
                tokens, logprobs, prompt_logprobs = found[output.request_id]
                tokens.extend(output.token_ids)
                logprobs.extend(output.logprobs)
                prompt_logprobs.extend(output.prompt_logprobs)
            step += 1
        rounds.append(found)
    return Seen(rounds, engine.scheduler.preemptions, engine.scheduler.prefix_hits)


def alone(decoder: Decoder, wish: Wish) -> Answer:
    """The request with nobody else there, its prompt in one piece."""
    schedule = Schedule(16, 64, 1, 2048, False, (0,), 1)
    return answers(decoder, [wish], schedule).rounds[0][wish.id]
