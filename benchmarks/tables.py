"""Makes the tables and the chart of the documentation from the records that are committed here.

    .venv/bin/python benchmarks/tables.py            # rewrite what lies between the marks of PAGES,
                                                     and the chart
    .venv/bin/python benchmarks/tables.py --check    # exit code 1 where a page is not what the
                                                     records say

A page holds `<!-- made by benchmarks/tables.py: NAME -->` above and `<!-- end -->` below what is
made.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Behind all other paths: files here have the names of packages elsewhere.
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "peers"))

import beside
import torch
from beside import Comparison, number

from claims.report import ROWS, read, runs_table, verdict
from moebius.files import anyone, write_file
from moebius.models.family import model_config
from moebius.models.layout import Layout, sources

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/claims.md", "docs/models.md")
CHART = ROOT / "docs" / "beside.svg"
# The record with most engines on all workloads, which the chart shows.
CHART_RECORD = "avx512/m1.json"
_MARK = re.compile(
    r"(<!-- made by benchmarks/tables\.py: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL
)

ZEN4 = "AMD EPYC (Zen 4), 2 cores"
ZEN3 = "AMD EPYC (Zen 3), 2 cores"


class Source(NamedTuple):
    """What a record does not say of itself: where and when it was made, and the command that
    repeats it."""

    file: str
    machine: str
    date: str
    command: str

    def read(self) -> Any:
        return json.loads((HERE / self.file).read_text(encoding="utf-8"))

    @property
    def generation(self) -> str:
        """`Zen 4`."""
        return self.machine.partition("(")[2].partition(")")[0]

    @property
    def link(self) -> str:
        return f"[{self.file}](../benchmarks/{self.file})"


PYTHON = ".venv/bin/python"
CONVERSED = "2026-11-29"
COLD_STARTS = (
    Source("cold_start.json", ZEN4, "2026-11-28", f"{PYTHON} benchmarks/cold_start.py --runs 7"),
    Source(
        "cold_start_m2.json",
        ZEN4,
        "2026-11-28",
        f"{PYTHON} benchmarks/cold_start.py --runs 7 --model $PEERS/models/m2",
    ),
)
OVERHEADS = (
    Source("step_overhead.json", ZEN4, "2026-11-28", f"{PYTHON} benchmarks/step_overhead.py"),
    Source(
        "step_overhead_m1.json",
        ZEN4,
        "2026-11-28",
        f"{PYTHON} benchmarks/step_overhead.py --model $PEERS/models/m1 --sequences 1 32",
    ),
)
OPERATIONS = (
    Source("ops.json", ZEN4, "2026-11-26", f"{PYTHON} benchmarks/ops.py --isa all"),
    Source("ops_avx2.json", ZEN3, "2026-11-26", f"{PYTHON} benchmarks/ops.py"),
)
SCHEDULES = (
    Source(
        "one_answer.json",
        ZEN4,
        "2026-11-28",
        f"{PYTHON} benchmarks/one_answer.py --seed 52",
    ),
    Source(
        "one_answer_quantised.json",
        ZEN4,
        "2026-11-28",
        f"{PYTHON} benchmarks/one_answer.py --quantised --seed 16 --seconds 2300",
    ),
    Source(
        "one_answer_ranks.json",
        ZEN4,
        "2026-11-29",
        f"{PYTHON} benchmarks/one_answer.py --ranks 1 2 3 4 --seed 77 --seconds 1500",
    ),
    Source(
        "one_answer_avx2.json", ZEN3, "2026-11-25", f"{PYTHON} benchmarks/one_answer.py --seed 41"
    ),
)
QUALITIES = (
    Source(
        "quality_blocks.json",
        ZEN4,
        "2026-11-28",
        f"{PYTHON} benchmarks/quality.py --model DIR --llama BUILD/bin",
    ),
    Source(
        "quality_bundled.json",
        ZEN4,
        "2026-11-28",
        f"{PYTHON} benchmarks/quality.py --llama BUILD/bin",
    ),
)
FILE_QUALITY = Source(
    "file_quality.json",
    ZEN4,
    "2026-11-28",
    f"{PYTHON} benchmarks/file_quality.py FILE.gguf --llama BUILD/bin",
)
SAMPLING = Source("sampling.json", ZEN4, "2026-11-28", f"{PYTHON} benchmarks/sampling.py")
BODIES = Source("worst_bodies.json", ZEN4, "2026-11-28", f"{PYTHON} benchmarks/worst_bodies.py")
# Of each machine that was quiet enough for it.
EXPERT_PARALLEL = (
    Source(
        "expert_parallel.json",
        ZEN4,
        "2026-11-29",
        f"{PYTHON} benchmarks/expert_parallel.py --models m1 --rounds 2",
    ),
    Source(
        "expert_parallel_m2.json",
        ZEN4,
        "2026-11-28",
        f"{PYTHON} benchmarks/expert_parallel.py --models m2 --rounds 2 --requests 32",
    ),
)
EXCHANGES = Source(
    "exchange.json", ZEN4, "2026-11-28", f"chrt -r 10 {PYTHON} benchmarks/exchange.py"
)
PLACEMENTS = Source(
    "placement.json",
    ZEN4,
    "2026-11-28",
    f"{PYTHON} benchmarks/placement.py --out benchmarks/placement.json",
)
RECOVERIES = (
    Source("recovery.json", ZEN4, "2026-11-28", f"{PYTHON} benchmarks/recovery.py --kills 50"),
    Source(
        "recovery_hosts.json",
        ZEN4,
        "2026-11-29",
        f"{PYTHON} benchmarks/recovery.py --hosts 2 --ranks 3",
    ),
)
ABLATION = Source(
    "ablate.json",
    f"{ZEN3}, AVX2",
    "2026-11-26",
    ".venv/bin/python benchmarks/ablate.py --rounds 3 --threads 2",
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """Markdown; the columns numbered in `words` hold words, the others figures."""
    rule = ["---" if i in words else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def provenance(source: Source) -> str:
    return f"{source.machine}, {source.date}. Record: {source.link}. Command: `{source.command}`"


def beside_others(name: str) -> str:
    """One machine's tables: speed, start and memory, older records, and how each record was
    made."""
    found = beside.records(name)
    newest, older = beside.latest(
        one for source, record in found.items() for one in beside.comparisons(source, record)
    )
    current = {one.source: found[one.source] for one in newest}
    first = next(iter(current.values()))
    parts = [f"{beside.machine(name, first)}.", _speeds(newest)]
    parts += [
        "Start and memory, over these runs the shortest and the largest:",
        table(*beside.process_rows(list(current.values()))),
    ]
    if older:
        parts.append("Earlier runs, with the kernels of their day and more of the other engines:")
        parts.append(_speeds(older))
    parts.append("How each record was made, and the machine's ceilings in that run:")
    rows = [_run_row(source, record) for source, record in found.items()]
    head = [
        "record",
        "read loop, GB/s",
        "mapped file, GB/s",
        "bfloat16 product, GFLOP/s",
        "command",
    ]
    parts.append(table(head, rows, (0, 4)))
    return "\n\n".join(parts)


def quantised() -> str:
    """GGUF files beside llama.cpp: its server, asked as ours is, and its bare loop; OpenVINO's
    exports of as many bits where they ran."""
    bare = json.loads((HERE / "peers" / "quantised" / "llama_bench.json").read_text())
    speeds = bare["tokens_per_second"]
    loops = {("w1", "decode_tps"): "tg128", ("w4", "prefill_tps"): "pp2048"}
    servers = ("llama.cpp", "openvino")
    found: dict[str, list[beside.Comparison]] = {}
    for source, record in beside.records("quantised").items():
        of_type = found.setdefault(record["settings"]["weights"], [])
        of_type += beside.comparisons(source, record)
    rows = []
    for weights in sorted(found):
        newest, _ = beside.latest(found[weights])
        for one in newest:
            loop = loops.get((one.workload, one.measure), "")
            other = speeds.get(f"{one.model}-{weights}", {}).get(loop)
            ours = one.values["moebius"]
            row = [f"{weights.upper()}: {one.label}", number(ours)]
            row += [number(one.values[key]) if key in one.values else "" for key in servers]
            row += [one.spread, "" if other is None else number(other)]
            rows.append([*row, "" if other is None else f"{ours / other:.2f} ×"])
    commands = [
        f"`{beside.command(record['settings'])}`" for record in beside.records("quantised").values()
    ]
    head = ["", "Moebius", "llama-server", "OpenVINO", "to the best server", "llama-bench", "to it"]
    said = f"{ZEN4}, {bare['started']}. Commands: {'; '.join(commands)}; `{bare['command']}`."
    return f"{table(head, rows)}\n\n{said}"


def conversations() -> str:
    """Ten turns about a document, here and in llama.cpp's server."""
    kinds = {"keeps": "as they were", "drops": "without their thinking"}
    rows = []
    commands = []
    for path in sorted((HERE / "peers" / "conversation").glob("*.json")):
        record = json.loads(path.read_text())
        commands.append(
            f"`{PYTHON} benchmarks/peers/conversation.py --model {record['model']} --weights "
            f"{record['weights']}`"
        )
        for kind, engines in record["turns"].items():
            later = {
                name: statistics.median(turn["first_s"] for turn in turns[1:])
                for name, turns in engines.items()
            }
            for name, turns in engines.items():
                computed = [turn["computed"] for turn in turns[1:]]
                times = later[name] / later["moebius"]
                rows.append(
                    [
                        beside.MODELS[record["model"]],
                        kinds[kind],
                        beside.ENGINES[name],
                        number(turns[0]["first_s"]),
                        number(later[name]),
                        " to ".join(f"{n:,}" for n in sorted({min(computed), max(computed)})),
                        "" if name == "moebius" else f"{times:.1f} ×",
                    ]
                )
    head = ["", "answers stand in the next prompt", "", "first turn, s", "turns 2 to 10, s"]
    made = table([*head, "tokens of a prompt computed", "of Moebius's time"], rows, (0, 1, 2))
    return f"{made}\n\n{ZEN4}, {CONVERSED}. Commands: {'; '.join(commands)}."


