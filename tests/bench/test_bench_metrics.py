"""Figures of a run against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from moebius.bench.metrics import (
    Record,
    in_flight,
    is_good,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    statistics,
    summarise,
    tokens_by_second,
)
from moebius.bench.report import serving_report
from moebius.errors import ConfigError


def record(
    start: float, arrivals: list[float], tokens: int | None = None, **more: object
) -> Record:
    return Record(start, 10, tokens or len(arrivals), arrivals, arrivals[-1], **more)  # type: ignore[arg-type]


FAST = record(0.0, [0.1, 0.2, 0.4])
SLOW = record(0.5, [1.0, 1.3, 1.5], tokens=6)
ONE = record(3.0, [0.25])
FAILED = Record(0.0, 10, error="HTTP 503: full")


def test_one_request() -> None:
    assert SLOW.ttft == 1.0 and SLOW.e2el == 1.5
    assert SLOW.itl == pytest.approx([0.3, 0.2])
    assert SLOW.tpot == pytest.approx(0.5 / 5)
    assert ONE.itl == [] and ONE.tpot is None
    assert Record(0.0, 10, 3, [], 0.7).ttft == 0.7


def test_percentiles_are_interpolated_and_std_is_of_the_population() -> None:
    found = statistics([0.001, 0.002, 0.003, 0.010], "ttft", [0, 25, 90, 99.5])
    assert found["mean_ttft_ms"] == pytest.approx(4.0)
    assert found["median_ttft_ms"] == pytest.approx(2.5)
    assert found["std_ttft_ms"] == pytest.approx(math.sqrt((9 + 4 + 1 + 36) / 4))
    # Position p / 100 * (n - 1) in the sorted values: 0, 0.75, 2.7 and 2.985.
    assert found["p0_ttft_ms"] == pytest.approx(1.0)
    assert found["p25_ttft_ms"] == pytest.approx(1.75)
    assert found["p90_ttft_ms"] == pytest.approx(3 + 0.7 * 7)
    assert found["p99.5_ttft_ms"] == pytest.approx(3 + 0.985 * 7)
    assert set(statistics([], "itl", [99]).values()) == {None}


def test_a_run() -> None:
    found = summarise(
        [FAST, SLOW, FAILED, ONE, FAILED], 4.0, percentiles=[50], goodput={"ttft": 300, "tpot": 120}
    )
    assert (found["completed"], found["failed"], found["failures"]) == (3, 2, {"HTTP 503: full": 2})
    assert found["total_input_tokens"] == 30 and found["total_output_tokens"] == 10
    assert found["request_throughput"] == 0.75 and found["output_throughput"] == 2.5
    assert found["total_token_throughput"] == 10.0
    assert found["mean_ttft_ms"] == pytest.approx((100 + 1000 + 250) / 3)
    assert found["mean_tpot_ms"] == pytest.approx((150 + 100) / 2), (
        "an answer of one token has no TPOT"
    )
    assert found["p50_itl_ms"] == pytest.approx(200), "of 100, 200, 300 and 200"
    assert found["request_goodput"] == 0.25, "FAST breaks TPOT, SLOW breaks TTFT, ONE keeps both"
    assert (
        summarise([FAILED], 1.0)["mean_e2el_ms"] is None
        and summarise([FAST], 1.0)["request_goodput"] is None
    )


def test_peaks() -> None:
    # SLOW's six tokens came in three arrivals, at 1.5, 1.8 and 2.0 s.
    assert tokens_by_second([FAST, SLOW, ONE]) == [3, 4, 2, 1]
    # An end at the moment of a start comes first: these two never overlap.
    assert max(count for _, count in in_flight([record(0.0, [1.0]), record(1.0, [1.0])])) == 1
    assert [count for _, count in in_flight([FAST, record(0.2, [0.1])])] == [1, 2, 1, 0]


def test_goodput_holds_its_limits_exactly() -> None:
    assert is_good(record(0, [0.5, 0.6]), {"ttft": 500, "tpot": 100.00001, "e2el": 600})
    assert not is_good(record(0, [0.501]), {"ttft": 500})
    assert is_good(record(0, [0.5]), {"tpot": 0})
    assert parse_goodput(["ttft:500", "e2el:2.5"]) == {"ttft": 500.0, "e2el": 2.5}


@pytest.mark.parametrize(
    "spec", ["ttft", "ttft:", "ttft:fast", "ttft:-1", "ttft:nan", "itl:5", "500", ":5"]
)
def test_bad_goodput(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"--goodput .* is no limit; write METRIC:MILLISECONDS"):
        parse_goodput([spec])


def test_lists() -> None:
    assert parse_percentiles("50,99.9") == [50.0, 99.9] and parse_metrics("itl,ttft") == [
        "itl",
        "ttft",
    ]
    for text in ("", "50,", "101", "-1", "nan", "p99"):
        with pytest.raises(ConfigError, match="--metric-percentiles"):
            parse_percentiles(text)
    with pytest.raises(ConfigError, match="name some of ttft,tpot,itl,e2el"):
        parse_metrics("ttft,speed")


def test_the_printed_report() -> None:
    found = {
        "request_rate": None,
        "max_concurrency": 8,
        **summarise([FAST, ONE, FAILED], 2.0, percentiles=[99.9]),
    }
    lines = serving_report(found, ["ttft", "tpot"], [99.9]).splitlines()
    assert lines[0].strip("=") == " Serving Benchmark Result " and {
        len(line) for line in lines[:-1]
    } == {50}
    shown = dict(line.rsplit(maxsplit=1) for line in lines if line.split()[-1][0].isdigit())
    assert shown["Successful requests:"] == "2" and shown["Failed requests:"] == "1"
    assert (
        shown["Maximum request concurrency:"] == "8"
        and shown["Output token throughput (tok/s):"] == "2.00"
    )
    assert (
        shown["Mean TTFT (ms):"] == "175.00"
        and "P99.9 TPOT (ms):" in shown
        and "Mean ITL (ms):" not in shown
    )
    assert "Request rate configured (RPS):" not in shown and lines[-1] == "1 failed: HTTP 503: full"
    assert "Mean TPOT (ms):                                  -" in serving_report(
        {**found, **summarise([FAILED], 1.0, percentiles=[99.9])}, ["tpot"], [99.9]
    )
