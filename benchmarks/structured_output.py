"""Structured output: do answers validate, and what do masks cost?

    python benchmarks/structured_output.py --schemas 1000 --json benchmarks/structured_output.json
    python benchmarks/structured_output.py --schemas 0 --model DIRECTORY --json FILE

Answers: random JSON schemas (nested objects, arrays, enumerations, bounds, references to
themselves) are asked of a random tiny model at random temperatures, many at once; every answer that
says it is whole is validated with jsonschema, which knows nothing of llguidance.

Cost: 32 sequences decode in one engine. In turn, all plain; all held to a JSON schema; one held and
31 plain. A figure is the median over all rounds of a round's median step. Masks are followed along
free strings, the states with most ids to tell apart, so that no answer ends. With --processor-time
a step's time is that of all its threads on the processor, which other processes disturb less, and
which counts masks in full that are made beside a step; the engine computes on one thread then.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import jsonschema  # noqa: E402

from moebius import LLM, SamplingParams, StructuredOutput  # noqa: E402
from moebius.engine.config import EngineConfig  # noqa: E402
from moebius.engine.engine import Engine  # noqa: E402
from moebius.engine.load import load_engine  # noqa: E402
from moebius.models.hub import find_model  # noqa: E402
from moebius.request.constraint import Constraint, Grammar  # noqa: E402
from moebius.request.engine_request import EngineRequest  # noqa: E402
from moebius.schedule.request import Request  # noqa: E402
from moebius.text.grammar import checked_grammar  # noqa: E402
from random_schemas import random_schema  # noqa: E402
from records import save  # noqa: E402
from tiny import write_model  # noqa: E402

Clock = Callable[[], float]
BATCH = 32
WARM_STEPS = 8
STEPS = 24
PROMPT = 32
AT_ONCE = 64
FREE_TEXT = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "text": {"type": "string"}},
    "required": ["title", "text"],
}


def validated(count: int, seed: int, max_tokens: int) -> dict[str, Any]:
    """How many answers to so many random schemas are whole, and how many of these are valid."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        with LLM(directory, kv_cache_memory_bytes=2**28, max_num_seqs=AT_ONCE) as llm:
            for first in range(0, count, AT_ONCE):
                schemas = [random_schema(rng) for _ in range(min(AT_ONCE, count - first))]
                params = [
                    SamplingParams(
                        temperature=rng.choice((0.0, 0.7, 1.5)),
                        max_tokens=max_tokens,
                        seed=rng.getrandbits(60),
                        structured=StructuredOutput(json=schema),
                    )
                    for schema in schemas
                ]
                prompts = [f"{rng.random()}" for _ in schemas]
                for schema, output in zip(schemas, llm.generate(prompts, params), strict=True):
                    found[outcome(schema, output.outputs[0])] += 1
    return {"schemas": count, "seed": seed, "max_tokens": max_tokens, **found}


def outcome(schema: dict[str, Any], answer: Any) -> str:
    if answer.finish_reason == "length":
        return "truncated"
    try:
        value = json.loads(answer.text)
        jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"{answer.text!r} is not of {json.dumps(schema)}: {error}", file=sys.stderr)
        return "invalid"
    return "valid"


def round_of(engine: Engine, held: int, number: int, clock: Clock) -> float:
    """The median step, in seconds by this clock, of BATCH sequences, `held` of them to a schema."""
    text = checked_grammar(StructuredOutput(json=FREE_TEXT)).text()
    for i in range(BATCH):
        asked = EngineRequest.create(
            f"{number}-{i}",
            [(7 * i + j) % 200 for j in range(PROMPT)],
            SamplingParams(temperature=0, max_tokens=WARM_STEPS + STEPS + 8, ignore_eos=True),
            engine.info.limits,
            arrival=0.0,
            constraint=Constraint(Grammar(text)) if i < held else None,
        )
        engine.add(Request(asked))
    took = []
    while engine.has_work:
        begun = clock()
        outputs = engine.step()
        if len(outputs) == BATCH and all(len(each.token_ids) == 1 for each in outputs):
            took.append(clock() - begun)
    return median(took[WARM_STEPS : WARM_STEPS + STEPS])


def costs(model: str, rounds: int, memory: int, *, processor: bool) -> dict[str, Any]:
    """Of masks, as shares of a step without any."""
    config = EngineConfig(
        max_num_seqs=BATCH,
        max_model_len=512,
        kv_cache_memory_bytes=memory,
        threads=1 if processor else None,
    )
    clock = time.process_time if processor else time.perf_counter
    engine = load_engine(find_model(model).path, config)
    kinds = {"plain": 0, "all held": BATCH, "one held": 1}
    round_of(
        engine, BATCH, -1, clock
    )  # reads the tokenizer, compiles, meets states for the first time
    found: dict[str, list[float]] = {name: [] for name in kinds}
    number = 0
    for _ in range(rounds):
        for name, held in kinds.items():
            found[name].append(round_of(engine, held, number, clock))
            number += 1
    engine.close()
    steps = {name: median(each) for name, each in found.items()}
    plain = steps["plain"]
    return {
        "model": Path(model).name,
        "clock": clock.__name__,
        "vocabulary": engine.info.limits.vocab_size,
        "batch": BATCH,
        "rounds": rounds,
        "step_ms": {name: round(1000 * each, 3) for name, each in steps.items()},
        "all_held_share": round(steps["all held"] / plain - 1, 4),
        "one_held_share": round(steps["one held"] / plain - 1, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--schemas", type=int, default=1000, help="how many; 0: no answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--model", help="whose steps are timed; default: none")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-cache-memory", type=int, default=2**30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record: dict[str, Any] = {}
    if options.schemas:
        record["answers"] = validated(options.schemas, options.seed, options.max_tokens)
    if options.model:
        record["cost"] = costs(
            options.model,
            options.rounds,
            options.kv_cache_memory,
            processor=options.processor_time,
        )
    print(json.dumps(record, indent=2))
    if options.json:
        save(options.json, record)
    return int(bool(record.get("answers", {}).get("invalid")))


if __name__ == "__main__":
    sys.exit(main())
