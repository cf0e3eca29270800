"""What `--speculative ngram` brings where a text repeats what was said, and costs elsewhere.

    .venv/bin/python benchmarks/drafting.py [--models bundled DIRECTORY] [--sequences 1 4 16]
    [--tokens 200] [--rounds 5] [--json FILE]

Texts are dictated: a step computes and draws as it would, and what it drew is then replaced by the
text's next token, so that a model's quality is no part of it. `edit` is a module of Python's
standard library with two of its names changed, behind the module as it is; `prose` is a page of
the documentation, behind nothing; `chance` are ids drawn at random. `own` is what the model itself
says, greedily, behind the beginning of the module.

Two engines that differ in the option alone make a step in turn, on one thread each, and read the
same weights. Time is the process's on its processor, which other processes disturb little: of the
steps behind the last first token, and of those that the costs are of. What is told is the median,
over rounds, of tokens a second with drafts over without.
"""

import argparse
import inspect
import random
import statistics
import textwrap
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moebius.engine.config import EngineConfig
from moebius.engine.constraints import Constraints, Outcome
from moebius.engine.drafting import step_costs
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.engine.sampler import Sampled
from moebius.models.hub import resolve_model
from moebius.ops.sampling import SamplerOps
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.drafts import DraftingScheduler
from moebius.schedule.request import Request
from moebius.text import load_text
from records import processor, save

PROMPT = 700
Text = tuple[list[int], list[int] | None]
"""Token ids of a prompt, and of what is dictated behind it; None: the model goes on by itself."""


class Dictation(Constraints):
    """Draws as ever, and then says what it is told."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(None, engine.info.limits.vocab_size, engine.info.eos_ids)
        self.text: list[int] | None = None

    def draw(self, logits_LV: Tensor, requests: "list[Request]", ops: SamplerOps) -> list[Outcome]:
        drawn = super().draw(logits_LV, requests, ops)
        if self.text is None:
            return drawn
        return [Sampled(self.text[len(request.output_ids)]) for request in requests]


def texts(tokens: int, vocab_size: int) -> dict[str, Text]:
    """By name; all are in the bundled model's tokens, which other models take for their own."""
    tokenizer, _ = load_text(resolve_model("bundled"))
    draw = random.Random(0)

    def ids(text: str) -> list[int]:
        return [token % vocab_size for token in tokenizer.encode(text)]

    module = inspect.getsource(textwrap)
    edited = module.replace("chunks", "pieces").replace("cur_line", "line")
    prose = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    beginning = ids(module)[:PROMPT]
    chance = [draw.randrange(vocab_size) for _ in range(tokens + PROMPT)]
    found: dict[str, Text] = {
        "edit": (beginning, ids(edited)[:tokens]),
        "prose": (ids("Training."), ids(prose)[:tokens]),
        "chance": (chance[tokens:], chance[:tokens]),
        "own": (beginning, None),
    }
    assert all(told is None or len(told) == tokens for _, told in found.values())
    return found


def begin(engine: Engine, text: Text, sequences: int, tokens: int) -> list[Request]:
    """The requests, once each has drawn its first token."""
    prompt, dictated = text
    assert isinstance(engine._constraints, Dictation)
    engine._constraints.text = dictated
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = []
    for i in range(sequences):
        asked = EngineRequest.create(
            str(i), prompt, params, engine.info.limits, arrival=float(i), seed=0
        )
        requests.append(Request(asked))
        engine.add(requests[-1])
    while any(not request.output_ids for request in requests):
        engine.step()
    return requests


def race(engines: dict[str, Engine], text: Text, sequences: int, tokens: int) -> dict[str, float]:
    """Tokens a second of each engine, which make a step in turn."""
    requests = {name: begin(engine, text, sequences, tokens) for name, engine in engines.items()}
    drawn = {
        name: sequences * tokens - sum(len(each.output_ids) for each in own)
        for name, own in requests.items()
    }
    seconds = dict.fromkeys(engines, 0.0)
    while any(engine.has_work for engine in engines.values()):
        for name, engine in engines.items():
            began = time.process_time()
            if engine.has_work:
                engine.step()
                seconds[name] += time.process_time() - began
    said = [own[0].output_ids for own in requests.values()]
    assert said[0] == said[1], "drafts have changed a token"
    return {name: drawn[name] / seconds[name] for name in engines}


def compare(
    engines: dict[str, Engine], text: Text, sequences: int, tokens: int, rounds: int
) -> dict[str, Any]:
    before = engines["ngram"].stats()
    found = []
    for number in range(rounds):
        order = list(engines) if number % 2 else list(engines)[::-1]
        found.append(race({name: engines[name] for name in order}, text, sequences, tokens))
    after = engines["ngram"].stats()
    gains = sorted(rates["ngram"] / rates["none"] for rates in found)
    return {
        "sequences": sequences,
        "tokens_per_s": round(statistics.median(rates["none"] for rates in found), 1),
        "gain": round(statistics.median(gains), 3),
        "gains": [round(gain, 3) for gain in gains],
        "drafted": after.draft_tokens - before.draft_tokens,
        "accepted": after.accepted_tokens - before.accepted_tokens,
    }


def measure(model: str, args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Adds to the record, and saves it, text by text."""
    config = EngineConfig(
        max_model_len=PROMPT + args.tokens,
        max_num_seqs=max(args.sequences),
        kv_cache_memory_bytes=2**29,
        threads=1,
        enable_prefix_caching=False,
    )
    directory = resolve_model(model)
    off = load_engine(directory, config)
    with closing(off), closing(load_engine(directory, replace(config, speculative="ngram"))) as on:
        engines = {"none": off, "ngram": on}
        for engine in engines.values():
            engine._constraints = Dictation(engine)
        assert isinstance(on.scheduler, DraftingScheduler)
        most = min(on.scheduler.most_rows, config.max_num_batched_tokens)
        costs = step_costs(on.runner, on.info.num_blocks, most, time.process_time)
        on.scheduler.costs = costs
        told = {rows: round(costs.of(rows) / costs.of(1), 2) for rows in (2, 4, 8, 16, 32)}
        print(f"{model}: a step's costs over one of one row {told}", flush=True)
        found: list[dict[str, Any]] = []
        record["models"].append({"model": Path(model).name, "costs": told, "texts": found})
        for name, text in texts(args.tokens, off.info.limits.vocab_size).items():
            for sequences in args.sequences:
                row = {"text": name, **compare(engines, text, sequences, args.tokens, args.rounds)}
                found.append(row)
                save(args.json, record)
                print(
                    f"{name:>8} {sequences:>3} sequences: {row['gain']:.3f} of "
                    f"{row['tokens_per_s']:.0f} tokens/s; {row['accepted']} of "
                    f"{row['drafted']} drafts right",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["bundled"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"processor": processor(), "tokens": args.tokens, "models": []}
    for model in args.models:
        measure(model, args, record)


if __name__ == "__main__":
    main()