def qualities() -> str:
    """A table for each model: what a format costs, here and in llama.cpp, of the same file."""
    parts = []
    for source in QUALITIES:
        record = source.read()
        first = record["plain"][0]
        rows = []
        for each in record["plain"]:
            row = [each["label"], "", "", *_moved(each, first), _divergence(each), "", ""]
            rows.append([*row, f"{each['same_choice']:.1%}"])
        for each in record["formats"]:
            served = each["moebius"]
            exact = each["moebius, float32"]
            other = each["llama.cpp"]
            row = [each["format"].upper(), each["quantised_by"]]
            row += [f"{served['weight_bytes'] / 1e6:.1f}", *_moved(served, first)]
            row += [_divergence(served), _divergence(exact), _divergence(other)]
            rows.append([*row, f"{served['same_choice']:.1%} / {other['same_choice']:.1%}"])
        said = f"{record['tokens']:,} tokens, {record['bytes']:,} bytes. {provenance(source)}"
        parts.append(f"{table(_QUALITY_HEAD, rows, (0, 1))}\n\n{said}")
    return "\n\n".join(parts)


_QUALITY_HEAD = [
    "",
    "quantised by",
    "MB",
    "bits a byte",
    "more",
    "divergence, as served",
    "in float32",
    "llama.cpp",
    "same choice, as served / llama.cpp",
]


