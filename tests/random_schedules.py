"""Random schedules of the same requests, for promise P1: whatever happens around a request, its
bits are the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from functools import cache

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from moebius.engine.client import EngineInfo, StepOutput, TokenLogprob
from moebius.engine.config import EngineConfig
from moebius.engine.constraints import Constraints
from moebius.engine.engine import Engine
from moebius.engine.kv_cache import KVCache, lay_out
from moebius.engine.runner import Runner
from moebius.engine.steps_ahead import NO_STEPS_AHEAD, DeviceStepsAhead
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.key_offsets import key_offsets
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.linear import Weighted, WeightList
from moebius.nn.rope import RopeConfig
from moebius.ops import LayerCache, Matrix, Ops
from moebius.ops.config import RouterConfig
from moebius.request.constraint import Constraint, Grammar, ReasoningBudget
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.request.structured import StructuredOutput
from moebius.schedule.blocks import BlockPool
from moebius.schedule.drafts import DraftingScheduler, Guesser, Lookup, StepCosts
from moebius.schedule.groups import CacheGroups, GroupSpec, StateSpec
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan
from moebius.schedule.states import StatePool
from moebius.text import Tokenizer
from moebius.text.grammar import checked_grammar
from moebius.text.replies import HeldTool
from ops.formats.blocks import random_matrix

MAX_MODEL_LEN = 256


@cache
def byte_tokens() -> Tokenizer:
    """Ids 0 to 255 stand for a byte each, in the order of GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({each: i for i, each in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def _grammar(**body: object) -> str:
    return json.dumps({"grammars": [body]})


OBJECT = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "array", "items": {"type": "boolean"}, "minItems": 20},
    },
    "required": ["a", "b"],
}


def required_call(tokenizer: Tokenizer) -> Constraint:
    """A reply that must call a tool with an OBJECT, in Hermes' format."""
    replies = tokenizer.replies.with_tools("hermes")
    grammar, whole = replies.held([HeldTool("f", OBJECT)], must=True, several=True)
    calls = StructuredOutput(calls=grammar, whole=whole, param="tools")
    return Constraint(Grammar(checked_grammar(calls).text()))


# What every few of the wishes are held to. Grammars are longer than any answer, so that what runs
# beside what is the same as without them.
CONSTRAINTS: tuple[Constraint | None, ...] = (
    None,
    None,
    Constraint(Grammar(_grammar(json_schema=OBJECT))),
    None,
    None,
    Constraint(
        Grammar(_grammar(lark_grammar="start: /(ab|cd){30};/"), after=((70, 71),)),
        budget=ReasoningBudget(4, start=(), end=(70, 71), begun=True),
    ),
    Constraint(Grammar(_grammar(lark_grammar="start: /[a-z]{2,5}(,[0-9]{1,3}){30}/"))),
    Constraint(bad_words=(*((token,) for token in range(0, 200, 2)), (1, 3))),
    required_call(byte_tokens()),
)
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
    "gpt-oss": ("gpt_oss", {"sliding_window": 16, "num_hidden_layers": 3}),
    # Which keep less than those that see all, so that a block has room for more of them.
    "gemma4": (
        "gemma4_text",
        {"sliding_window": 16, "num_hidden_layers": 5, "layer_types": None, "head_dim": 6},
    ),
}
# Three kinds of layers, in unequal numbers: the whole past, a short window, a longer one.
_FULL = GQA(4, 2, 16, value_dim=8, rope=RopeConfig(), sinks=True, softcap=5.0)
_NEAR = replace(_FULL, window=7)
_FAR = replace(_FULL, window=40, rope=None)
_ROUTED = FeedForwardConfig(16, RouterConfig(4, 2))
MIXED = ModelConfig(
    model_type="mixed",
    hidden_size=32,
    vocab_size=300,
    context=256,
    layers=tuple(
        LayerSpec(mixer, _ROUTED, "sandwich") for mixer in (_NEAR, _FULL, _NEAR, _FAR, _NEAR)
    ),
)


def mixed(ops: Ops, dtype: torch.dtype) -> Decoder:
    """MIXED with random weights, the same ones for all `ops`."""
    decoder = Decoder(MIXED, ops, dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.3 * drawn + float(parameter.ndim == 1))
    return decoder.requires_grad_(False)


