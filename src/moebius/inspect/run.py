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

from moebius.errors import ConfigError
from moebius.files import begins_with, check_target, json_text, make_directory, signed, write_file
from moebius.inspect.collect import Tally, collect, routers
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
from moebius.progress import Progress, bytes_bar, silent
from moebius.quantize.cached import Quantized
from moebius.text import Tokenizer, load_text

# More cells than these make a page that a browser is slow to show.
_CELLS = 24_000
# By what earlier reports are known, which may be replaced.
_OURS = {
    "report.json": begins_with(b'{"model": {"name": '),
    "report.html": signed(b'<meta name="generator" content="Moebius">'),
}


def write_report(
    path: Path,
    documents: Iterable[Document],
    out: Path,
    config: InspectConfig | None = None,
    *,
    name: str | None = None,
    other_tokenizer: Path | None = None,
    against: Path | None = None,
    against_name: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run documents through the model at `path`; write report.html and report.json to `out`.

    other_tokenizer: where one is that is used instead of the model's. `against` is another
    checkpoint of the same shape, run on the same tokens; names are what the report calls the two.
    Returns what report.json holds. Raises UsageError for a dense model, for text that is none, and
    for checkpoints that do not fit together; NumericalError for a router that gives no numbers;
    StorageError where `out` cannot be written.
    """
    config = config or InspectConfig()
    _check_out(out)
    checkpoint = open_checkpoint(path)
    tokenizer = load_text(path, other_tokenizer).tokenizer
    decoder = _load(checkpoint, config)
    layers = routers(decoder)
    # Asked for first: numbers of ranks that do not fit are refused before anything runs.
    ranks = config.ranks_for(next(iter(layers.values())).config.num_experts)
    length = min(config.row_length, checkpoint.config.context)
    rows = make_rows(documents, tokenizer, length, config.max_tokens)
    if int(rows.tokens_N.max()) >= checkpoint.config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives ids beyond the model's {checkpoint.config.vocab_size}: it is "
            "another model's"
        )
    other = None if against is None else _load_other(checkpoint, against, rows, tokenizer, config)
    # The kernels have a pool of their own; a second one that spins beside it costs both dearly on
    # few cores.
    threads = config.threads or default_threads()
    with TorchThreads(1 if decoder.ops.own_threads else threads):
        tally = collect(decoder, rows, config.step_tokens, other, progress)
    check_finite(tally, list(layers))
    report = _facts(decoder, tally, name or path.name)
    report |= _findings(tally, list(layers), tokenizer, config.capacity_factor, ranks)
    report["against"] = None
    if other is not None and against is not None:
        report["against"] = drift(tally, _router_change(decoder, other))
        report["against"]["model"] = against_name or against.name
    report["verdict"] = verdict(report)
    contents = {"report.json": json_text(report) + "\n", "report.html": page(report)}
    for file_name, ours in _OURS.items():
        write_file(out / file_name, contents[file_name], ours=ours)
    return report


def _facts(decoder: Decoder, tally: Tally, name: str) -> dict[str, Any]:
    """The report's beginning: which model ran which text, and how."""
    model = decoder.config
    router = tally.router
    tokens = int(tally.counts_SME[0][0].sum()) // router.top_k
    return {
        "model": {"name": name, "type": model.model_type, "layers": model.num_layers},
        "run": {
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "backend": decoder.ops.name,
            "steps": len(tally.counts_SME),
        },
        "router": asdict(router) | {"greatest_entropy": round(math.log(router.num_experts), 4)},
        "text": tally.rows.facts() | {"step_tokens": tokens},
    }


def _findings(
    tally: Tally,
    layers: Sequence[int],
    tokenizer: Tokenizer,
    capacity_factors: Sequence[float],
    ranks: Sequence[int],
) -> dict[str, Any]:
    """What the routers did, in all the ways that the report shows."""
    floor = max_violation_floor(tally.seen, tally.router.num_experts, tally.router.top_k)
    return {
        "limits": {"even": 0.5, "uneven": 1.0},
        "floor": round(floor, 4),
        "capacity_factors": list(capacity_factors),
        "layers": layer_figures(tally, layers, capacity_factors),
        "coactivation": together(tally),
        "tastes": [tastes(tally, tokenizer, m) for m in range(len(layers))],
        "distinct": distinct(tally),
        "placement": placement(tally, ranks),
    }


def _check_out(out: Path) -> None:
    make_directory(out)
    for file_name, ours in _OURS.items():
        check_target(out / file_name, ours)


def _load(checkpoint: Checkpoint, config: InspectConfig) -> Decoder:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if checkpoint.dtype == "bfloat16" else torch.float32
    ops = select_ops(device, dtype, config.threads)
    quantized = Quantized.by_name(checkpoint, config.quantization)
    if quantized is not None:
        quantized.make(bytes_bar)
        checkpoint = quantized.checkpoint
    return load_decoder(checkpoint, dtype, device, ops)


def _load_other(
    mine: Checkpoint, directory: Path, rows: Rows, tokenizer: Tokenizer, config: InspectConfig
) -> Decoder:
    """A second checkpoint, of the first one's shape, whose tokenizer gives the same tokens."""
    other = open_checkpoint(directory)
    for field in ("num_layers", "hidden_size", "vocab_size", "feed_forward"):
        here = getattr(mine.config, field)
        there = getattr(other.config, field)
        if here != there:
            difference = " in its experts or routers"
            if isinstance(here, int):
                difference = f", {field} {there} and not {here}"
            raise ConfigError(f"--against {directory}: the model has another shape{difference}")
    sample = tokenizer.decode(rows.tokens_N[: rows.length].tolist())
    theirs = load_text(directory).tokenizer.encode_ordinary(sample)
    if theirs != tokenizer.encode_ordinary(sample):
        raise ConfigError(f"--against {directory}: its tokenizer gives the text other tokens")
    return _load(other, config)


def _router_change(decoder: Decoder, other: Decoder) -> Tensor:
    """|W - W'| / |W'| of each router's weight, Frobenius norms (M,)."""
    changes = []
    for mine, theirs in zip(routers(decoder).values(), routers(other).values(), strict=True):
        before = theirs.weight.float()
        changes.append((mine.weight.float() - before).norm() / before.norm())
    return torch.stack(changes)


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
    """Which layers' maps to draw, in order: those with most to see, as many as a page holds."""
    room = max(1, _CELLS // len(maps[0]["lift"]) ** 2)
    by_spread = sorted(range(len(maps)), key=lambda m: -maps[m]["spread"])
    return sorted(by_spread[:room])


def _visible(text: str) -> str:
    """Text in which spaces, tabs and line ends can be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def _tail(text: str, length: int) -> str:
    """A text's last `length` characters, the first of them an ellipsis where it has more."""
    if len(text) <= length:
        return text
    return "…" + text[1 - length :]


def _usual(placements: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one for a number of ranks that comes closest to eight, a usual machine's."""
    return min(placements, key=lambda one: abs(one["ranks"] - 8))


def _render(template: str, report: Mapping[str, Any], *, escape: bool) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=escape, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "visible": _visible,
        "tint": _tint,
        "ticks": _ticks,
        "largest_maps": _largest_maps,
        "usual": _usual,
        "plain": lambda number: f"{number:g}",
        "times": lambda number, factor: number * factor,
        "tail": _tail,
    }
    return environment.get_template(template).render(report)


def verdict(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The findings in order: `state` is good, fair, poor or note, `text` a sentence or two."""
    lines = _render("verdict.j2", report, escape=False).splitlines()
    findings = []
    for line in filter(None, lines):
        state, text = line.split(" ", 1)
        findings.append({"state": state, "text": text})
    return findings


def page(report: Mapping[str, Any]) -> str:
    """One HTML file, which loads nothing, of what report.json holds."""
    return _render("report.html.j2", report, escape=True)
