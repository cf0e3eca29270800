"""Every variant on one list of requests, with the same cache memory, in turn."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ablation.replay import Replay
from ablation.variants import (
    CONTIGUOUS,
    FULL,
    MAX_MODEL_LEN,
    Variant,
    mixed_samples,
    settle,
    variants,
    write_twin,
)
from moebius.bench.metrics import summarise
from moebius.bench.workload import Sample, arrival_times, require_positive
from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine, prepare
from moebius.errors import ConfigError

Outcome = dict[str, Any]
"""One variant's run: the figures of `summarise`, and with them, memory in bytes,

name           the variant
tokens         its answers
weights        the model's
most_running   sequences at once
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
        "kv_held": replay.most_blocks * plan.block_size * plan.bytes_per_token,
        "fill": replay.fill,
        "weights": plan.weights.mapped + plan.weights.copied,
        "same": None if variant.twin else 0,
    }


class Ablation(NamedTuple):
    """What was run: how, and the median run of each variant."""

    request_rate: float
    config: EngineConfig
    outcomes: list[Outcome]


def ablate(
    directory: Path,
    config: EngineConfig,
    *,
    num_prompts: int = 48,
    request_rate: float | None = None,
    names: Sequence[str] | None = None,
    rounds: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> Ablation:
    """Run the full engine and the named variants (None: all) in turn, several rounds of them.

    Without a request rate the requests arrive in a quarter of the time that the full engine takes
    for all of them at once, so that every variant is at its limit.
    """
    config, prepared = settle(directory, config, num_prompts)
    require_positive(prompts=num_prompts, rounds=rounds)
    length = config.max_model_len or 0
    known = variants(config)
    chosen = _chosen(known, names, length)
    vocab_size = prepared.checkpoint.config.vocab_size
    samples = mixed_samples(num_prompts, vocab_size=vocab_size, max_model_len=length, seed=seed)
    if request_rate is None:
        progress("finding the request rate")
        # The better of two: the first also warms the machine up, and a rate too low would hide all
        # differences.
        at_once = [0.0] * num_prompts
        trials = [measure(FULL, known[FULL], directory, config, samples, at_once) for _ in range(2)]
        request_rate = 4 * max(trial["request_throughput"] for trial in trials)
    due = arrival_times(num_prompts, request_rate, seed=seed)
    runs: dict[str, list[Outcome]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory(prefix="moebius-twins-") as twins:
        for twin in {variant.twin for variant in chosen.values()} - {""}:
            write_twin(prepared, twin, Path(twins, twin))
        for number in range(1, rounds + 1):
            for name, variant in chosen.items():
                progress(f"round {number} of {rounds}: {name}")
                place = Path(twins, variant.twin) if variant.twin else directory
                runs[name].append(measure(name, variant, place, config, samples, due))
    full = runs[FULL][0]
    return Ablation(request_rate, config, [_median(each, full) for each in runs.values()])


def _chosen(
    known: dict[str, Variant], names: Sequence[str] | None, length: int
) -> dict[str, Variant]:
    """The full engine and the variants of these names; None: all. ConfigError for unknown ones."""
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ConfigError(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {
        name: variant
        for name, variant in known.items()
        if names is None or name in names or name == FULL
    }
    if CONTIGUOUS in chosen and length > MAX_MODEL_LEN:
        raise ConfigError(
            f"sequences of {length} tokens are too long for {CONTIGUOUS!r}, which takes at most "
            f"{MAX_MODEL_LEN}"
        )
    return chosen


def _median(runs: Sequence[Outcome], full: Outcome) -> Outcome:
    """The run with the median throughput; its answers counted against the full engine's."""
    outcome = sorted(runs, key=lambda run: float(run["output_throughput"]))[(len(runs) - 1) // 2]
    if outcome["same"] is None:
        return outcome
    answers = zip(outcome["tokens"], full["tokens"], strict=True)
    return outcome | {"same": sum(mine == other for mine, other in answers)}
