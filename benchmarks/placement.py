"""Imbalance of experts over ranks, before and after they are placed by load, on a skewed corpus.

    python benchmarks/placement.py --out placement.json

The corpus is one module's source and one line of a test, again and again, so that some experts get
far more than others. The model's routers are measured on it by `moebius inspect`'s own functions.
Experts are placed by the loads of every other step and judged on the steps between, which they have
not seen: the busiest rank's tokens over the mean, 1 when even.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.files import anyone, json_text, write_file
from moebius.inspect.collect import collect, routers
from moebius.inspect.config import InspectConfig
from moebius.inspect.corpus import Document, make_rows
from moebius.models.hub import resolve_model
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.placement import Placement
from moebius.ops import select_ops
from moebius.text import Tokenizer

RANKS = (2, 4, 8)
SPARE = (0, 1, 2)


def corpus() -> list[Document]:
    """A module, and as much of one line again and again: a tenant with one kind of text."""
    source = Path(argparse.__file__).read_text()
    repeated = "    self.assertEqual(len(self.values), 12)\n" * 400
    return [Document("argparse", "python", source), Document("tests", "repeated", repeated * 2)]


def measure(model: Path, config: InspectConfig) -> tuple[list[int], Tensor]:
    """The layers that have a router, and what each step gave each expert (S, M, E)."""
    checkpoint = open_checkpoint(model)
    dtype = torch.bfloat16 if checkpoint.dtype == "bfloat16" else torch.float32
    ops = select_ops(torch.device("cpu"), dtype, config.threads)
    decoder = load_decoder(checkpoint, dtype, "cpu", ops)
    tokenizer = Tokenizer.load(model)
    length = min(config.row_length, checkpoint.config.context)
    rows = make_rows(corpus(), tokenizer, length, config.max_tokens)
    tally = collect(decoder, rows, config.step_tokens)
    return list(routers(decoder)), torch.stack(tally.counts_SME)


def judge(layers: Sequence[int], steps_SME: Tensor) -> list[dict[str, Any]]:
    """For each number of ranks and of spare experts, layer by layer."""
    known = _loads(layers, steps_SME[::2].sum(0))
    judged = _loads(layers, steps_SME[1::2].sum(0))
    experts = {layer: len(loads) for layer, loads in known.items()}
    found = []
    for ranks in RANKS:
        before = Placement.linear(experts, ranks).imbalance(judged)
        for spare in SPARE:
            after = Placement.balanced(known, ranks, spare=spare).imbalance(judged)
            row = {
                "ranks": ranks,
                "spare_experts": spare,
                "before": _rounded(before),
                "after": _rounded(after),
                "worst_before": round(max(before.values()), 4),
                "worst_after": round(max(after.values()), 4),
            }
            found.append(row)
    return found


def _loads(layers: Sequence[int], counts_ME: Tensor) -> dict[int, list[int]]:
    return dict(zip(layers, counts_ME.tolist(), strict=True))


def _rounded(values: dict[int, float]) -> dict[int, float]:
    return {layer: round(value, 4) for layer, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--max-tokens", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("placement.json"))
    asked = parser.parse_args(arguments)
    config = InspectConfig(max_tokens=asked.max_tokens)
    layers, steps_SME = measure(resolve_model(asked.model), config)
    if len(steps_SME) < 2:
        parser.error("one step is too few to place by and to judge on; raise --max-tokens")
    rows = judge(layers, steps_SME)
    record = {"model": asked.model, "steps": len(steps_SME), "placements": rows}
    write_file(asked.out, json_text(record, indent=1) + "\n", ours=anyone)
    print("ranks  spare  worst before  worst after")
    for row in rows:
        ranks = row["ranks"]
        spare = row["spare_experts"]
        print(f"{ranks:5}  {spare:5}  {row['worst_before']:12.2f}  {row['worst_after']:11.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
