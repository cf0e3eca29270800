"""The ablation's table and chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ablation.measure import Outcome
from moebius.bench.report import chart, log_scale
from moebius.engine.plan_words import human_bytes

HEAD = (
    "engine",
    "tokens/s",
    "× full",
    "TTFT ms",
    "ITL ms",
    "E2E s",
    "running",
    "KV held",
    "filled",
    "weights",
    "same",
)
LEGEND = (
    "Output tokens/s; latencies as median / p99. Running: most sequences at once. KV held: most "
    "blocks in use between steps; filled: tokens cached over slots held, where sharing brings it "
    "above 100%. Same: answers equal to the full engine's, token for token."
)


class Panel(NamedTuple):
    """A part of the chart: a value for each variant, or a range where there are ends."""

    title: str
    values: list[float]
    ends: list[float] | None = None


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """HEAD's columns for each outcome."""
    full = outcomes[0]["output_throughput"]
    return [_row(outcome, full) for outcome in outcomes]


def _row(outcome: Outcome, full: float) -> list[str]:
    same = "other model"
    if outcome["same"] is not None:
        same = f"{outcome['same']}/{len(outcome['tokens'])}"
    return [
        outcome["name"],
        f"{outcome['output_throughput']:,.0f}",
        f"{outcome['output_throughput'] / full:.2f}",
        f"{outcome['p50_ttft_ms']:,.0f} / {outcome['p99_ttft_ms']:,.0f}",
        f"{outcome['p50_itl_ms']:,.1f} / {outcome['p99_itl_ms']:,.1f}",
        f"{outcome['p50_e2el_ms'] / 1000:.2f} / {outcome['p99_e2el_ms'] / 1000:.2f}",
        str(outcome["most_running"]),
        human_bytes(outcome["kv_held"]),
        f"{outcome['fill']:.0%}",
        human_bytes(outcome["weights"]),
        same,
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that a terminal shows aligned, its columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1])]
        padded += [cell.rjust(width) for cell, width in others]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [head, rule, *rows]))


def panels(outcomes: Sequence[Outcome]) -> list[Panel]:
    """Throughput, then latencies from median to 99th percentile."""

    def values(key: str) -> list[float]:
        return [outcome[key] for outcome in outcomes]

    latencies = {"ttft": "time to first token", "itl": "between tokens", "e2el": "end to end"}
    found = [Panel("output tokens/s", values("output_throughput"))]
    for name, text in latencies.items():
        title = f"{text}, ms: median to p99"
        found.append(Panel(title, values(f"p50_{name}_ms"), values(f"p99_{name}_ms")))
    return found


def plot(path: Path, title: str, names: Sequence[str], panels: Sequence[Panel]) -> None:
    """The panels side by side, a line for each name, the first set off.

    Values are bars; ranges lie on a logarithmic scale.
    """
    lines = range(len(names))
    colors = ["C0"] + ["0.6"] * (len(names) - 1)
    size = (4 + 3 * len(panels), 1.2 + 0.38 * len(names))
    with chart(path, title, 1, len(panels), size) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            if panel.ends is None:
                bars = axis.barh(lines, panel.values, color=colors)
                axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
                axis.margins(x=0.18)
            else:
                axis.hlines(lines, panel.values, panel.ends, color=colors, linewidth=5)
                axis.plot(panel.values, lines, "o", color="k", markersize=3)
                log_scale(axis)
            axis.set_title(panel.title, fontsize=9, loc="left")
            axis.set_yticks(lines, names if axis is axes[0] else [""] * len(names))
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.grid(visible=False, axis="y")
