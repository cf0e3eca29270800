"""From raw runs to figures: medians, the best peer, ratios, shares of the roofline, one table.

python report.py RECORD.json    prints the table of an earlier run
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drivers import OURS
from roofline import Floor, floor
from sizes import SIZES, Stored
from workloads import Workload, workload

# The figure that a workload is compared by. More is better in all of them.
HEADLINE = {
    "w1": "decode_tps",
    "w2": "output_tps",
    "w3": "output_tps",
    "w4": "prefill_tps",
    "w5": "output_tps",
}
CEILINGS = ("anonymous_gbs", "mapped_gbs", "matrix_gflops")
UNITS = {"decode_tps": "decode tok/s", "output_tps": "output tok/s", "prefill_tps": "prefill tok/s"}


def figures(
    work: Workload, wall: float, first: Sequence[float], last: Sequence[float]
) -> dict[str, float]:
    """Rates in tokens/s, times in seconds, of one repetition (or of the roofline's ideal one)."""
    found = {"wall": wall, "output_tps": work.output_tokens / wall}
    if first:
        found["ttft"] = statistics.median(first)
    if len(work.requests) == 1 and first:
        request = work.requests[0]
        if request.output > 1:
            found["decode_tps"] = (request.output - 1) / (last[0] - first[0])
        else:
            found["prefill_tps"] = len(request.prompt) / first[0]
    return found


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def summarize(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """model -> workload -> figures of each peer, ours over the best peer, shares of the floor.

    The floor is that of the best ceilings seen in the whole run, so that a probe in a noisy moment
    flatters nobody.
    """
    if not record["ceilings"]:
        return {}
    ceilings = {key: max(row[key] for row in record["ceilings"]) for key in CEILINGS}
    result: dict[str, dict[str, Any]] = {}
    for model, name in dict.fromkeys((run["model"], run["workload"]) for run in record["runs"]):
        runs = [run for run in record["runs"] if (run["model"], run["workload"]) == (model, name)]
        held = record.get("stored", {}).get(model)  # earlier records are of bfloat16
        result.setdefault(model, {})[name] = _compare(
            runs, ceilings, model, name, Stored(**held) if held else None
        )
    return result


def _compare(
    runs: list[dict[str, Any]],
    ceilings: dict[str, float],
    model: str,
    name: str,
    held: Stored | None,
) -> dict[str, Any]:
    """Clean repetitions count; where a peer has none, all of its repetitions do, and `clean` says
    0."""
    work = workload(name, SIZES[model].vocab, 1)
    peers: dict[str, dict[str, Any]] = {}
    for peer in dict.fromkeys(run["peer"] for run in runs):
        mine = [run for run in runs if run["peer"] == peer]
        clean = [run for run in mine if run["clean"]]
        rows = [figures(work, run["wall"], run["first"], run["last"]) for run in clean or mine]
        peers[peer] = {key: spread(row[key] for row in rows) for key in rows[0]}
        peers[peer] |= {"clean": len(clean), "memory": mine[-1]["memory"]}
    headline = HEADLINE[name]
    medians = {peer: row[headline]["median"] for peer, row in peers.items() if headline in row}
    others = {peer: value for peer, value in medians.items() if peer != OURS}
    best = max(others, key=others.__getitem__, default=None)
    result: dict[str, Any] = {
        "headline": headline,
        "peers": peers,
        "best_peer": best,
        "roofline": {},
    }
    if best and OURS in medians:
        result["ours_over_best"] = medians[OURS] / medians[best]
    for kind in ("anonymous", "mapped"):
        speeds = {"bandwidth": ceilings[f"{kind}_gbs"], "matrix": ceilings["matrix_gflops"]}
        cache = runs[0]["prefix_cache"]
        ideal = floor(SIZES[model], work, **speeds, prefix_cache=cache, stored=held)
        reach = _ideal_figures(work, ideal)
        shares = {peer: value / reach[headline] for peer, value in medians.items()}
        result["roofline"][kind] = {**speeds, **asdict(ideal), **reach, "share": shares}
    return result


def _ideal_figures(work: Workload, ideal: Floor) -> dict[str, float]:
    count = len(work.requests)
    return figures(work, ideal.seconds, [ideal.first_seconds] * count, [ideal.seconds] * count)


def table(record: dict[str, Any]) -> str:
    """All workloads, then starts and memory, as a Markdown table. A share of the floor is
    `anonymous / mapped`."""
    names = list(record["settings"]["peers"])
    rows = [["", *names, "best peer", "ours / best", "floor", "ours of floor"]]
    for model, workloads in record["summary"].items():
        for name, summary in workloads.items():
            rows += _workload_rows(model, name, summary, names)
        rows += _process_rows(model, record, names)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _workload_rows(
    model: str, name: str, summary: dict[str, Any], names: list[str]
) -> list[list[str]]:
    label = f"{model.upper()} {name.upper()}"
    headline = summary["headline"]
    peers = summary["peers"]
    ideal = summary["roofline"]
    shares = [ideal[kind]["share"].get(OURS) for kind in ("anonymous", "mapped")]
    rows = [
        [
            f"{label} {UNITS[headline]}",
            *(_figure(peers, peer, headline) for peer in names),
            summary["best_peer"] or "-",
            f"{summary['ours_over_best']:.2f}" if "ours_over_best" in summary else "-",
            f"{ideal['anonymous'][headline]:.4g}",
            " / ".join("-" if share is None else f"{share:.0%}" for share in shares),
        ]
    ]
    if name == "w1":
        ttft = [_figure(peers, peer, "ttft") for peer in names]
        rows.append([f"{label} TTFT s", *ttft, "", "", f"{ideal['anonymous']['ttft']:.4g}", ""])
    return rows


def _figure(peers: dict[str, Any], peer: str, key: str) -> str:
    if peer not in peers or key not in peers[peer]:
        return "-"
    disturbed = "" if peers[peer]["clean"] else " (busy)"
    return f"{peers[peer][key]['median']:.4g}{disturbed}"


def _process_rows(model: str, record: dict[str, Any], names: list[str]) -> list[list[str]]:
    """Starting and memory: the fastest start, the largest peak of all of a peer's processes on this
    model."""
    starts = [start for start in record["starts"] if start["model"] == model]
    runs = [run for run in record["runs"] if run["model"] == model]

    def cells(values: dict[str, list[float]], pick: Any) -> list[str]:
        return [f"{pick(values[peer]):.3g}" if values.get(peer) else "-" for peer in names] + [
            ""
        ] * 4

    def of(rows: list[dict[str, Any]], value: Any) -> dict[str, list[float]]:
        return {peer: [value(row) for row in rows if row["peer"] == peer] for peer in names}

    result = [
        [f"{model.upper()} load s", *cells(of(starts, lambda s: s["load_s"]), min)],
        [
            f"{model.upper()} start to first token s",
            *cells(of(starts, lambda s: s["first_token_s"]), min),
        ],
        [f"{model.upper()} peak memory GB", *cells(of(runs, lambda r: r["memory"]["total"]), max)],
    ]
    beyond = {OURS: [run["memory"]["beyond"] for run in runs if "beyond" in run["memory"]]}
    result.append([f"{model.upper()} beyond torch, weights, KV GB", *cells(beyond, max)])
    return result


if __name__ == "__main__":
    earlier = json.loads(Path(sys.argv[1]).read_text())
    print(table(earlier | {"summary": summarize(earlier)}))
