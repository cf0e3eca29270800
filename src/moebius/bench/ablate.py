"""One model, one request list, and the engine with each technique taken away in turn, on the same
KV cache memory."""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moebius.bench.metrics import Record, summarise
from moebius.bench.workload import Sample, arrival_times, mixed_samples, require_positive
from moebius.config import ModelConfig
from moebius.engine.client import StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import Prepared, load_engine, prepare
from moebius.engine.memory import human_bytes
from moebius.errors import require
from moebius.models import model_config
from moebius.models.checkpoint import open_checkpoint
from moebius.models.decoder import Decoder
from moebius.models.weights import save_checkpoint
from moebius.schedule.request import Request, SamplingParams

MAX_MODEL_LEN = 1024
FULL, CONTIGUOUS = "full engine", "contiguous reservation"


@dataclass(frozen=True, slots=True)
class Variant:
    """What is different from the full engine.

    config    fields of EngineConfig
    cached    keep keys and values from token to token; else each token is a new request of all
              tokens before it
    batching  join and leave at any step; else a batch starts when the whole previous one is
              finished
    twin      a dense model with random weights, with the size of all experts or of a token's
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = True
    batching: bool = True
    twin: str = ""


def variants(config: EngineConfig) -> dict[str, Variant]:
    """All comparisons by name, the full engine first.

    Contiguous reservation is one block a sequence, as long as the longest allowed; what cannot be
    split cannot be shared, so it has no prefix cache either. A static batch is treated kindly: it
    has no padding, and its tokens count when they are computed, not when the batch ends. Without
    chunked prefill a step must hold the longest prompt.
    """
    longest = config.max_model_len
    assert longest is not None
    budget = max(longest, config.max_num_batched_tokens)
    return {
        FULL: Variant(),
        "no KV cache": Variant({"enable_prefix_caching": False}, cached=False),
        CONTIGUOUS: Variant({"block_size": longest}),
        "static batching": Variant(batching=False),
        "no chunked prefill": Variant(
            {"enable_chunked_prefill": False, "max_num_batched_tokens": budget}
        ),
        "no prefix cache": Variant({"enable_prefix_caching": False}),
        "dense: equal total": Variant(twin="total"),
        "dense: equal active": Variant(twin="active"),
    }


def dense_width(model: ModelConfig, twin: str) -> int:
    """Width of a dense feed-forward with the parameters of all of a layer's experts ("total") or of
    those that one token uses ("active"); the mean where layers differ."""
    widths = []
    for part in model.feed_forward:
        experts = (
            1
            if part.router is None
            else part.router.num_experts
            if twin == "total"
            else part.router.top_k
        )
        widths.append(experts * part.width + part.shared_width)
    return round(sum(widths) / len(widths))


def write_twin(prepared: Prepared, twin: str, directory: Path) -> None:
    """A qwen3 checkpoint with the model's sizes, a dense feed-forward and random weights from a
    fixed seed."""
    model = prepared.checkpoint.config
    config_json = {
        "model_type": "qwen3",
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context,
        "intermediate_size": dense_width(model, twin),
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    decoder = Decoder(model_config(config_json), prepared.ops, prepared.dtype)
    decoder.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(decoder, config_json, directory)


class Replay:
    """Hands a request list to an engine on the engine's clock and notes what each step brings.

    fill   tokens in the cache over the slots held for them, over all steps; sharing brings it above
           1
    """

    def __init__(
        self, engine: Engine, samples: Sequence[Sample], due: Sequence[float], variant: Variant
    ) -> None:
        self._engine, self._samples, self._due, self._variant = engine, samples, due, variant
        self._start = engine.clock()
        self._waiting = deque(range(len(samples)))
        self.records = [Record(at, s.input_tokens) for at, s in zip(due, samples, strict=True)]
        self.tokens: list[list[int]] = [[] for _ in samples]
        self.most_running = self.most_blocks = 0
        self._filled = self._held = 0

    @property
    def now(self) -> float:
        return self._engine.clock() - self._start

    @property
    def fill(self) -> float:
        return self._filled / max(self._held, 1)

    def run(self) -> float:
        """Seconds until the last token."""
        while self._waiting or self._engine.has_work:
            self._admit()
            if not self._engine.has_work:
                time.sleep(max(self._due[self._waiting[0]] - self.now, 0))
                continue
            outputs = self._engine.step()
            now = self.now
            self._observe(outputs)
            for output in outputs:
                if output.error is not None:
                    raise output.error
                self._take(int(output.request_id.partition(".")[0]), output.token_ids, now)
        return self.now

    def _admit(self) -> None:
        """Hand over what has arrived; a static batch only to an idle engine, and no more than runs
        at once."""
        if not self._variant.batching and self._engine.has_work:
            return
        pool, seats = self._engine.scheduler.pool, self._engine.scheduler.config.max_num_seqs
        room = pool.num_blocks
        while self._waiting and self._due[self._waiting[0]] <= self.now:
            sample = self._samples[self._waiting[0]]
            tokens = sample.input_tokens + sample.output_tokens
            room -= pool.most_blocks(tokens, self._engine.scheduler.config.max_num_batched_tokens)
            seats -= 1
            if not self._variant.batching and (seats < 0 or room < 0):
                return
            self._submit(self._waiting.popleft())

    def _submit(self, index: int) -> None:
        sample, drawn = self._samples[index], self.tokens[index]
        params = SamplingParams(
            max_tokens=sample.output_tokens if self._variant.cached else 1,
            temperature=0,
            ignore_eos=True,
        )
        limits, arrival = self._engine.info.limits, self._start + self._due[index]
        prompt = (*sample.prompt, *drawn)
        self._engine.add(
            Request.create(f"{index}.{len(drawn)}", prompt, params, limits, arrival=arrival)
        )

    def _take(self, index: int, token_ids: Sequence[int], now: float) -> None:
        record = self.records[index]
        self.tokens[index] += token_ids
        record.arrivals += [now - record.start] * len(token_ids)
        record.output_tokens, record.e2el = len(self.tokens[index]), now - record.start
        if not self._variant.cached and record.output_tokens < self._samples[index].output_tokens:
            self._submit(index)

    def _observe(self, outputs: Sequence[StepOutput]) -> None:
        stats, requests = self._engine.stats(), self._engine.scheduler.requests
        ended = sum(output.finish_reason is not None for output in outputs)
        self.most_running = max(self.most_running, stats.running + ended)
        self.most_blocks = max(self.most_blocks, stats.used_blocks)
        self._held += stats.used_blocks * self._engine.info.block_size
        self._filled += sum(
            request.num_computed_tokens for request in requests.values() if request.tables
        )


Outcome = dict[str, Any]
"""One variant's run: the figures of `summarise`, and with them, memory in bytes,

