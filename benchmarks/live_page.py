"""What it costs to count routers' choices, and what the live page's looks cost while one is open.

    .venv/bin/python benchmarks/live_page.py [--model bundled] [--sequences 1 32] [--steps 200]
    [--json FILE]

Counting: two engines of one model, one of which has no tallies, make decoding steps in turn, on one
thread; a step's time on the processor is compared with that of the other engine's step beside it.
Looks: what an engine does for one frame (reading loads and statistics, encoding them), and what the
front does (the frame, as JSON), once a second while a page is open. Time on the processor is what
other processes disturb least.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec

from moebius.engine import runner as runners
from moebius.engine import wire
from moebius.engine.client import EngineStats, ExpertLoads
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.expert_loads import ExpertCounts
from moebius.engine.load import load_engine
from moebius.models.hub import resolve_model
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from moebius.server.vitals import Heard, Look, frame
from records import processor, save

PROMPT = 100
LOOKS = 50


class Uncounted(ExpertCounts):
    """Routers that count nothing."""

    def __init__(self, model: Any, device: Any) -> None:
        super().__init__(model, device)
        for router in model.routers.values():
            router.tally = None


def engine_of(directory: Path, sequences: int) -> Engine:
    config = EngineConfig(
        max_model_len=1024,
        max_num_seqs=sequences,
        kv_cache_memory_bytes=2**29,
        threads=1,
        enable_prefix_caching=False,
    )
    return load_engine(directory, config)


def fill(engine: Engine, sequences: int, steps: int) -> None:
    """Give it sequences that decode for so many steps, and compute their prompts."""
    params = SamplingParams(temperature=0, max_tokens=steps + 50, ignore_eos=True)
    limits = engine.info.limits
    for i in range(sequences):
        draw = random.Random(i)
        ids = [draw.randrange(limits.vocab_size) for _ in range(PROMPT)]
        engine.add(Request(EngineRequest.create(str(i), ids, params, limits, arrival=0.0, seed=0)))
    requests = engine.scheduler.requests.values()
    while any(request.num_computed_tokens < PROMPT for request in requests):
        engine.step()


def timed(call: Callable[[], object]) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def counting(counted: Engine, plain: Engine, sequences: int, steps: int) -> dict[str, float]:
    """Steps in turn, each engine first as often as the other."""
    for engine in (counted, plain):
        fill(engine, sequences, steps)
        for _ in range(10):
            engine.step()
    ratios = []
    with_ = []
    without = []
    for i in range(steps):
        pair = (counted, plain) if i % 2 else (plain, counted)
        seconds = {id(engine): timed(engine.step) for engine in pair}
        with_.append(seconds[id(counted)])
        without.append(seconds[id(plain)])
        ratios.append(with_[-1] / without[-1])
    for engine in (counted, plain):
        for id_ in list(engine.scheduler.requests):
            engine.abort(id_)
    return {
        "sequences": sequences,
        "counted_ms": 1e3 * statistics.median(with_),
        "uncounted_ms": 1e3 * statistics.median(without),
        "cost": statistics.median(ratios) - 1,
    }


def looks(engine: Engine) -> dict[str, float]:
    """Milliseconds of one processor for a look, at the median."""

    def at_engine() -> tuple[EngineStats, ExpertLoads]:
        stats = engine.stats()
        loads = engine.expert_loads()
        wire.encode(wire.Loads(loads))
        wire.encode(wire.Stats(stats))
        return stats, loads

    heard = Heard("ready", 0, [(1.0, 1)] * 40, [(1.0, 1)] * 40, {}, {})
    engines = []
    fronts = []
    sizes = []
    for _ in range(LOOKS):
        before = time.thread_time()
        look = Look(*at_engine(), None)
        middle = time.thread_time()
        sizes.append(len(msgspec.json.encode(frame(look, look, heard))))
        engines.append(middle - before)
        fronts.append(time.thread_time() - middle)
    return {
        "engine_ms": 1e3 * statistics.median(engines),
        "front_ms": 1e3 * statistics.median(fronts),
        "frame_bytes": statistics.median(sizes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    directory = resolve_model(args.model)
    most = max(args.sequences)
    with patch.object(runners, "ExpertCounts", Uncounted):
        plain = engine_of(directory, most)
    with closing(plain), closing(engine_of(directory, most)) as counted:
        rows = [counting(counted, plain, each, args.steps) for each in args.sequences]
        assert any(layer.tokens for layer in counted.expert_loads().layers)
        assert not any(layer.tokens for layer in plain.expert_loads().layers)
        found = looks(counted)
    for row in rows:
        print(
            f"{row['sequences']:>4.0f} sequences: a step takes {row['counted_ms']:.3f} ms, "
            f"{row['uncounted_ms']:.3f} without counting: {100 * row['cost']:+.2f} %"
        )
    print(
        f"a look: {found['engine_ms']:.2f} ms of a processor at the engine, "
        f"{found['front_ms']:.2f} at the front, a frame of {found['frame_bytes']:,.0f} bytes"
    )
    record = {"model": args.model, "processor": processor(), "threads": 1}
    save(args.json, {**record, "steps": args.steps, "counting": rows, "look": found})


if __name__ == "__main__":
    main()
