"""The tables of benchmarks beside other engines, against a record whose figures are worked out by hand."""

from __future__ import annotations

from typing import Any

import tables
from tables import beside


def run(peer: str, seconds: float, *, workload: str = "w4", clean: bool = True) -> dict[str, Any]:
    """One prompt of 2,048 tokens that took `seconds` (W4), or one of 128 with its first token then (W1)."""
    last = seconds if workload == "w4" else 2 * seconds
    times = {"wall": last, "first": [seconds], "last": [last]}
    memory = {"total": seconds} | ({"beyond": 0.5} if peer == "moebius" else {})
    about = {
        "peer": peer,
        "model": "m1",
        "workload": workload,
        "clean": clean,
        "prefix_cache": False,
    }
    return {**about, **times, "memory": memory}


def record(*runs: dict[str, Any], started: str = "2026-11-25T00:00:00") -> dict[str, Any]:
    ceilings = [{"anonymous_gbs": 20.0, "mapped_gbs": 20.0, "matrix_gflops": 100.0}]
    starts = [{"peer": peer, "model": "m1", "first_token_s": 2.0} for peer in ("moebius", "vllm")]
    return {"started": started, "ceilings": ceilings, "starts": starts, "runs": list(runs)}


PREFILL = record(
    run("moebius", 1.0),
    run("moebius", 2.0),
    run("moebius", 4.0),
    run("vllm", 4.0),
    run("vllm", 2.0, clean=False),
    run("vllm", 5.0),
    run("vllm", 6.0),
    run("llama.cpp", 8.0),
)


def test_medians_and_ratios_of_clean_repetitions() -> None:
    [one] = beside.comparisons("a.json", PREFILL)
    assert one.values == {"moebius": 1024.0, "vllm": 2048 / 5, "llama.cpp": 256.0}
    assert (one.best, one.ratio) == ("vllm", 2.5)
    assert one.ratios == [4.0, 2.5, 1.5]
    assert one.spread == "2.50 × (1.50 to 4.00)"
    assert one.label == "M1, prefill of 2,048 tokens, tokens/s"


def test_of_times_the_smallest_is_best() -> None:
    found = beside.comparisons(
        "a.json", record(run("moebius", 1.0, workload="w1"), run("vllm", 3.0, workload="w1"))
    )
    [first_token] = [one for one in found if one.measure == beside.TTFT]
    assert (first_token.best, first_token.ratio, first_token.share) == ("vllm", 3.0, None)
    assert first_token.spread == "3.00 × (once)"


def test_the_newest_comparison_of_a_subject_comes_first() -> None:
    old = beside.comparisons("old.json", PREFILL)
    new = beside.comparisons("new.json", record(*PREFILL["runs"], started="2026-11-26T00:00:00"))
    newest, older = beside.latest(old + new)
    assert [one.source for one in newest] == ["new.json"]
    assert [one.source for one in older] == ["old.json"]


def test_engines_that_took_no_part_have_empty_cells() -> None:
    decode = beside.comparisons(
        "b.json", record(run("moebius", 1.0, workload="w1"), run("openvino", 2.0, workload="w1"))
    )
    head, rows = beside.speed_rows([*beside.comparisons("a.json", PREFILL), *decode])
    assert head[:5] == ["", "Moebius", "llama.cpp", "vLLM", "OpenVINO"]
    assert rows[0][1:5] == ["1,024", "256.0", "409.6", ""]
    assert rows[1][2:4] == ["", ""]


def test_starts_and_memory_are_the_shortest_and_the_largest() -> None:
    head, rows = beside.process_rows([PREFILL])
    assert head == ["", "Moebius", "vLLM"]
    assert [row[1:] for row in rows] == [["2.00", "2.00"], ["4.00", "6.00"], ["0.500", ""]]


def test_the_command_that_repeats_a_run() -> None:
    settings = {"peers": ["moebius", "vllm"], "models": ["m1"], "workloads": ["w4"], "reps": 2}
    line = ".venv/bin/python benchmarks/peers/run.py --peers moebius,vllm --models m1 --workloads w4 --reps 2"
    assert beside.command({**settings, "together": "auto"}) == line
    assert beside.command({**settings, "together": "no"}) == f"{line} --together no"


def test_only_what_lies_between_marks_is_made() -> None:
    page = "before\n<!-- made by benchmarks/tables.py: sampling -->\nold\n<!-- end -->\nafter\n"
    made = tables.rendered(page)
    assert made.startswith("before\n<!-- made by") and made.endswith("<!-- end -->\nafter\n")
    milliseconds = tables.SAMPLING.read()["milliseconds"]["32 greedy"]
    assert "old" not in made and f"| 32 greedy | {milliseconds:.2f} |" in made
    assert tables.rendered(made) == made
