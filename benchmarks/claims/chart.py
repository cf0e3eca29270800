"""The chart of the claims: means over seeds, and bands or bars from the least to the greatest."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from claims.experiments import STEPS
from claims.report import Result, Results, mean_violation
from moebius.files import signed, write_file

# What draws charts says so in them.
_CHART = signed(b"Matplotlib")


def draw(results: Results, path: Path) -> None:
    """Six panels, each as far as its runs are there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, panel in zip(
        axes, (_curves, _experts, _alphas, _z, _capacities, _saturation), strict=True
    ):
        panel(axis, results)
        axis.set_visible(axis.has_data())
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    write_file(path, lambda to: figure.savefig(to, dpi=110), ours=_CHART)


def _band(axis: Any, xs: Sequence[Any], columns: Sequence[Sequence[float]], label: str) -> None:
    """A line of means and its band; `columns` has the seeds' values at each x."""
    (line,) = axis.plot(
        xs, [fmean(column) for column in columns], marker="o", markersize=3, label=label
    )
    low = [min(column) for column in columns]
    high = [max(column) for column in columns]
    axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def _curves(axis: Any, results: Results) -> None:
    for name, label in (("dense", "dense"), ("e8", "8 experts"), ("e16", "16 experts")):
        if runs := list(results.get(name, {}).values()):
            points = list(zip(*(run["curve"] for run in runs), strict=True))[3:]
            _band(
                axis,
                [p[0]["step"] for p in points],
                [[q["loss"] for q in p] for p in points],
                label,
            )
    axis.set(
        title="Held-out loss at equal operations a token",
        xlabel="step",
        ylabel="nats a byte",
        xlim=(0, STEPS),
    )


def _across(
    axis: Any, results: Results, names: dict[str, str], value: Callable[[Result], float], label: str
) -> None:
    """One value of several runs side by side: `names` has what stands at each on the axis."""
    there = {name: text for name, text in names.items() if results.get(name)}
    columns = [[value(run) for run in results[name].values()] for name in there]
    if len(columns) > 1:
        _band(axis, list(there.values()), columns, label)


def _experts(axis: Any, results: Results) -> None:
    names = {"dense": "dense", "e2": "2", "e4": "4", "e8": "8", "e16": "16"}
    _across(axis, results, names, lambda run: run["loss"]["all"], "")
    axis.set(title="Experts, one a token", xlabel="experts", ylabel="nats a byte at the end")


def _alphas(axis: Any, results: Results) -> None:
    names = {"alpha0": "0", "alpha0.001": "0.001", "e8": "0.01", "alpha0.1": "0.1"}
    _across(axis, results, names, mean_violation, "MaxVio")
    _across(axis, results, names, lambda run: run["at_capacity"]["1.25"], "loss at capacity 1.25")
    _across(axis, results, names, lambda run: run["loss"]["all"], "loss, dropless")
    axis.set(title="Weight of the balance loss", xlabel="weight", ylim=(0, None))


def _z(axis: Any, results: Results) -> None:
    names = {
        "e8": "0",
        "z0.001": "0.001",
        "z0.01": "0.01",
        "stress-z0": "0, init x 30",
        "stress-z0.001": "0.001, init x 30",
    }
    _across(axis, results, names, lambda run: run["z"], "mean z")
    _across(axis, results, names, lambda run: run["largest_logit"], "largest logit")
    axis.set(title="Weight of the z loss", yscale="log")
    axis.tick_params(axis="x", labelrotation=20)


def _capacities(axis: Any, results: Results) -> None:
    if runs := list(results.get("e8", {}).values()):
        factors = list(runs[0]["at_capacity"])
        columns = [[run["at_capacity"][factor] for run in runs] for factor in factors]
        _band(axis, [*factors, "dropless"], [*columns, [run["loss"]["all"] for run in runs]], "")
    axis.set(
        title="Capacity in evaluation, 8 experts", xlabel="capacity factor", ylabel="nats a byte"
    )


def _saturation(axis: Any, results: Results) -> None:
    if runs := list(results.get("e8", {}).values()):
        steps = [point["step"] for point in runs[0]["curve"]]
        _band(axis, steps, list(zip(*(run["saturation"] for run in runs), strict=True)), "")
    axis.set(
        title="Tokens routed as at the end, 8 experts",
        xlabel="step",
        ylabel="share",
        ylim=(0, 1.02),
    )
