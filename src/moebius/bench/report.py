"""What a benchmark leaves behind: the printed report in vLLM's layout, JSON, and charts."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moebius
from moebius.bench.metrics import METRICS, Record, in_flight, latencies, tokens_by_second
from moebius.errors import ConfigError
from moebius.files import begins_with, check_apart, check_target, json_text, signed, write_file

_WIDTH = 50
_MAKER = "moebius"
_OUR_FIGURES = begins_with(f'{{\n  "{_MAKER}":'.encode())
_OUR_CHARTS = signed(_MAKER.encode())
_PLOTS = (".png", ".svg", ".pdf")
_SERVING = {
    "completed": "Successful requests:",
    "failed": "Failed requests:",
    "max_concurrency": "Maximum request concurrency:",
    "request_rate": "Request rate configured (RPS):",
    "duration": "Benchmark duration (s):",
    "total_input_tokens": "Total input tokens:",
    "total_output_tokens": "Total generated tokens:",
    "request_throughput": "Request throughput (req/s):",
    "request_goodput": "Request goodput (req/s):",
    "output_throughput": "Output token throughput (tok/s):",
    "max_output_tokens_per_s": "Peak output token throughput (tok/s):",
    "max_concurrent_requests": "Peak concurrent requests:",
    "total_token_throughput": "Total token throughput (tok/s):",
}


def check_outputs(output_json: Path | None, plot: Path | None = None) -> None:
    """Refuse before the run what could not be written after it: ConfigError or StorageError."""
    if plot is not None and plot.suffix not in _PLOTS:
        raise ConfigError(f"--plot {plot}: the name must end in {', '.join(_PLOTS)}")
    check_apart(output_json=output_json, plot=plot)
    if output_json is not None:
        check_target(output_json, _OUR_FIGURES)
    if plot is not None:
        check_target(plot, _OUR_CHARTS)


def save_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """One line a key, so that figures can be read beside long lists; the first says who wrote it.

    Nothing is written where `path` is None.
    """
    if path is None:
        return
    named = {_MAKER: moebius.__version__, **result}
    lines = (f"  {json_text(key)}: {json_text(value)}" for key, value in named.items())
    write_file(path, "{\n" + ",\n".join(lines) + "\n}\n", ours=_OUR_FIGURES)


def serving_report(
    result: Mapping[str, Any], metrics: Iterable[str], percentiles: Iterable[float]
) -> str:
    """The figures that `summarise` found, a line each, and under them why requests failed."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += [
        _line(label, result[key]) for key, label in _SERVING.items() if result.get(key) is not None
    ]
    labels = {"Mean": "mean", "Median": "median"}
    labels |= {f"P{p:g}": f"p{p:g}" for p in percentiles}
    for name in metrics:
        lines.append(f"{METRICS[name]:-^{_WIDTH}}")
        for label, key in labels.items():
            lines.append(_line(f"{label} {name.upper()} (ms):", result[f"{key}_{name}_ms"]))
    lines.append("=" * _WIDTH)
    lines += [f"{count} failed: {reason}" for reason, count in result["failures"].items()]
    return "\n".join(lines)


def _line(label: str, value: float | None) -> str:
    shown = "-" if value is None else str(value)
    if isinstance(value, float):
        shown = f"{value:.2f}"
    return f"{label:<39} {shown:>10}"


@contextmanager
def chart(
    path: Path, title: str, rows: int, columns: int, size: tuple[float, float] = (10, 6)
) -> Iterator[Any]:
    """A figure's axes, to be drawn on without a display; written at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    yield axes
    maker = {"Software" if path.suffix == ".png" else "Creator": _MAKER}
    write_file(path, lambda to: figure.savefig(to, dpi=150, metadata=maker), ours=_OUR_CHARTS)


def log_scale(axis: Any) -> None:
    """Logarithmic, with plain numbers at it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if math.isinf(axis.dataLim.minposx):
        return  # nothing lies above 0, as where every answer arrived in one part
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    numbers = (1,) if high > 60 * low else (1, 2, 5)
    axis.xaxis.set_major_locator(LogLocator(subs=numbers))
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def plot_serving(
    path: Path, title: str, records: Sequence[Record], limits: Mapping[str, float]
) -> None:
    """Shares of requests by latency, and what went on over time.

    Goodput's limits are dotted lines.
    """
    good = [record for record in records if not record.error]
    with chart(path, title, 2, 2) as (whole, between, tokens, flying):
        for name, seconds in latencies(good).items():
            axis = whole if name in ("ttft", "e2el") else between
            color = "C0" if name in ("ttft", "itl") else "C1"
            if seconds:
                axis.ecdf([1000 * value for value in seconds], color=color, label=name.upper())
            if name in limits:
                axis.axvline(limits[name], color=color, linestyle=":")
        for axis in (whole, between):
            axis.set(xlabel="ms", ylabel="share at or below", ylim=(0, 1.01))
            log_scale(axis)
            axis.legend(loc="lower right", framealpha=0.9, edgecolor="none")
        tokens.stairs(tokens_by_second(good), fill=True, alpha=0.7)
        tokens.set(xlabel="s", ylabel="output tokens/s", ylim=(0, None))
        moments = in_flight(good)
        starts = [at for at, _ in moments]
        counts = [count for _, count in moments]
        flying.step(starts, counts, where="post", color="C2")
        flying.set(xlabel="s", ylabel="requests in flight", ylim=(0, None))
        flying.yaxis.get_major_locator().set_params(integer=True)