def _moved(each: dict[str, Any], first: dict[str, Any]) -> list[str]:
    bits = each["bits_per_byte"]
    return [f"{bits:.4f}", f"{bits / first['bits_per_byte'] - 1:+.3%}"]


def _divergence(each: dict[str, Any]) -> str:
    return f"{each['mean_divergence']:.6f}"


def file_quality() -> str:
    """A file that people have, beside llama.cpp, from the file widened to float32."""
    record = FILE_QUALITY.read()
    answers = {each["label"]: each for each in record["answers"]}
    some = {each["label"]: each for each in record["answers_read_by_llama"]}
    rows = []
    for label, each in record["documents"]["engines"].items():
        row = [label, _divergence(each), f"{each['error']:.6f}", f"{each['same_choice']:.2%}"]
        row += [_divergence(answers[label]) if label in answers else "", _divergence(some[label])]
        greedy = record["greedy"].get(label)
        row.append(f"{greedy['equal']} of {greedy['answers']}" if greedy else "")
        rows.append([*row, _parted(greedy) if greedy else ""])
    head = [
        "",
        "documents",
        "standard error",
        "same choice",
        "answers",
        "answers that llama.cpp read",
    ]
    head += ["answers equal to llama.cpp's", "of the others"]
    said = (
        f"{record['file']}: {record['documents']['tokens']:,} tokens of documents, "
        f"{record['answers'][0]['tokens']:,} of {record['prompts']} answers, "
        f"{record['answers_read_by_llama'][0]['tokens']:,} of those that llama-server read. "
        f"Template equal for {record['same_template']}, token ids for {record['same_ids']} of "
        f"{record['prompts']} conversations. {provenance(FILE_QUALITY)}"
    )
    return f"{table(head, rows, (0, 7))}\n\n{said}"


