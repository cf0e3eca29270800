"""Records of run.py as tables that a stranger reads, and as the chart of the README.

benchmarks/tables.py puts them into the pages.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivers import OURS
from report import CEILINGS, HEADLINE, figures, summarize
from sizes import SIZES
from workloads import workload

Record = dict[str, Any]

HERE = Path(__file__).parent
ENGINES = {
    OURS: "Moebius",
    "llama.cpp": "llama.cpp",
    "vllm": "vLLM",
    "openvino": "OpenVINO",
    "transformers": "transformers",
}
MODELS = {
    "m1": "M1",
    "m2": "M2",
    "olmoe": "OLMoE",
    "qwen3-30b": "Qwen3-30B-A3B's sizes",
    "qwen3.5-35b-28": "Qwen3.5-35B-A3B's sizes, 28 of 40 layers",
    "gpt-oss-20b": "gpt-oss-20b's sizes",
    "glm-4.7-flash": "GLM-4.7-Flash's sizes",
}
# What a record does not say of its machine: which generation of processor it was.
MACHINES = {"avx512": "AMD EPYC (Zen 4), AVX-512 with bfloat16", "avx2": "AMD EPYC (Zen 3), AVX2"}
# Records of in_turn.py, by the folder of their machine.
IN_TURN = {
    "avx512": ("in_turn.json", "in_turn_m1_w2_w4.json", "in_turn_m2_w4.json"),
    "avx2": ("in_turn.json",),
}
TTFT = "ttft"
MEASURES = {
    ("w1", HEADLINE["w1"]): ("decode, one stream", "tokens/s"),
    ("w1", TTFT): ("time to first token, prompt of 128", "s"),
    ("w2", HEADLINE["w2"]): ("64 requests, 32 at a time", "tokens/s"),
    ("w3", HEADLINE["w3"]): ("32 requests with a common prefix of 1,024 tokens", "tokens/s"),
    ("w4", HEADLINE["w4"]): ("prefill of 2,048 tokens", "tokens/s"),
    ("w5", HEADLINE["w5"]): ("8 requests at once", "tokens/s"),
}


@dataclass(frozen=True)
class Comparison:
    """One measure of one model in one record.

    values   the median of each engine, in the measure's unit
    best     the fastest engine beside ours; `ratio` is how many times as fast as it we are, by the
             medians, and `ratios` the same for each pair of repetitions
    share    of the roofline that ours reached; None for times
    """

    source: str
    started: str
    model: str
    workload: str
    measure: str
    values: dict[str, float]
    best: str
    ratio: float
    ratios: list[float]
    share: float | None

    @property
    def subject(self) -> tuple[str, str, str]:
        return self.model, self.workload, self.measure

    @property
    def label(self) -> str:
        what, unit = MEASURES[self.workload, self.measure]
        return f"{MODELS[self.model]}, {what}, {unit}"

    @property
    def spread(self) -> str:
        """`1.26 × (1.22 to 1.29)`; `once` where there is one repetition only."""
        if len(self.ratios) == 1:
            return f"{self.ratio:.2f} × (once)"
        return f"{self.ratio:.2f} × ({min(self.ratios):.2f} to {max(self.ratios):.2f})"


def records(machine: str) -> dict[str, Record]:
    """The records of a folder beside this file, by `folder/name`; in_turn's are of another kind."""
    found = {}
    for path in sorted((HERE / machine).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "runs" in record:
            found[f"{machine}/{path.name}"] = record
    return found


def comparisons(source: str, record: Record) -> list[Comparison]:
    """All that a record compares, in the order of MODELS and MEASURES."""
    summary = summarize(record)
    found = []
    for model in MODELS:
        for name, measure in MEASURES:
            summarized = summary.get(model, {}).get(name)
            if summarized and summarized["best_peer"]:
                found.append(_comparison(source, record, model, name, measure, summarized))
    return found


def _comparison(
    source: str, record: Record, model: str, name: str, measure: str, summarized: dict[str, Any]
) -> Comparison:
    peers = {peer: row for peer, row in summarized["peers"].items() if measure in row}
    values = {peer: row[measure]["median"] for peer, row in peers.items()}
    others = {peer: value for peer, value in values.items() if peer != OURS}
    smaller_wins = measure == TTFT
    best = (min if smaller_wins else max)(others, key=others.__getitem__)
    runs = [run for run in record["runs"] if (run["model"], run["workload"]) == (model, name)]
    ours = _repetitions(runs, OURS, model, name, measure)
    theirs = _repetitions(runs, best, model, name, measure)
    ratios = [_times(a, b, smaller_wins) for a, b in zip(ours, theirs, strict=False)]
    return Comparison(
        source,
        record["started"],
        model,
        name,
        measure,
        values,
        best,
        _times(values[OURS], values[best], smaller_wins),
        ratios,
        None if smaller_wins else summarized["roofline"]["mapped"]["share"][OURS],
    )


def _times(ours: float, theirs: float, smaller_wins: bool) -> float:
    return theirs / ours if smaller_wins else ours / theirs


def _repetitions(
    runs: list[dict[str, Any]], peer: str, model: str, name: str, measure: str
) -> list[float]:
    """An engine's undisturbed repetitions in order, or all of them where none was undisturbed."""
    work = workload(name, SIZES[model].vocab, 1)
    own = [run for run in runs if run["peer"] == peer]
    counted = [run for run in own if run["clean"]] or own
    return [figures(work, run["wall"], run["first"], run["last"])[measure] for run in counted]


def latest(found: Iterable[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """The newest comparison of each subject, and the earlier ones; both in the pages' order."""
    order = {key: i for i, key in enumerate(MEASURES)}
    by_age = sorted(found, key=lambda one: one.started, reverse=True)
    ranked = sorted(
        by_age, key=lambda one: (list(MODELS).index(one.model), order[one.workload, one.measure])
    )
    newest: dict[tuple[str, str, str], Comparison] = {}
    for one in ranked:
        newest.setdefault(one.subject, one)
    return list(newest.values()), [one for one in ranked if one is not newest[one.subject]]


def number(value: float) -> str:
    """1953.2 -> 1,953; 148.53 -> 148.5; 8.384 -> 8.38; 0.06752 -> 0.068."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def speed_rows(found: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each engine's median, our ratio to the best of the others, our share of the
    roofline."""
    engines = [peer for peer in ENGINES if any(peer in one.values for one in found)]
    rows = []
    for one in found:
        speeds = [number(one.values[peer]) if peer in one.values else "" for peer in engines]
        share = "" if one.share is None else f"{one.share:.0%}"
        record = f"{one.started[:10]}, `{one.source}`"
        rows.append([one.label, *speeds, one.spread, share, record])
    head = [
        "",
        *(ENGINES[peer] for peer in engines),
        "to the best of the others",
        "of the roofline",
        "record",
    ]
    return head, rows


def process_rows(found: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the shortest start to the first token and the largest peak of memory, per
    model and engine."""
    starts = [start for record in found for start in record["starts"]]
    runs = [run for record in found for run in record["runs"]]
    engines = [peer for peer in ENGINES if any(start["peer"] == peer for start in starts)]
    rows = []
    for model, name in MODELS.items():
        started = [start for start in starts if start["model"] == model]
        if not started:
            continue
        seconds = _by_engine(started, lambda start: start["first_token_s"])
        rows.append([f"{name}, process start to first token, s", *_picked(min, seconds, engines)])
        ran = [run for run in runs if run["model"] == model]
        memory = _by_engine(ran, lambda run: run["memory"]["total"])
        rows.append([f"{name}, peak memory, GB", *_picked(max, memory, engines)])
        beyond = _by_engine(ran, lambda run: run["memory"].get("beyond"))
        label = f"{name}, of it beyond torch, weights and planned KV cache, GB"
        rows.append([label, *_picked(max, beyond, engines)])
    return ["", *(ENGINES[peer] for peer in engines)], rows


def _by_engine(
    rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]
) -> dict[str, list[float]]:
    """Each engine's values, where a row has one."""
    found: dict[str, list[float]] = {}
    for row in rows:
        measured = value(row)
        if measured is not None:
            found.setdefault(row["peer"], []).append(measured)
    return found


def _picked(
    pick: Callable[[list[float]], float], values: dict[str, list[float]], engines: list[str]
) -> list[str]:
    return [number(pick(values[peer])) if peer in values else "" for peer in engines]


def in_turn_rows() -> tuple[list[str], list[list[str]]]:
    """Head and rows, a row a machine, model and workload: over its repetitions the range of the
    ceilings, and of our shares."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for name, files in IN_TURN.items():
        for file in files:
            record = json.loads((HERE / name / file).read_text(encoding="utf-8"))
            for row in record["rows"]:
                key = (MACHINES[name], row["model"], row["workload"])
                found.setdefault(key, []).append(row)
    rows = []
    for key in sorted(found):
        where, model, work = key
        measured = found[key]
        row = [where, f"{MODELS[model]} {work.upper()}", str(len(measured))]
        for ceiling in ("anonymous_gbs", "mapped_gbs", "matrix_gflops"):
            row.append(_range([one[ceiling] for one in measured], "{:.0f}"))
        for share in ("share_anonymous", "share_mapped"):
            row.append(_range([one[share] for one in measured], "{:.0%}"))
        rows.append(row)
    head = ["machine", "", "repetitions", "read loop, GB/s", "mapped file, GB/s"]
    head += ["product, GFLOP/s", "share, read loop", "share, mapped file"]
    return head, rows


def _range(values: Sequence[float], form: str) -> str:
    """`31 to 46`, or `31` where that is all."""
    low = form.format(min(values))
    high = form.format(max(values))
    return low if low == high else f"{low} to {high}"


def command(settings: dict[str, Any]) -> str:
    """The line that repeats a run; where its figures go is left to whoever runs it."""
    words = [".venv/bin/python benchmarks/peers/run.py"]
    words += [f"--{key} {','.join(settings[key])}" for key in ("peers", "models", "workloads")]
    if settings.get("weights", "bf16") != "bf16":
        words.append(f"--weights {settings['weights']}")
    words.append(f"--reps {settings['reps']}")
    if settings["together"] != "auto":
        words.append(f"--together {settings['together']}")
    return " ".join(words)


def machine(name: str, record: Record) -> str:
    facts = record["machine"]
    gigabytes = f"{facts['memory_gb']:.0f} GB"
    return (
        f"{MACHINES.get(name, name)}; {facts['cores']} cores, {gigabytes}, Python {facts['python']}"
    )


def ceilings(record: Record) -> dict[str, float]:
    """The best passes of the whole run, of which the roofline is made."""
    return {key: max(row[key] for row in record["ceilings"]) for key in CEILINGS}


def draw(found: Sequence[Comparison], title: str, path: Path) -> None:
    """A panel a measure, a bar an engine, ours first. Text becomes outlines, so that it looks alike
    anywhere."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "moebius"  # ids of the file's parts: the same at each run
    figure = Figure(figsize=(8, 6.2), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=13)
    for axis, one in zip(figure.subplots(2, 2).flatten(), found, strict=True):
        engines = sorted(one.values, key=lambda peer: (peer != OURS, -one.values[peer]))
        values = [one.values[peer] for peer in engines]
        colors = ["#0b6e99" if peer == OURS else "#b8bfc6" for peer in engines]
        bars = axis.barh([ENGINES[peer] for peer in engines], values, color=colors)
        axis.bar_label(bars, [number(value) for value in values], padding=4, fontsize=12)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        what, _ = MEASURES[one.workload, one.measure]
        heading = textwrap.fill(f"{what[0].upper()}{what[1:]}", 34)
        axis.set_title(heading, fontsize=12, loc="left")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0, labelsize=12)
        axis.xaxis.set_visible(False)
    figure.savefig(path, metadata={"Creator": "benchmarks/tables.py", "Date": None})