def in_blocks(name: str, ops: Ops, dtype: torch.dtype) -> Decoder:
    """A layer of experts whose matrices, and the vocabulary's, are random blocks of one of GGUF's
    types: the same ones for all `ops`."""
    config = ModelConfig(
        model_type="in-blocks",
        hidden_size=256,
        vocab_size=300,
        context=MAX_MODEL_LEN,
        layers=(
            LayerSpec(GQA(4, 2, 64, rope=RopeConfig()), FeedForwardConfig(256, _ROUTED.router)),
        ),
    )
    decoder = Decoder(config, ops, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in decoder.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                parameter.data.copy_(
                    torch.randn(parameter.shape) * 0.3 + float(parameter.ndim == 1)
                )
                if isinstance(module, Weighted):
                    module.hold(_drawn(name, *parameter.shape))
                elif isinstance(module, WeightList):
                    module.hold(int(leaf), _drawn(name, *parameter.shape))
    return decoder.requires_grad_(False)


def _drawn(name: str, rows: int, columns: int) -> Matrix:
    """Blocks whose numbers are about as large as a trained model's."""
    spread = 0.01
    size = float(random_matrix(name, 8, columns, spread).widened(torch.float32).std())
    return random_matrix(name, rows, columns, spread * 0.1 / size)


@dataclass(frozen=True)
class Wish:
    """A request that can be made again and again."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Schedule:
    """What may change around a request without changing it.

    num_blocks counts those of all groups of layers; arrivals[i] is the step in which wish i comes.
    kv_dtype is the one thing that answers do depend on: what keys and values are held in; None: as
    they are computed.

    Of a model with states there are slots for all that run, and a few for snapshots, which are
    taken every few blocks.

    guesser: what makes drafts, where the model's requests can have any; None: there are none.

    ahead: the next step begins while this one's tokens are still to be read.
    """

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    arrivals: tuple[int, ...]
    rounds: int
    kv_dtype: torch.dtype | None = None
    guesser: Callable[[], Guesser] | None = None
    ahead: bool = False

    @property
    def states(self) -> StateSpec:
        slots = self.max_num_seqs + self.num_blocks % 7
        return StateSpec(slots, interval=1 + self.num_blocks % 3, apart=1 + self.num_blocks % 2)


# A request's tokens and log-probabilities; floats compare by their bits.
Answer = tuple[list[int], list[TokenLogprob], list[TokenLogprob]]


@dataclass(frozen=True)
class Seen:
    """Every round's answers, and what happened to get them."""

    rounds: list[dict[str, Answer]]
    preemptions: int
    prefix_hits: int
    drafts: int = 0
    right_drafts: int = 0


def wishes(count: int, vocab_size: int, rng: random.Random, *, free: bool = False) -> list[Wish]:
    """Prompts of 1 to 150 tokens, some with a common beginning; greedy and drawn; some score their
    prompt; some are held to a grammar, behind reasoning or not, or kept from some words.

    free: none is, as what grammars do is no matter of the model, and half of a short schedule."""
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
                None if free else CONSTRAINTS[i % len(CONSTRAINTS)],
            )
        )
    return made


def groups_of(decoder: Decoder, states: StateSpec | None = None) -> CacheGroups:
    """The block tables that a sequence of this model has; and states, if it has any."""
    specs = decoder.config.caches(decoder.dtype)
    windows = lay_out(specs).windows
    recurs = any(spec.state for spec in specs)
    return CacheGroups(tuple(map(GroupSpec, windows)), states if recurs else None)


def random_schedule(
    count: int, rng: random.Random, groups: CacheGroups | None = None, *, least: int = 1
) -> Schedule:
    """Batches of 1 to 64, chunks of `least` to 2,048 tokens, blocks of 8 to 64, and caches too small
    for all at once: down to what one sequence holds at most, which is little where there are
    windows."""
    block_size = rng.choice((8, 12, 16, 24, 32, 64))
    budget = rng.choice([one for one in (1, 2, 5, 17, 64, 300, 2048) if one >= least])
    one = (groups or CacheGroups()).most_blocks(MAX_MODEL_LEN, budget, block_size)
    return Schedule(
        block_size=block_size,
        num_blocks=one + rng.choice((0, 2, one, 20 * one)),
        max_num_seqs=min(budget, rng.randint(1, 64)),
        max_num_batched_tokens=budget,
        prefix_caching=rng.random() < 0.7,
        arrivals=tuple(rng.choice((0, 0, rng.randint(0, 40))) for _ in range(count)),
        rounds=rng.choice((1, 2)),
        guesser=rng.choice((None, Lookup, Wild)),
    )


class Wild:
    """Guesses what the request has said anywhere, right or wrong."""

    share = 0.9
    rest = 0

    def guess(self, request: Request, most: int) -> list[int]:
        rng = random.Random(request.num_tokens)
        known = request.tokens(0, request.num_tokens)
        return [rng.choice(known) for _ in range(rng.randint(0, most))]


FREE = StepCosts([(1, 1.0), (2048, 1.0)])
"""Drafts cost nothing, so that all are made that there is room for."""


class PoisonedPool(BlockPool):
    """A pool whose blocks are full of NaN when they are taken: what is read before it was written
    shows, and what is read of a block that was given back and is another sequence's now."""

    cache: KVCache

    def _take(self) -> int:
        block = super()._take()
        placed = zip(self.cache.layers, self.cache.layout.places, strict=True)
        rows: dict[int, LayerCache] = {id(layer): layer for layer, at in placed if at is not None}
        for layer in rows.values():
            for part in self.cache._ops.block_memory(layer, block):
                part.view(-1).view(torch.uint8).fill_(255)
        return block