def _parted(greedy: dict[str, Any]) -> str:
    """Where answers parted, by the baseline's gap between the two tokens."""
    parted = greedy["parted"]
    if not parted:
        return ""
    widest = greedy["widest_gap_in_rms"]
    return f"{greedy['near']} of {len(parted)} near ties, widest gap {widest:.2f}"


def _speeds(found: Sequence[Comparison]) -> str:
    return _with_words_around(*beside.speed_rows(found))


def _with_words_around(head: list[str], rows: list[list[str]]) -> str:
    return table(head, rows, (0, len(head) - 1))


def _run_row(source: str, record: dict[str, Any]) -> list[str]:
    ceilings = beside.ceilings(record)
    speeds = [number(ceilings[key]) for key in ("anonymous_gbs", "mapped_gbs", "matrix_gflops")]
    link = f"[{source}](../benchmarks/peers/{source})"
    return [link, *speeds, f"`{beside.command(record['settings'])}`"]


def cold_starts() -> str:
    names = {
        "generate": "`moebius generate`, one token",
        "serve": "`moebius serve`, first streamed chunk",
    }
    rows = []
    for source in COLD_STARTS:
        record = source.read()
        for key, what in names.items():
            span = f"{record[key]['min']:.2f} to {record[key]['max']:.2f}"
            rows.append([_model(record["model"]), what, f"{record[key]['median']:.2f}", span])
    return table(["model", "", "median, s", "range"], rows, (0, 1)) + "\n\n" + _notes(COLD_STARTS)


def _model(name: str) -> str:
    return beside.MODELS.get(name, "the bundled model")


def step_overhead() -> str:
    rows = []
    for source in OVERHEADS:
        record = source.read()
        for step in record["steps"]:
            row = [_model(record["model"]), str(step["sequences"]), f"{step['step_ms']:.1f}"]
            row += [f"{step['python_ms']:.2f}", f"{step['share']:.1%}"]
            rows.append(row)
    head = ["model", "sequences", "step, ms", "of it Python, ms", "share"]
    return table(head, rows) + "\n\n" + _notes(OVERHEADS)


def _notes(sources: Sequence[Source]) -> str:
    return "\n".join(f"- {provenance(source)}" for source in sources)


def sampling() -> str:
    record = SAMPLING.read()
    rows = [
        [batch, f"{milliseconds:.2f}"] for batch, milliseconds in record["milliseconds"].items()
    ]
    size = f"Vocabulary of {record['vocab']:,}, {record['threads']} threads."
    return table(["rows in the step", "ms"], rows) + f"\n\n{size} {provenance(SAMPLING)}"


