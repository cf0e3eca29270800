"""What the runs say together: a verdict a claim, by pass marks that were set before any run, tables
and a chart."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from claims.experiments import RUNS, SEEDS

Result = dict[str, Any]
Results = Mapping[str, Mapping[int, Result]]
"""By the run's name and seed."""

CONFIRMED = "confirmed"
REFUTED = "refuted"
OPEN = "undecided"


class Verdict(NamedTuple):
    """word: one of the three; figures: the number of each seed that it rests on, as text."""

    word: str
    figures: str


class Incomplete(Exception):
    """Runs that a row needs are not there."""


def read(folder: Path) -> Results:
    found: dict[str, dict[int, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["name"], {})[result["seed"]] = result
    return found


def together(results: Results, *names: str) -> list[tuple[Result, ...]]:
    """The named runs side by side, a tuple for every seed that all have."""
    seeds = set.intersection(*(set(results.get(name, {})) for name in names))
    if not seeds:
        raise Incomplete(
            ", ".join(name for name in names if not results.get(name)) or "no seed in common"
        )
    return [tuple(results[name][seed] for name in names) for seed in sorted(seeds)]


def first_step(curve: Sequence[Mapping[str, float]], loss: float) -> float:
    """The step at which a curve first reaches a loss, between its points along a line; infinite if
    it never does."""
    before: Mapping[str, float] | None = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return point["step"]
            part = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return before["step"] + part * (point["step"] - before["step"])
        before = point
    return float("inf")


def steps_ratio(
    dense: Sequence[Mapping[str, float]], sparse: Sequence[Mapping[str, float]]
) -> float:
    """How many times fewer steps the sparse model took to the dense one's last loss."""
    return dense[-1]["step"] / first_step(sparse, dense[-1]["loss"])


def word_for(*, confirmed: bool, refuted: bool) -> str:
    if confirmed:
        return CONFIRMED
    return REFUTED if refuted else OPEN


def judged(
    values: Sequence[float], good: Callable[[float], bool], bad: Callable[[float], bool]
) -> str:
    """Confirmed where every seed's value is good, refuted where any is bad."""
    return word_for(confirmed=all(map(good, values)), refuted=any(map(bad, values)))


def told(values: Sequence[float], unit: str = "") -> str:
    return ", ".join(f"{value:.3g}{unit}" for value in values)


def spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def mean_violation(result: Result) -> float:
    return fmean(result["routing"]["max_violation"])


def fewer_steps(results: Results) -> Verdict:
    ratios = [steps_ratio(d["curve"], e["curve"]) for d, e in together(results, "dense", "e8")]
    return Verdict(
        judged(ratios, lambda x: x >= 1.3, lambda x: x <= 1.0), f"steps ratio {told(ratios)}"
    )


def less_time(results: Results) -> Verdict:
    steps = []
    times = []
    for (pair,) in together(results, "pair"):
        steps.append(steps_ratio(pair["curves"]["dense"], pair["curves"]["e8"]))
        cost = median(
            e / d
            for d, e in zip(pair["step_seconds"]["dense"], pair["step_seconds"]["e8"], strict=True)
        )
        times.append(steps[-1] / cost)
    figures = f"time ratio {told(times)} (steps {told(steps)})"
    return Verdict(judged(times, lambda x: x > 1.1, lambda x: x < 1.0), figures)


def more_experts(results: Results) -> Verdict:
    columns = list(zip(*together(results, "dense", "e2", "e4", "e8", "e16"), strict=True))
    losses = [[run["loss"]["all"] for run in column] for column in columns]
    means = [fmean(column) for column in losses]
    noises = [spread(column) for column in losses]
    falls = all(after < before for before, after in pairwise(means))
    rises = False
    for i in range(1, len(means)):
        rises = rises or means[i] - means[i - 1] > max(noises[i - 1], noises[i])
    figures = ", ".join(f"{mean:.4f}" for mean in means)
    word = word_for(confirmed=falls, refuted=rises)
    return Verdict(word, f"mean loss at E = 1, 2, 4, 8, 16: {figures}")


def balance(results: Results) -> Verdict:
    ratios = []
    gains = []
    for without, with_loss in together(results, "alpha0", "e8"):
        ratios.append(mean_violation(without) / mean_violation(with_loss))
        gains.append(without["at_capacity"]["1.25"] - with_loss["at_capacity"]["1.25"])
    word = word_for(confirmed=min(ratios) >= 2 and min(gains) > 0, refuted=max(ratios) < 1.1)
    return Verdict(
        word, f"MaxVio falls {told(ratios)} times; loss at capacity 1.25 falls by {told(gains)}"
    )


def collapse(results: Results) -> Verdict:
    dead = [sum(run["routing"]["dead_experts"]) for (run,) in together(results, "collapse")]
    worst = [max(run["routing"]["max_violation"]) for (run,) in together(results, "collapse")]
    figures = f"dead of 128: {told(dead)}; worst MaxVio {told(worst)}"
    return Verdict(judged(dead, lambda x: x >= 32, lambda x: x == 0), figures)


def z_loss(results: Results) -> Verdict:
    words = []
    figures = []
    for where, without, with_loss in (
        ("", "e8", "z0.001"),
        ("router init x 30: ", "stress-z0", "stress-z0.001"),
    ):
        pairs = together(results, without, with_loss)
        z = [a["z"] / b["z"] for a, b in pairs]
        logit = [a["largest_logit"] / b["largest_logit"] for a, b in pairs]
        losses = list(zip(*((a["loss"]["all"], b["loss"]["all"]) for a, b in pairs), strict=True))
        worse = fmean(losses[1]) - fmean(losses[0])
        noise = max(map(spread, losses))
        falls = min(*z, *logit) >= 2 and worse <= noise
        words.append(word_for(confirmed=falls, refuted=worse > noise))
        figures.append(
            f"{where}z falls {told(z)}, largest logit {told(logit)} times; loss {worse:+.4f}, "
            f"noise {noise:.4f}"
        )
    word = next((word for word in (REFUTED, OPEN) if word in words), CONFIRMED)
    return Verdict(word, "; ".join(figures))


def loss_free(results: Results) -> Verdict:
    good = []
    figures = []
    for score in ("softmax", "sigmoid"):
        best = False
        for rate in ("0.001", "0.01"):
            pairs = together(results, f"aux-{score}", f"bias-{score}-{rate}")
            violation = fmean(mean_violation(b) - mean_violation(a) for a, b in pairs)
            loss = fmean(b["loss"]["all"] - a["loss"]["all"] for a, b in pairs)
            best = best or (violation <= 0 and loss <= 0)
            figures.append(f"{score} u = {rate}: MaxVio {violation:+.3f}, loss {loss:+.4f}")
        good.append(best)
    return Verdict(word_for(confirmed=all(good), refuted=not any(good)), "; ".join(figures))


def capacity(results: Results) -> Verdict:
    falls = []
    figures = []
    for (run,) in together(results, "e8"):
        losses = [*run["at_capacity"].values(), run["loss"]["all"]]
        falls.append(all(a >= b for a, b in pairwise(losses)))
        figures.append(" > ".join(f"{loss:.3f}" for loss in losses))
    return Verdict(CONFIRMED if all(falls) else REFUTED, "; ".join(figures))


def precision(results: Results) -> Verdict:
    import torch

    logits = torch.full((11,), 128.0)
    logits[-1] = 128.5
    wide = torch.softmax(logits, -1)[-1].item()
    narrow = torch.softmax(logits.bfloat16().float(), -1)[-1].item()
    flips = [run["bfloat16_changed"] for (run,) in together(results, "e8")]
    word = CONFIRMED if (round(wide, 3), round(narrow, 3)) == (0.142, 0.091) else REFUTED
    return Verdict(
        word,
        f"{wide:.3f} to {narrow:.3f}; tokens that change experts: "
        f"{told([100 * x for x in flips], ' %')}",
    )


def global_balance(results: Results) -> Verdict:
    variation = []
    loss = []
    for local, whole in together(results, "local", "global"):
        variation.append(
            whole["routing"]["domain_variation"] - local["routing"]["domain_variation"]
        )
        loss.append(whole["loss"]["all"] - local["loss"]["all"])
    good = fmean(variation) > 0 and fmean(loss) <= 0
    both_wrong = fmean(variation) <= 0 and fmean(loss) > 0
    figures = f"domain variation {told(variation)}, loss {told(loss)} (global less local)"
    return Verdict(word_for(confirmed=good, refuted=both_wrong), figures)


def saturation(results: Results) -> Verdict:
    rises = []
    figures = []
    for (run,) in together(results, "e8"):
        found = run["saturation"]
        points = [found[int(part * (len(found) - 1))] for part in (0.0, 0.25, 0.5, 0.75)]
        rises.append(all(a < b for a, b in pairwise(points)))
        figures.append(" < ".join(f"{x:.2f}" for x in points))
    return Verdict(CONFIRMED if all(rises) else REFUTED, "; ".join(figures))


class Row(NamedTuple):
    """A claim, its pass mark and its judge. What is said of fewer than all seeds is marked so."""

    number: str
    claim: str
    mark: str
    judge: Callable[[Results], Verdict]
    runs: tuple[str, ...]


ROWS = (
    Row(
        "1",
        "fewer steps at equal operations (Switch 3)",
        "steps ratio >= 1.3 in every seed",
        fewer_steps,
        ("dense", "e8"),
    ),
    Row("2", "less time (Switch 3.2)", "time ratio > 1.1 in every seed", less_time, ("pair",)),
    Row(
        "3",
        "more experts help (Switch fig. 4)",
        "means fall from dense to E = 16",
        more_experts,
        ("dense", "e2", "e4", "e8", "e16"),
    ),
    Row(
        "4",
        "the balance loss balances (Switch eq. 4)",
        "MaxVio falls 2 x, loss at capacity 1.25 falls",
        balance,
        ("alpha0", "e8"),
    ),
    Row(
        "4b",
        "without it experts die (E = 32, router init x 30)",
        "a quarter of the experts dead",
        collapse,
        ("collapse",),
    ),
    Row(
        "5",
        "the z loss bounds logits (ST-MoE)",
        "z and largest logit fall 2 x, loss within noise",
        z_loss,
        ("e8", "z0.001", "stress-z0", "stress-z0.001"),
    ),
    Row(
        "6",
        "balance without a loss (Loss-Free)",
        "MaxVio and loss not above the loss's",
        loss_free,
        tuple(name for name in RUNS if name.startswith(("aux", "bias"))),
    ),
    Row(
        "7",
        "evaluation capacity is a knob (ST-MoE table 8)",
        "loss falls with it, dropless is best",
        capacity,
        ("e8",),
    ),
    Row(
        "8", "selective precision (Switch, ST-MoE note 7)", ".142 becomes .091", precision, ("e8",)
    ),
    Row(
        "9",
        "balance over the global batch (Qwen)",
        "domains further apart, loss not above local",
        global_balance,
        ("local", "global"),
    ),
    Row(
        "11",
        "routing saturates (OLMoE)",
        "overlap with the last rises over training",
        saturation,
        ("e8",),
    ),
)


def report(results: Results) -> str:
    """Two Markdown tables, a row a claim and a row a run."""
    lines = [
        "| # | claim | confirmed if | measured, a value a seed | verdict |",
        "| - | - | - | - | - |",
    ]
    for row in ROWS:
        word, figures = verdict(row, results)
        lines.append(f"| {row.number} | {row.claim} | {row.mark} | {figures} | {word} |")
    return "\n".join([*lines, "", runs_table(results)])


def runs_table(results: Results) -> str:
    """A row a run, means over its seeds."""
    lines = [
        "| run | seeds | loss (range) | MaxVio | dead | at capacity 1.25 | CPU s |",
        "| - |" + " -: |" * 6,
    ]
    lines += [_line(name, list(results[name].values())) for name in RUNS if name in results]
    return "\n".join(lines)


def verdict(row: Row, results: Results) -> Verdict:
    """The judge's word, and a note where fewer than all seeds have been run."""
    try:
        word, figures = row.judge(results)
    except Incomplete as missing:
        return Verdict("not run", f"missing: {missing}")
    there = min(len(results[name]) for name in row.runs)
    return Verdict(
        word if there >= len(SEEDS) else f"{word} in {there} of {len(SEEDS)} seeds", figures
    )


def _line(name: str, runs: Sequence[Result]) -> str:
    losses = [run["loss"]["all"] for run in runs]
    cells = [name, str(len(runs)), f"{fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"]
    if "routing" in runs[0]:
        cells.append(f"{fmean(map(mean_violation, runs)):.2f}")
        cells.append(f"{fmean(sum(run['routing']['dead_experts']) for run in runs):.1f}")
        cells.append(f"{fmean(run['at_capacity']['1.25'] for run in runs):.4f}")
    else:
        cells += ["", "", ""]
    cells.append(f"{fmean(run['cpu_seconds'] for run in runs):.0f}")
    return f"| {' | '.join(cells)} |"
