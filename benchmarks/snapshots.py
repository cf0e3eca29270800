"""What snapshots of recurrent states cost, and what they save: copies, and hits of conversations.

    .venv/bin/python benchmarks/snapshots.py [--repeats 20] [--json FILE]

Sizes are Qwen3.5-35B-A3B's: 30 recurrent layers of 2 MiB and 48 KiB, and 20 KiB a token in the 10
others. Copies take turns with one plain copy of as many bytes, on one thread, as in a step.

Conversations run through the scheduler alone, without a model: its decisions are all that hits
depend on. Each begins with the same system prompt and a document of its own. `keep` is a template
that keeps an answer as it was, `drop` one that drops its thinking and keeps its end. In `rounds`
the conversations take turns, in `bursts` one of them makes several turns while others wait.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from moebius.engine.cache_sizes import CacheSizes
from moebius.engine.config import EngineConfig
from moebius.engine.kv_cache import KVCache
from moebius.ops.cache_spec import CacheSpec, Plane
from moebius.ops.reference import ReferenceOps
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.schedule.blocks import BlockPool
from moebius.schedule.groups import CacheGroups, StateSpec
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler
from records import processor, save

LAYERS = 30
STATE = CacheSpec(
    state=(
        Plane("state", (32, 128, 128), torch.float32),
        Plane("conv", (3, 8192), torch.bfloat16),
    )
)
BLOCK_SIZE = 16
SIZES = CacheSizes((None,), 10 * 2 * 2 * 256 * 2 * BLOCK_SIZE, state=LAYERS * STATE.bytes_per_state)
MAX_MODEL_LEN = 32_768
SYSTEM = 1000
DOCUMENT = 4000
QUESTION = 60
GENERATION_PROMPT = 5
ANSWER = 200
KEPT_OF_THINKING = 50


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def copies(repeats: int) -> dict[str, Any]:
    """Medians of what a slot's copy and its clearing take, beside plain copies of as much."""
    torch.set_num_threads(1)
    cache = KVCache(
        [STATE] * LAYERS,
        ReferenceOps(),
        num_blocks=0,
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
        num_states=4,
    )
    plain = torch.ones(2, SIZES.state, dtype=torch.uint8)
    for slot in range(4):
        cache.clear_states([slot])
    runs: dict[str, Callable[[], object]] = {
        "plain copy": lambda: plain[0].copy_(plain[1]),
        "copy": lambda: cache.copy_states([(1, 2)]),
        "clear": lambda: cache.clear_states([3]),
        "nothing to do": lambda: (cache.clear_states([]), cache.copy_states([])),
    }
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {
        "bytes": SIZES.state,
        "ms": {name: 1000 * statistics.median(times) for name, times in taken.items()},
    }


class Conversations:
    """So many of them through a scheduler with so many slots, turn after turn."""

    def __init__(self, count: int, slots: int, *, drops_thinking: bool) -> None:
        self._rng = Random(0)
        spec = SIZES.state_spec(slots, 64, BLOCK_SIZE, chunk=2048, length=MAX_MODEL_LEN)
        spec = StateSpec(slots, spec.scratch, 4096 // BLOCK_SIZE, spec.apart)
        pool = BlockPool(100_000, BLOCK_SIZE, groups=CacheGroups(states=spec), key=bytes(32))
        self.scheduler = Scheduler(EngineConfig(max_model_len=MAX_MODEL_LEN), pool)
        self._drops_thinking = drops_thinking
        system = self._tokens(SYSTEM)
        self._texts = [system + self._tokens(DOCUMENT) for _ in range(count)]
        self._limits = ServingLimits(100_000, MAX_MODEL_LEN)
        self.computed = self.prompts = self.copies = self.answered = 0

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(100_000) for _ in range(count)]

    def turn(self, number: int) -> None:
        """A conversation's next question, and its answer."""
        text = self._texts[number] + self._tokens(QUESTION)
        request = self._ask(text)
        answer = request.output_ids[-KEPT_OF_THINKING:]
        if not self._drops_thinking:
            answer = list(request.prompt_ids[len(text) :]) + request.output_ids
        self._texts[number] = text + answer

    def _ask(self, text: list[int]) -> Request:
        prompt = text + list(range(GENERATION_PROMPT))
        params = SamplingParams(max_tokens=ANSWER)
        asked = EngineRequest.create(
            f"r{self.answered}",
            prompt,
            params,
            self._limits,
            arrival=float(self.answered),
            generation_start=len(text),
        )
        request = Request(asked)
        self.scheduler.add(request)
        self.answered += 1
        self.prompts += len(prompt)
        while self.scheduler.has_work:
            plan = self.scheduler.plan(0.0)
            for chunk in plan.chunks:
                if not request.output_ids:
                    self.computed += chunk.num_tokens
                if chunk.states is not None and chunk.states.save is not None:
                    self.copies += 1
            drawn = {chunk.request_id: self._tokens(1) for chunk in plan.chunks if chunk.samples}
            self.scheduler.update(plan, drawn)
        return request


def conversations(count: int, turns: int, slots: int) -> list[dict[str, Any]]:
    found = []
    for drops in (False, True):
        for bursts in (False, True):
            made = Conversations(count, slots, drops_thinking=drops)
            order = [number for _ in range(turns) for number in range(count)]
            if bursts:
                Random(1).shuffle(order)
            for number in order:
                made.turn(number)
            found.append(
                {
                    "template": "drop" if drops else "keep",
                    "order": "bursts" if bursts else "rounds",
                    "conversations": count,
                    "turns": turns,
                    "slots": slots,
                    "prompt_tokens": made.prompts,
                    "computed": made.computed,
                    "hit_rate": 1 - made.computed / made.prompts,
                    "copies_a_turn": made.copies / made.answered,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"processor": processor(), "copies": copies(args.repeats)}
    print(f"{SIZES.state / 2**20:.1f} MiB a state")
    for name, milliseconds in record["copies"]["ms"].items():
        print(f"{name}: {milliseconds:.3f} ms")
    record["conversations"] = []
    for count, slots in ((1, 4), (8, 16), (8, 24)):
        record["conversations"] += conversations(count, 10, slots)
    for row in record["conversations"]:
        print(
            f"{row['conversations']} conversations, {row['slots']} slots, {row['template']}, "
            f"{row['order']}: {row['computed']:,} of {row['prompt_tokens']:,} prompt tokens "
            f"computed, {row['hit_rate']:.1%} found; {row['copies_a_turn']:.1f} copies a turn"
        )
    save(args.json, record)


if __name__ == "__main__":
    main()