def operations() -> str:
    """A row an operation, a column an instruction set: the share of the roofline, and what was
    reached."""
    names: dict[str, None] = {}
    columns: dict[str, dict[str, str]] = {}
    for source in OPERATIONS:
        for row in source.read()["rows"]:
            if row["kernels"] == "torch":
                continue
            names[row["operation"]] = None
            column = f"{row['kernels'].removeprefix('cpu-')}, {source.generation}"
            columns.setdefault(column, {})[row["operation"]] = _reached(row)
    rows = [[f"`{name}`", *(column[name] for column in columns.values())] for name in names]
    return table(["", *columns], rows) + "\n\n" + _operation_notes()


def _reached(row: dict[str, Any]) -> str:
    """`98% (33.8 GB/s)`: the figure of what bounds the operation."""
    speed = f"{row['gbs']:.1f} GB/s"
    if row["gflops"] > 4 * row["gbs"]:
        speed = f"{row['gflops']:.0f} GFLOP/s"
    return f"{row['of_floor']:.0%} ({speed})"


def _operation_notes() -> str:
    notes = []
    for source in OPERATIONS:
        record = source.read()
        found = (
            f"{record['bandwidth_gbs']} GB/s and {record['matrix_gflops']} GFLOP/s, "
            f"{record['threads']} threads"
        )
        notes.append(f"- Ceilings {found}; {provenance(source)}")
    return "\n".join(notes)


def price_of_invariance() -> str:
    """Our product, whose order of additions is fixed, beside torch's, which chooses by the number
    of rows."""
    rows = []
    for source in OPERATIONS:
        record = {(row["operation"], row["kernels"]): row for row in source.read()["rows"]}
        best = [kernels for _, kernels in record if kernels != "torch"][-1]
        for (name, kernels), theirs in record.items():
            if kernels == "torch":
                shape, dtype = name.removeprefix("torch's ").split(", torch.")
                ours = record[shape, best]
                unit = "gbs" if shape.startswith("linear 1 x") else "gflops"
                values = [f"{row[unit]:.1f}" for row in (ours, theirs)]
                label = f"`{shape}`, {'GB/s' if unit == 'gbs' else 'GFLOP/s'}"
                rows.append([source.machine, label, *values, f"torch in {dtype}"])
    return table(["machine", "", "Moebius, bfloat16", "torch", ""], rows, (0, 1, 4))


def schedules() -> str:
    fields = ("schedules", "answers", "tokens", "preemptions", "prefix_hit_tokens")
    rows = []
    for source in SCHEDULES:
        record = source.read()
        found = "none" if record["different"] is None else str(record["different"])
        row = [
            record["kernels"],
            record.get("weights", "plain") + (", on 1 to 4 ranks" if "ranks" in record else ""),
            *(f"{record[name]:,}" for name in fields),
            found,
            f"{record['seconds']:,}",
        ]
        rows.append([*row, f"{source.date}, `{source.command}`"])
    head = [
        "kernels",
        "weights",
        "schedules",
        "answers",
        "tokens",
        "preemptions",
        "tokens from the prefix cache",
    ]
    return table([*head, "answers that differ", "s", "date, command"], rows, (0, 1, 9))


def bodies() -> str:
    """The kinds of bodies beside which a stream waited longest, and those beside which it waited
    for nothing."""
    record = BODIES.read()
    kinds = record["kinds_ms"]
    worst = sorted(kinds, key=lambda kind: -kind["pause"])[:8]
    nothing = [kind for kind in kinds if kind["kind"] == "nothing"]
    rows = []
    for kind in worst + nothing:
        times = [f"{kind[key]:.1f}" for key in ("pause", "health", "answer")]
        rows.append([kind["kind"], f"{kind['bytes'] / 1e6:.2f}", *times])
    head = [
        "body",
        "MB",
        "longest pause of a stream, ms",
        "slowest `/health/live`, ms",
        "the body's own answer, ms",
    ]
    slowest = record["slowest_ms"]
    said = (
        f"{len(kinds) - 1} kinds, {record['rounds']} rounds, medians; the 8 worst and an idle "
        f"server. Longest pause of all: {slowest['pause']} ms; slowest `/health/live`: "
        f"{slowest['health']} ms."
    )
    return f"{said}\n\n{table(head, rows)}\n\n{provenance(BODIES)}"