name, tokens   the variant and its answers      weights   the model's       most_running   sequences
               at once
kv_held        in the blocks in use between two steps, at most
fill           tokens in the cache over the slots held for them
same           answers equal to the full engine's; None where the model is another
"""


def measure(
    name: str,
    variant: Variant,
    directory: Path,
    config: EngineConfig,
    samples: Sequence[Sample],
    due: Sequence[float],
) -> Outcome:
    """Load, warm up on other prompts, replay."""
    config = replace(config, **variant.config)
    prepared = prepare(directory, config)
    warm_up = [
        replace(sample, prompt=sample.prompt[::-1], output_tokens=2) for sample in samples[:4]
    ]
    with closing(load_engine(directory, config, prepared=prepared)) as engine:
        Replay(engine, warm_up, [0.0] * len(warm_up), variant).run()
        replay = Replay(engine, samples, due, variant)
        duration = replay.run()
    plan = prepared.plan
    return {
        "name": name,
        **summarise(replay.records, duration, percentiles=(50, 99)),
        "tokens": replay.tokens,
        "most_running": replay.most_running,
        "kv_held": replay.most_blocks * plan.cache.block,
        "fill": replay.fill,
        "weights": plan.weights.mapped + plan.weights.copied,
        "same": None if variant.twin else 0,
    }


def ablate(
    directory: Path,
    config: EngineConfig,
    *,
    num_prompts: int = 48,
    request_rate: float | None = None,
    names: Sequence[str] | None = None,
    repeat: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[float, EngineConfig, list[Outcome]]:
    """Run the full engine and the named variants (None: all) `repeat` times in turn and keep each
    one's median run: (request rate, configuration, outcomes).

    Without a request rate the requests arrive in a quarter of the time that the full engine takes
    for all of them at once, so that every variant is at its limit.
    """
    config, prepared = settle(directory, config, num_prompts)
    length, vocab_size = config.max_model_len or 0, prepared.checkpoint.config.vocab_size
    known = variants(config)
    unknown = sorted(set(names or ()) - set(known))
    require(
        not unknown, f"--variants: there is no {', '.join(unknown)}; there are {', '.join(known)}"
    )
    chosen = {
        name: variant
        for name, variant in known.items()
        if names is None or name in names or name == FULL
    }
    require(
        CONTIGUOUS not in chosen or length <= MAX_MODEL_LEN,
        f"--max-model-len is {length}; {CONTIGUOUS!r} needs at most {MAX_MODEL_LEN}, or leave it "
        "out of --variants",
    )
    require_positive(num_prompts=num_prompts, repeat=repeat)
    samples = mixed_samples(num_prompts, vocab_size=vocab_size, max_model_len=length, seed=seed)
    if request_rate is None:
        progress("finding the request rate")
        # The better of two: the first also warms the machine up, and a rate too low would hide all
        # differences.
        trials = [
            measure(FULL, known[FULL], directory, config, samples, [0.0] * num_prompts)
            for _ in range(2)
        ]
        request_rate = 4 * max(trial["request_throughput"] for trial in trials)
    due = arrival_times(num_prompts, request_rate, seed=seed)
    rounds: list[list[Outcome]] = []
    with tempfile.TemporaryDirectory(prefix="moebius-twins-") as twins:
        for twin in {variant.twin for variant in chosen.values()} - {""}:
            write_twin(prepared, twin, Path(twins, twin))
        for number in range(1, repeat + 1):
            rounds.append([])
            for name, variant in chosen.items():
                progress(f"round {number} of {repeat}: {name}")
                place = Path(twins, variant.twin) if variant.twin else directory
                rounds[-1].append(measure(name, variant, place, config, samples, due))
    return request_rate, config, [_median(runs, rounds[0][0]) for runs in zip(*rounds, strict=True)]


def _median(runs: Sequence[Outcome], full: Outcome) -> Outcome:
    """The run with the median throughput; its answers counted against the full engine's."""
    outcome = sorted(runs, key=lambda run: float(run["output_throughput"]))[(len(runs) - 1) // 2]
    same = sum(mine == other for mine, other in zip(outcome["tokens"], full["tokens"], strict=True))
    return outcome | {"same": None if outcome["same"] is None else same}


def settle(
    directory: Path, config: EngineConfig, num_prompts: int
) -> tuple[EngineConfig, Prepared]:
    """Fill in what depends on the model: max_model_len is its context, at most MAX_MODEL_LEN; the
    KV cache holds as many sequences of that length as a quarter of max_num_seqs."""
    positions = open_checkpoint(directory).config.context
    length = config.max_model_len or min(MAX_MODEL_LEN, positions)
    config = replace(
        config, max_model_len=length, max_queue_requests=max(num_prompts, config.max_queue_requests)
    )
    prepared = prepare(directory, config)
    if config.kv_cache_memory_bytes is not None:
        return config, prepared
    sequences = max(config.max_num_seqs // 4, 1)
    plan = prepared.plan
    blocks = sequences * plan.groups.most_blocks(length, plan.chunk, plan.block_size)
    config = replace(config, kv_cache_memory_bytes=blocks * plan.cache.block)
    return config, prepared


HEAD = (
    "engine",
    "tokens/s",
    "× full",
    "TTFT ms",
    "ITL ms",
    "E2E s",
    "running",
    "KV held",
    "filled",
    "weights",
    "same",
)
LEGEND = (
    "Output tokens/s; latencies as median / p99. Running: most sequences at once. KV held: most "
    "blocks in use between steps; filled: tokens cached over slots held, where sharing brings it "
    "above 100%. Same: answers equal to the full engine's, token for token."
)


def panels(outcomes: Sequence[Outcome]) -> list[tuple[str, list[float], list[float] | None]]:
    """The chart's (title, values, ends of ranges): throughput, then latencies from median to 99th
    percentile."""

    def values(key: str) -> list[float]:
        return [outcome[key] for outcome in outcomes]

    latencies = {"ttft": "time to first token", "itl": "between tokens", "e2el": "end to end"}
    return [
        ("output tokens/s", values("output_throughput"), None),
        *(
            (f"{t}, ms: median to p99", values(f"p50_{n}_ms"), values(f"p99_{n}_ms"))
            for n, t in latencies.items()
        ),
    ]


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """HEAD's columns for each outcome."""
    full = outcomes[0]["output_throughput"]
    return [
        [
            *(o["name"], f"{o['output_throughput']:,.0f}", f"{o['output_throughput'] / full:.2f}"),
            f"{o['p50_ttft_ms']:,.0f} / {o['p99_ttft_ms']:,.0f}",
            f"{o['p50_itl_ms']:,.1f} / {o['p99_itl_ms']:,.1f}",
            f"{o['p50_e2el_ms'] / 1000:.2f} / {o['p99_e2el_ms'] / 1000:.2f}",
            *(
                str(o["most_running"]),
                human_bytes(o["kv_held"]),
                f"{o['fill']:.0%}",
                human_bytes(o["weights"]),
            ),
            "other model" if o["same"] is None else f"{o['same']}/{len(o['tokens'])}",
        ]
        for o in outcomes
    ]
