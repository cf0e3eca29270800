"""moebius inspect as a function: model and text in, report.html and report.json out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.config import require
from moebius.inspect.collect import collect, routers
from moebius.inspect.corpus import Document, Rows, make_rows
from moebius.inspect.page import render
from moebius.inspect.summary import check_finite, distinct, drift, layer_figures, placement, tastes, together
from moebius.inspect.verdict import EVEN, UNEVEN, verdict
from moebius.models.checkpoint import Checkpoint, open_checkpoint
from moebius.models.decoder import Decoder
from moebius.models.weights import load_decoder
from moebius.moe import health
from moebius.ops import select_ops
from moebius.text import Tokenizer

Progress = Callable[[str, int], AbstractContextManager[Callable[[], Any]]]

CAPACITY_FACTORS = (1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class InspectConfig:
    """How much text is run, in which pieces, and for which settings costs are worked out.

    ranks empty means the powers of two up to half the experts (at most 64) that divide them.
    """

    max_tokens: int = 200_000
    row_length: int = 512
    step_tokens: int = 2048
    capacity_factors: Sequence[float] = CAPACITY_FACTORS
    ranks: Sequence[int] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "row_length", "step_tokens"):
            require(getattr(self, name) >= 2, f"{name} is {getattr(self, name)}; it must be at least 2")
        good = all(0 < factor < math.inf for factor in self.capacity_factors)
        require(good, f"capacity factors are {list(self.capacity_factors)}; they must be positive numbers")

    def ranks_for(self, experts: int) -> list[int]:
        wrong = [count for count in self.ranks if not 2 <= count <= experts]
        require(not wrong, f"--ranks {wrong and wrong[0]}: {experts} experts can be spread over 2 to {experts} ranks")
        return sorted(set(self.ranks)) or [2**i for i in range(1, 7) if 2 ** (i + 1) <= experts and experts % 2**i == 0]


def write_report(
    directory: Path,
    documents: Iterable[Document],
    out: Path,
    config: InspectConfig | None = None,
    *,
    name: str | None = None,
    against: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run documents through the model in `directory` and write report.html and report.json into `out`.

    `against` is another checkpoint of the same shape, run on the same tokens. Returns what report.json holds. Raises
    UsageError for a dense model, for text that is none, and for checkpoints that do not fit together.
    """
    config = config or InspectConfig()
    out.mkdir(parents=True, exist_ok=True)
    require(os.access(out, os.W_OK), f"{out} cannot be written; name another directory with --out")
    checkpoint, tokenizer = open_checkpoint(directory), Tokenizer.load(directory)
    decoder = _load(checkpoint, config)
    found = routers(decoder)
    ranks = config.ranks_for(next(iter(found.values())).config.num_experts)
    rows = make_rows(
        documents, tokenizer, min(config.row_length, checkpoint.config.max_position_embeddings), config.max_tokens
    )
    vocabulary = checkpoint.config.vocab_size
    require(
        int(rows.tokens_N.max()) < vocabulary,
        f"the tokenizer gives ids beyond the model's {vocabulary}: it is another model's",
    )
    other = None if against is None else _load_other(checkpoint, against, rows, tokenizer, config)
    steps = -(-len(rows.tokens_N) // max(config.step_tokens // rows.length, 1) // rows.length)
    with (progress or _silent)("inspecting", steps) as on_step:
        tally = collect(decoder, rows, config.step_tokens, other, on_step)
    layers, router = list(found), tally.router
    check_finite(tally, layers)
    report: dict[str, Any] = {
        "model": {"name": name or directory.name, "type": checkpoint.config.model_type, "dtype": checkpoint.dtype}
        | {"layers": checkpoint.config.num_layers, "backend": decoder.ops.name},
        "router": {"num_experts": router.num_experts, "top_k": router.top_k, "score": router.score}
        | {"weight": router.weight, "greatest_entropy": round(math.log(router.num_experts), 4)},
        "text": {"documents": len(rows.documents), "read": rows.read, "run": tally.seen, "row_length": rows.length}
        | {"step_tokens": int(tally.counts_SME[0][0].sum()) // router.top_k, "steps": len(tally.counts_SME)}
        | {"kinds": dict(zip(rows.kinds, torch.bincount(rows.kind_N).tolist(), strict=True))},
        "limits": {"even": EVEN, "uneven": UNEVEN},
        "floor": round(health.max_violation_floor(tally.seen, router.num_experts, router.top_k), 4),
        "capacity_factors": list(config.capacity_factors),
        "layers": layer_figures(tally, layers, config.capacity_factors),
        "coactivation": together(tally),
        "tastes": [tastes(tally, tokenizer, m) for m in range(len(layers))],
        "distinct": distinct(tally),
        "placement": placement(tally, ranks),
        "against": None,
    }
    if other is not None and against is not None:
        report["against"] = drift(tally, str(against), _router_change(decoder, other))
    report["verdict"] = [finding._asdict() for finding in verdict(report)]
    (out / "report.json").write_text(json.dumps(report, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render(report), encoding="utf-8")
    return report


def _silent(what: str, total: int) -> AbstractContextManager[Callable[[], Any]]:
    return nullcontext(lambda: None)


def _load(checkpoint: Checkpoint, config: InspectConfig) -> Decoder:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if checkpoint.dtype == "bfloat16" else torch.float32
    ops = select_ops(device, dtype, config.threads)
    # The kernels have a pool of their own; a second one that spins beside it costs both dearly on few cores.
    torch.set_num_threads(1 if ops.one_answer else config.threads or torch.get_num_threads())
    return load_decoder(checkpoint, dtype, device, ops)


def _load_other(mine: Checkpoint, directory: Path, rows: Rows, tokenizer: Tokenizer, config: InspectConfig) -> Decoder:
    """A second checkpoint, which must have the first one's shape and give its text the same tokens."""
    other = open_checkpoint(directory)
    for field in ("num_layers", "hidden_size", "vocab_size", "feed_forward"):
        here, there = getattr(mine.config, field), getattr(other.config, field)
        shown = f", {field} {there} and not {here}" if isinstance(here, int) else " in its experts or routers"
        require(here == there, f"--against {directory}: the model has another shape{shown}")
    sample = tokenizer.decode(rows.tokens_N[: rows.length].tolist())
    same = Tokenizer.load(directory).encode_ordinary(sample) == tokenizer.encode_ordinary(sample)
    require(same, f"--against {directory}: its tokenizer gives the text other tokens")
    return _load(other, config)


def _router_change(decoder: Decoder, other: Decoder) -> Tensor:
    """|W - W'| / |W'| of each router's weight, Frobenius norms (M,)."""
    pairs = zip(routers(decoder).values(), routers(other).values(), strict=True)
    return torch.stack([(a.weight.float() - b.weight.float()).norm() / b.weight.float().norm() for a, b in pairs])