def ablation() -> str:
    runs = [value for value in ABLATION.read().values() if _is_run(value)]
    full = runs[0]["output_throughput"]
    head = ["engine", "tokens/s", "× full", "TTFT, ms", "ITL, ms", "whole request, s", "running"]
    head += ["KV held, MiB", "filled", "weights, MiB", "same answers"]
    rows = [_ablation_row(run, full) for run in runs]
    return f"{table(head, rows)}\n\n{provenance(ABLATION)}"


def expert_parallel() -> str:
    """Ranks of one machine beside one process on the same cores; how busy it was is said."""
    parts = []
    for source in EXPERT_PARALLEL:
        record = source.read()
        rows = []
        for one in record["results"]:
            ratio, low, high = one["against"]
            row = [_model(one["model"]), one["workload"].upper(), one["group"]]
            row += [f"{one['speed']:,.1f}", f"{ratio:.0%} ({low:.0%} to {high:.0%})"]
            row += [f"{one['exchange_share']:.0%}", f"{one['waited_share']:.0%}"]
            row += [number(one["layer_us"]), number(one["moved_us"])]
            rows.append([*row, f"{one['bytes_a_token']:,.0f}", f"{one['memory_gb']:.2f}"])
        loads = " to ".join(f"{load:g}" for load in record["load"])
        said = f"{record['processors']:g} processors, load {loads}, {record['rounds']} rounds."
        parts.append(f"{table(_EXPERT_HEAD, rows, (0, 1, 2))}\n\n{said} {provenance(source)}")
    return "\n\n".join(parts)


_EXPERT_HEAD = [
    "model",
    "",
    "",
    "tokens/s",
    "of one process, 2 threads",
    "of the step in calls to others",
    "of the step waiting for others",
    "a layer, µs",
    "without waiting, µs",
    "bytes a token",
    "GB of a rank",
]


def exchanges() -> str:
    head = ["through", "ranks", "tokens", "median, µs", "fastest, µs", "KiB out of rank 0"]
    rows = [
        [
            one["kind"],
            str(one["ranks"]),
            one["load"],
            number(one["median"]),
            number(one["fastest"]),
            number(one["bytes_out"] / 1024),
        ]
        for one in EXCHANGES.read()["results"]
    ]
    return f"{table(head, rows, (0, 2))}\n\n{provenance(EXCHANGES)}"


def placements() -> str:
    """The worst layer's imbalance, before and after."""
    head = ["ranks", "spare experts a rank", "in order", "balanced"]
    rows = [
        [
            str(one["ranks"]),
            str(one["spare_experts"]),
            f"{one['worst_before']:.2f}",
            f"{one['worst_after']:.2f}",
        ]
        for one in PLACEMENTS.read()["placements"]
    ]
    return f"{table(head, rows, ())}\n\n{provenance(PLACEMENTS)}"


def recoveries() -> str:
    """What losses cost; how busy the machine was is said."""
    parts = []
    for source in RECOVERIES:
        rows = []
        for run in source.read()["runs"]:
            hosts = run.get("hosts", 1)
            where = f"{run['ranks']} on {hosts} hosts" if hosts > 1 else str(run["ranks"])
            answers = f"{run['different']} of {run['answers']:,}"
            for what in ("SIGKILL", "SIGSTOP", "cut"):
                if what not in run:
                    continue
                ready = run[what]["ready"]
                ended = run[what]["ended"]
                row = [where, what, str(run[what]["times"])]
                row += [f"{ready['median']:.1f} / {ready['worst']:.1f}"]
                row += [f"{ended['median']:.1f} / {ended['worst']:.1f}"]
                rows.append([*row, f"{run['load']:g}", answers])
        head = ["ranks", "lost by", "times", "ready again, s", "all answered, s", "load"]
        head += ["answers that differ"]
        parts.append(f"{table(head, rows, (0, 1))}\n\n{provenance(source)}")
    return "\n\n".join(parts)


