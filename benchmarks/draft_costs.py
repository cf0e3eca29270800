"""What a step of several rows a sequence costs over one of one row: what drafting has to win.

    .venv/bin/python benchmarks/draft_costs.py --model DIRECTORY [--batches 1 4 16 64]
    [--rows 1 2 4 8] [--rounds 12] [--json FILE]
    .venv/bin/python benchmarks/draft_costs.py --make-dense DIRECTORY

Each sequence has a prompt of 64 tokens. A step of r rows computes its last token and r - 1 made-up
ones behind it, as a step that verifies drafts would, with the logits of every row; then the
sequences are put back to where they were. Steps of all numbers of rows are made in turn, on one
thread; what is told is the median of the process's time on the processor, which other processes
disturb little. --make-dense writes the dense model that is compared: M1's sizes
(benchmarks/peers), with one feed-forward layer as wide as the experts that a token of M1 goes
through.
"""

import argparse
import random
import statistics
import time
from contextlib import closing
from pathlib import Path

from moebius.engine.batch import Batch
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.models.hub import resolve_model
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from records import processor, save

PROMPT = 64
LOGITS_AT_ONCE = 64


def fill(engine: Engine, sequences: int) -> list[Request]:
    """So many sequences, each with its prompt computed and one token drawn."""
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    limits = engine.info.limits
    draw = random.Random(0)
    for i in range(sequences):
        ids = [draw.randrange(limits.vocab_size) for _ in range(PROMPT)]
        engine.add(Request(EngineRequest.create(str(i), ids, params, limits, arrival=0.0, seed=0)))
    requests = list(engine.scheduler.requests.values())
    while any(not request.output_ids for request in requests):
        engine.step()
    return requests


def verify(engine: Engine, requests: list[Request], rows: int, draw: random.Random) -> float:
    """Seconds of a step with so many rows of each sequence."""
    vocab = engine.info.limits.vocab_size
    lengths = [len(request.output_ids) for request in requests]
    computed = [request.num_tokens - 1 for request in requests]
    for request, start in zip(requests, computed, strict=True):
        request.num_computed_tokens = start
        request.output_ids += [draw.randrange(vocab) for _ in range(rows - 1)]
    before = time.process_time()
    engine.step()
    seconds = time.process_time() - before
    for request, length, start in zip(requests, lengths, computed, strict=True):
        assert request.num_computed_tokens == start + rows, "all its rows were one step's"
        del request.output_ids[length:]
        request.num_computed_tokens = start
    return seconds


def with_all_logits(engine: Engine) -> None:
    """Have each step make the logits of every row, not of the last of each sequence alone."""
    execute = engine._execute

    def executed(plan: object) -> Batch:
        batch = execute(plan)  # type: ignore[arg-type]
        rows = range(sum(chunk.num_tokens for chunk in plan.chunks))  # type: ignore[attr-defined]
        extra = rows[: len(rows) - len(batch.sampled_rows)]
        for first in range(0, len(extra), LOGITS_AT_ONCE):
            engine.runner.ops.argmax(engine.runner.logits(extra[first : first + LOGITS_AT_ONCE]))
        return batch

    engine._execute = executed  # type: ignore[method-assign]


def costs(
    directory: Path, sequences: int, widths: list[int], rounds: int
) -> list[dict[str, float]]:
    config = EngineConfig(
        max_model_len=512,
        max_num_seqs=sequences,
        max_num_batched_tokens=max(512, sequences * max(widths)),
        kv_cache_memory_bytes=2**29,
        threads=1,
        enable_prefix_caching=False,
    )
    draw = random.Random(1)
    with closing(load_engine(directory, config)) as engine:
        requests = fill(engine, sequences)
        with_all_logits(engine)
        seconds: dict[int, list[float]] = {rows: [] for rows in widths}
        for _ in range(rounds):
            for rows in widths:
                seconds[rows].append(verify(engine, requests, rows, draw))
    medians = {rows: statistics.median(found[1:]) for rows, found in seconds.items()}
    return [
        {
            "sequences": sequences,
            "rows": rows,
            "ms": 1e3 * median,
            "over_one_row": median / medians[widths[0]],
        }
        for rows, median in medians.items()
    ]


def make_dense(directory: Path) -> None:
    """Random weights in bfloat16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4 * 512,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--make-dense", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.make_dense:
        make_dense(args.make_dense)
        return
    directory = resolve_model(args.model)
    record = {"model": Path(args.model).name, "processor": processor(), "threads": 1}
    found = []
    for sequences in args.batches:
        rows = costs(directory, sequences, args.rows, args.rounds)
        found += rows
        told = "  ".join(f"{row['rows']:.0f}: {row['over_one_row']:.2f}" for row in rows)
        print(f"{sequences:>4} sequences, a row {rows[0]['ms']:.2f} ms; {told}", flush=True)
        save(args.json, {**record, "prompt": PROMPT, "rounds": args.rounds, "costs": found})


if __name__ == "__main__":
    main()
