"""moebius inspect as a function: model and text in, report.html and report.json out.

The report is JSON; verdict.j2 makes sentences of it, report.html.j2 a page, with the filters at the
end of this file.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from moebius.errors import require
from moebius.files import begins_with, check_target, json_text, make_directory, signed, write_file
from moebius.inspect.collect import Progress, collect, routers, silent
from moebius.inspect.config import InspectConfig
from moebius.inspect.corpus import Document, Rows, make_rows
from moebius.inspect.summary import (
    check_finite,
    distinct,
    drift,
    layer_figures,
    placement,
    tastes,
    together,
)
from moebius.models.decoder import Decoder
from moebius.models.store import Checkpoint, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.moe.health import max_violation_floor
from moebius.ops import select_ops
from moebius.ops.threads import TorchThreads, default_threads
from moebius.text import Tokenizer

# More cells than these make a page that a browser is slow to show.
_CELLS = 24_000
# By what earlier reports are known, which may be replaced.
_OURS = {
    "report.json": begins_with(b'{"model": {"name": '),
    "report.html": signed(b'<meta name="generator" content="Moebius">'),
}


def write_report(
    directory: Path,
    documents: Iterable[Document],
    out: Path,
    config: InspectConfig | None = None,
    *,
    name: str | None = None,
    against: Path | None = None,
    against_name: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run documents through the model in `directory` and write report.html and report.json into
    `out`.

    `against` is another checkpoint of the same shape, run on the same tokens; names are what the
    report calls the two. Returns what report.json holds. Raises UsageError for a dense model, for
    text that is none, and for checkpoints that do not fit together; NumericalError for a router
    that gives no numbers; StorageError where `out` cannot be written.
    """
    config = config or InspectConfig()
    _check_out(out)
    checkpoint, tokenizer = open_checkpoint(directory), Tokenizer.load(directory)
    decoder = _load(checkpoint, config)
    layers, model = list(routers(decoder)), checkpoint.config
    ranks = config.ranks_for(next(iter(routers(decoder).values())).config.num_experts)
    length = min(config.row_length, model.context)
    rows = make_rows(documents, tokenizer, length, config.max_tokens)
    fits = int(rows.tokens_N.max()) < model.vocab_size
    require(
        fits,
        f"the tokenizer gives ids beyond the model's {model.vocab_size}: it is another model's",
    )
    other = None if against is None else _load_other(checkpoint, against, rows, tokenizer, config)
    # The kernels have a pool of their own; a second one that spins beside it costs both dearly on
    # few cores.
    with TorchThreads(1 if decoder.ops.own_threads else config.threads or default_threads()):
        tally = collect(decoder, rows, config.step_tokens, other, progress)
    check_finite(tally, layers)
    experts = tally.router.num_experts
    report: dict[str, Any] = {
        "model": {
            "name": name or directory.name,
            "type": model.model_type,
            "layers": model.num_layers,
        },
        "run": {
            "dtype": _name(decoder.dtype),
            "backend": decoder.ops.name,
            "steps": len(tally.counts_SME),
        },
        "router": asdict(tally.router) | {"greatest_entropy": round(math.log(experts), 4)},
        "text": rows.facts()
        | {"step_tokens": int(tally.counts_SME[0][0].sum()) // tally.router.top_k},
        "limits": {"even": 0.5, "uneven": 1.0},
        "floor": round(max_violation_floor(tally.seen, experts, tally.router.top_k), 4),
        "capacity_factors": list(config.capacity_factor),
        "layers": layer_figures(tally, layers, config.capacity_factor),
        "coactivation": together(tally),
        "tastes": [tastes(tally, tokenizer, m) for m in range(len(layers))],
        "distinct": distinct(tally),
        "placement": placement(tally, ranks),
        "against": None if other is None else drift(tally, _router_change(decoder, other)),
    }
    if against is not None:
        report["against"]["model"] = against_name or against.name
    report["verdict"] = verdict(report)
    contents = {"report.json": json_text(report) + "\n", "report.html": page(report)}
    for file_name, ours in _OURS.items():
        write_file(out / file_name, contents[file_name], ours=ours)
    return report


def _check_out(out: Path) -> None:
    make_directory(out)
    for file_name, ours in _OURS.items():
        check_target(out / file_name, ours)


def _load(checkpoint: Checkpoint, config: InspectConfig) -> Decoder:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if checkpoint.dtype == "bfloat16" else torch.float32
    ops = select_ops(device, dtype, config.threads)
    return load_decoder(checkpoint, dtype, device, ops)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_other(
    mine: Checkpoint, directory: Path, rows: Rows, tokenizer: Tokenizer, config: InspectConfig
) -> Decoder:
    """A second checkpoint, which must have the first one's shape and give its text the same
    tokens."""
    other = open_checkpoint(directory)
    for field in ("num_layers", "hidden_size", "vocab_size", "feed_forward"):
        here, there = getattr(mine.config, field), getattr(other.config, field)
        shown = (
            f", {field} {there} and not {here}"
            if isinstance(here, int)
            else " in its experts or routers"
        )
        require(here == there, f"--against {directory}: the model has another shape{shown}")
    sample = tokenizer.decode(rows.tokens_N[: rows.length].tolist())
    same = Tokenizer.load(directory).encode_ordinary(sample) == tokenizer.encode_ordinary(sample)
    require(same, f"--against {directory}: its tokenizer gives the text other tokens")
    return _load(other, config)


def _router_change(decoder: Decoder, other: Decoder) -> Tensor:
    """|W - W'| / |W'| of each router's weight, Frobenius norms (M,)."""
    pairs = zip(routers(decoder).values(), routers(other).values(), strict=True)
    return torch.stack(
        [(a.weight.float() - b.weight.float()).norm() / b.weight.float().norm() for a, b in pairs]
    )


def _tint(lift: float) -> Markup:
    """Class and strength of a cell's colour: none at 1, full at a quarter and at four times."""
    strength = min(1.0, abs(math.log2(max(lift, 1e-6))) / 2)
    return Markup(f'class="{"over" if lift > 1 else "under"}" style="--p:{100 * strength:.0f}%"')


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to at most `top`, 3 to 6 of them."""
    unit = 10.0 ** math.floor(math.log10(top))
    step = next(s for s in (2 * unit, unit, unit / 2, unit / 5, unit / 10) if top / s >= 2.5)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def _largest_maps(maps: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which layers' maps to draw, in order: as many as a page can hold, those with most to see
    first."""
    room = max(1, _CELLS // len(maps[0]["lift"]) ** 2)
    return sorted(sorted(range(len(maps)), key=lambda m: -maps[m]["spread"])[:room])


def _render(template: str, report: Mapping[str, Any], *, escape: bool) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=escape, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "visible": lambda text: text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·"),
        "tint": _tint,
        "ticks": _ticks,
        "largest_maps": _largest_maps,
        # Eight ranks are a usual machine.
        "usual": lambda rows: min(rows, key=lambda row: abs(row["ranks"] - 8)),
        "plain": lambda number: f"{number:g}",
        "times": lambda number, factor: number * factor,
        "tail": lambda text, length: text if len(text) <= length else "…" + text[1 - length :],
    }
    return environment.get_template(template).render(report)


def verdict(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The findings in order: `state` is good, fair, poor or note, `text` a sentence or two."""
    lines = _render("verdict.j2", report, escape=False).splitlines()
    return [dict(zip(("state", "text"), line.split(" ", 1), strict=True)) for line in lines if line]


def page(report: Mapping[str, Any]) -> str:
    """One HTML file, which loads nothing, of what report.json holds."""
    return _render("report.html.j2", report, escape=True)