def _is_run(value: Any) -> bool:
    return isinstance(value, dict) and "output_throughput" in value


def _ablation_row(run: dict[str, Any], full: float) -> list[str]:
    """An engine's figures; latencies as `median / 99th percentile`."""
    speed = run["output_throughput"]
    row = [run["name"], f"{speed:,.0f}", f"{speed / full:.2f}"]
    for key in ("ttft", "itl"):
        row.append(f"{number(run[f'median_{key}_ms'])} / {number(run[f'p99_{key}_ms'])}")
    row.append(f"{run['median_e2el_ms'] / 1000:.2f} / {run['p99_e2el_ms'] / 1000:.2f}")
    row += [str(run["most_running"]), f"{run['kv_held'] / 2**20:.1f}", f"{run['fill']:.0%}"]
    row.append(f"{run['weights'] / 2**20:.1f}")
    row.append("another model" if run["same"] is None else f"{run['same']} of {run['completed']}")
    return row


def claims() -> str:
    """Verdicts first, then the figures of each seed that they rest on."""
    results = read(HERE / "claims" / "runs")
    found = [(row, verdict(row, results)) for row in ROWS]
    verdicts = [[row.number, row.claim, row.mark, word] for row, (word, _) in found]
    measured = [[row.number, row.claim, figures] for row, (_, figures) in found]
    first = table(["#", "claim", "confirmed if", "verdict"], verdicts, range(4))
    second = table(["#", "claim", "measured, a value a seed"], measured, range(3))
    return f"{first}\n\nThe figures behind each verdict:\n\n{second}"


def claim_runs() -> str:
    return runs_table(read(HERE / "claims" / "runs"))


def headline() -> str:
    """The README's one table: each figure with its day and the command that repeats it."""
    found = beside.records("avx512")
    newest, _ = beside.latest(
        one for source, record in found.items() for one in beside.comparisons(source, record)
    )
    speeds = [one for one in newest if one.measure != beside.TTFT]
    speeds.sort(key=lambda one: (list(beside.MODELS).index(one.model), one.source))
    rows = []
    for one in speeds:
        ours = f"**{number(one.values['moebius'])}**"
        best = f"{beside.ENGINES[one.best]} {number(one.values[one.best])}"
        command = beside.command(found[one.source]["settings"])
        rows.append([one.label, ours, best, one.spread, one.started[:10], f"`{command}`"])
    rows += [
        *_start_figures(),
        _python_figure(),
        _pause_figure(),
        _schedules_figure(),
    ]
    head = ["what", "Moebius", "fastest other engine", "ratio", "day", "command"]
    return table(head, _said_once(rows), range(6))


def _said_once(rows: list[list[str]]) -> list[list[str]]:
    """Where the last column repeats the row above it, it says so."""
    told = []
    above = ""
    for row in rows:
        command = row[-1]
        told.append([*row[:-1], "the same run" if command == above else command])
        above = command
    return told


def _own(what: str, figure: str, source: Source) -> list[str]:
    """A row of the README's table for what has no counterpart in another engine."""
    return [what, figure, "", "", source.date, f"`{source.command}`"]


def _start_figures() -> list[list[str]]:
    rows = []
    for source in COLD_STARTS:
        model = _model(source.read()["model"])
        times = source.read()["serve"]
        figure = f"**{times['median']:.1f}** ({times['min']:.1f} to {times['max']:.1f})"
        what = f"`moebius serve` {model}: process start to first streamed chunk, s"
        rows.append(_own(what, figure, source))
    return rows


def _python_figure() -> list[str]:
    source = OVERHEADS[-1]
    record = source.read()
    step = record["steps"][-1]
    what = (
        f"Python in a decoding step of {step['step_ms']:.1f} ms, {_model(record['model'])}, "
        f"{step['sequences']} sequences, ms"
    )
    return _own(what, f"**{step['python_ms']:.2f}** ({step['share']:.1%})", source)