class PoisonedStates(StatePool):
    """The same of slots for states."""

    cache: KVCache

    def _take(self) -> int:
        slot = super()._take()
        for plane in (plane for planes in self.cache.states for plane in planes.values()):
            plane[slot] = torch.nan
        return slot


def build(decoder: Decoder, schedule: Schedule) -> Engine:
    """An engine around a decoder that is already loaded."""
    runner, scheduler, info = parts(decoder, schedule)
    if schedule.guesser is not None and scheduler.pool.states is None:
        config = scheduler.config
        scheduler = DraftingScheduler(config, scheduler.pool, FREE, 2048, schedule.guesser)
    ahead = (
        DeviceStepsAhead(runner, scheduler, info.block_size) if schedule.ahead else NO_STEPS_AHEAD
    )
    return Engine(runner, scheduler, info, constraints=constraints(info), ahead=ahead)


def constraints(info: EngineInfo) -> Constraints:
    """What such an engine holds tokens to: grammars over one token a byte."""
    return Patient(byte_tokens, info.limits.vocab_size, info.eos_ids)


class Patient(Constraints):
    """Waits for every grammar and every mask, so that a schedule does not depend on the clock."""

    def fill(self, plan: StepPlan, requests: Mapping[str, Request]) -> None:
        wait([each.grammar for each in self._followers.values() if each.grammar is not None])
        super().fill(plan, requests)
        wait(self._finding)


def parts(decoder: Decoder, schedule: Schedule) -> tuple[Runner, Scheduler, EngineInfo]:
    """What such an engine is made of, on the decoder's device."""
    config = decoder.config
    device = next(decoder.parameters()).device
    groups = groups_of(decoder, schedule.states)
    pool = PoisonedPool(
        schedule.num_blocks,
        schedule.block_size,
        groups=groups,
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
        config.caches(decoder.dtype, schedule.kv_dtype),
        decoder.ops,
        num_blocks=schedule.num_blocks,
        block_size=schedule.block_size,
        device=device,
        num_states=0 if groups.states is None else groups.states.num_slots,
        key_offsets=key_offsets(decoder) if schedule.kv_dtype == torch.int8 else (),
    )
    pool.cache = cache
    if groups.states is not None:
        pool.states = PoisonedStates(groups.states, schedule.block_size)
        pool.states.cache = cache
    limits = ServingLimits(config.vocab_size, MAX_MODEL_LEN)
    start_ids = (config.start_id,) if config.encoder_layers else ()
    info = EngineInfo(
        limits,
        frozenset(),
        schedule.block_size,
        schedule.num_blocks,
        "fp",
        start_ids=start_ids,
    )
    return Runner(decoder, cache, device), Scheduler(settings, pool), info


def request_of(wish: Wish, engine: Engine) -> Request:
    """The wish as this engine takes it."""
    return Request(
        EngineRequest.create(
            wish.id,
            wish.prompt,
            wish.params,
            engine.info.limits,
            arrival=engine.clock(),
            seed=wish.seed,
            constraint=wish.constraint,
        ),
        engine.info.start_ids,
    )


def note(output: StepOutput, found: dict[str, Answer]) -> None:
    """Put what a step brought behind what its request has."""
    assert output.error is None, output.error
    tokens, logprobs, prompt_logprobs = found[output.request_id]
    tokens.extend(output.token_ids)
    logprobs.extend(output.logprobs)
    prompt_logprobs.extend(output.prompt_logprobs)


def answers(
    decoder: Decoder,
    asked: Sequence[Wish],
    schedule: Schedule,
    make_step: Callable[[Engine], list[StepOutput]] = Engine.step,
) -> Seen:
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
                engine.add(request_of(asked[coming.pop(0)[1]], engine))
            for output in make_step(engine):
                note(output, found)
            step += 1
        rounds.append(found)
    stats = engine.stats()
    return Seen(
        rounds, stats.preemptions, stats.prefix_hits, stats.draft_tokens, stats.accepted_tokens
    )


def each_alone(
    decoder: Decoder, asked: Sequence[Wish], kv_dtype: torch.dtype | None = None
) -> dict[str, Answer]:
    """Every request with nobody else there, one after the other, its prompt in one piece."""
    schedule = Schedule(16, 128, 1, 2048, False, (0,) * len(asked), 1, kv_dtype)
    return answers(decoder, asked, schedule).rounds[0]


def alone(decoder: Decoder, wish: Wish, kv_dtype: torch.dtype | None = None) -> Answer:
    return each_alone(decoder, [wish], kv_dtype)[wish.id]
