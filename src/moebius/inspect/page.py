"""The report as sentences and as a page: verdict.j2, report.html.j2, and the filters that they draw with."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

# More cells than these make a page that a browser is slow to show.
_CELLS = 24_000


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
    """Which layers' maps to draw, in order: as many as a page can hold, those with most to see first."""
    room = max(1, _CELLS // len(maps[0]["lift"]) ** 2)
    return sorted(sorted(range(len(maps)), key=lambda m: -maps[m]["spread"])[:room])


def _render(template: str, report: Mapping[str, Any], *, escape: bool) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=escape, undefined=jinja2.StrictUndefined)
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