def _pause_figure() -> list[str]:
    worst = BODIES.read()["slowest_ms"]["pause"]
    return _own("longest pause of a stream beside hostile bodies, ms", f"**{worst}**", BODIES)


def _schedules_figure() -> list[str]:
    source = SCHEDULES[0]
    record = source.read()
    different = "none" if record["different"] is None else record["different"]
    what = (
        f"answers that differ by a bit from the same request alone, of {record['answers']:,} in "
        f"{record['schedules']:,} random schedules ({source.generation})"
    )
    return _own(what, f"**{different}**", source)


# One of each size that is told apart, of those whose configurations tests have.
SHAPES = (
    "gpt-oss-20b",
    "Qwen3-30B-A3B",
    "Qwen2-57B-A14B-Instruct",
    "Qwen1.5-MoE-A2.7B",
    "dots.llm1.inst",
    "Mixtral-8x7B-v0.1",
    "OLMoE-1B-7B-0924",
    "granite-3.0-1b-a400m-instruct",
    "Llama-3.1-8B-Instruct",
    "Qwen3-0.6B",
    "SmolLM2-135M-Instruct",
)
# llama.cpp's Q4_K_M, on average.
BITS_A_WEIGHT = 4.85


def models() -> str:
    """Sizes of published models, from the shapes that their configurations give."""
    rows = []
    for name in SHAPES:
        raw = json.loads((ROOT / "tests" / "models" / "published" / f"{name}.json").read_text())
        config = model_config(raw)
        count = sum(math.prod(source.shape) for source in sources(config, Layout()))
        caches = config.caches(torch.bfloat16)
        token = sum(cache.bytes_per_token for cache in caches)
        rows.append(
            [
                name,
                raw["model_type"],
                f"{count / 1e9:.2f}",
                f"{count * BITS_A_WEIGHT / 8e9:.1f}",
                f"{token / 1024:.0f}",
            ]
        )
    head = ["", "type", "parameters, 10⁹", f"GB at {BITS_A_WEIGHT} bits", "KiB a token"]
    return table(head, rows)


PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "models": models,
    "beside-avx512": lambda: beside_others("avx512"),
    "beside-avx2": lambda: beside_others("avx2"),
    "roofline": lambda: table(*beside.in_turn_rows(), (0, 1)),
    "cold-start": cold_starts,
    "step-overhead": step_overhead,
    "sampling": sampling,
    "operations": operations,
    "invariance": price_of_invariance,
    "schedules": schedules,
    "worst-bodies": bodies,
    "ablation": ablation,
    "quantised": quantised,
    "conversations": conversations,
    "qualities": qualities,
    "file-quality": file_quality,
    "expert-parallel": expert_parallel,
    "exchanges": exchanges,
    "placements": placements,
    "recoveries": recoveries,
    "claims": claims,
    "claim-runs": claim_runs,
}


def rendered(page: str) -> str:
    """A page's text with everything between its marks made anew. KeyError for a mark that names no
    part."""
    return _MARK.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n\n{found[4]}", page)


def draw_chart() -> None:
    record = beside.records(CHART_RECORD.partition("/")[0])[CHART_RECORD]
    shown = [one for one in beside.comparisons(CHART_RECORD, record) if one.measure != beside.TTFT]
    cores = record["machine"]["cores"]
    machine = f"{cores} cores of an AMD EPYC (Zen 4)"
    title = (
        f"Tokens per second, more is better; {machine}\nM1, a Mixture of Experts of 0.49 B "
        "parameters in bfloat16"
    )
    beside.draw(shown, title, CHART)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 where a page is not up to date",
    )
    given = parser.parse_args()
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            stale.append(name)
            if not given.check:
                write_file(path, after, ours=anyone)
    if not given.check:
        draw_chart()
    print("\n".join(f"{name}: {'stale' if given.check else 'made anew'}" for name in stale))
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
