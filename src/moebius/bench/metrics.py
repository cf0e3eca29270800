"""What a run's requests say together: latencies and their percentiles, throughput, goodput.

Names and keys are vLLM's.

TTFT   time to first token          ITL    time between two arrivals of text
E2EL   time to the last token       TPOT   (E2EL - TTFT) / (output tokens - 1)
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from moebius.errors import ConfigError

METRICS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_GOODPUT = ("ttft", "tpot", "e2el")


@dataclass(slots=True)
class Record:
    """One request as its client saw it, in seconds; a non-empty error says why it failed.

    start       when it was sent, counted from the beginning of the run
    arrivals    when text arrived, counted from the request's start; one arrival may carry several
                tokens
    e2el        when the answer's end was known, counted from the start
    """

    start: float
    input_tokens: int
    output_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    e2el: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        """An answer of special tokens alone shows no text: the first seen of it is its end."""
        return self.arrivals[0] if self.arrivals else self.e2el

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]

    @property
    def tpot(self) -> float | None:
        """None where there is no second token."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)


def parse_goodput(specs: Iterable[str]) -> dict[str, float]:
    """['ttft:500', 'tpot:50'] -> limits in milliseconds.

    Raises ConfigError saying what is wrong with a spec.
    """
    limits: dict[str, float] = {}
    for spec in specs:
        name, _, limit = spec.partition(":")
        if name not in _GOODPUT or not re.fullmatch(r"\d+(\.\d*)?", limit):
            raise ConfigError(
                f"--goodput {spec!r} is no limit; write METRIC:MILLISECONDS with one of "
                f"{', '.join(_GOODPUT)}, such as ttft:500"
            )
        limits[name] = float(limit)
    return limits


def parse_percentiles(text: str) -> list[float]:
    """'50,99' -> [50.0, 99.0]."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= p <= 100 for p in found):
        raise ConfigError(
            f"--metric-percentiles is {text!r}; give numbers from 0 to 100, such as 50,90,99"
        )
    return found


def parse_metrics(text: str) -> list[str]:
    """'ttft,itl' -> ['ttft', 'itl']."""
    found = text.split(",")
    if not set(found) <= set(METRICS):
        raise ConfigError(f"--percentile-metrics is {text!r}; name some of {','.join(METRICS)}")
    return found


def is_good(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a request that succeeded kept every limit, in milliseconds.

    One token alone keeps any limit on TPOT.
    """
    values = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(1000 * values[name] <= limit for name, limit in limits.items())


def statistics(
    seconds: Sequence[float], name: str, percentiles: Iterable[float]
) -> dict[str, float | None]:
    """mean, median, std (of the population) and linearly interpolated percentiles, in ms.

    None where there are no values.
    """
    figures: dict[str, Callable[[Any], Any]] = {"mean": np.mean, "median": np.median, "std": np.std}
    figures |= {f"p{p:g}": partial(np.percentile, q=p) for p in percentiles}
    keys = {key: f"{key}_{name}_ms" for key in figures}
    if not seconds:
        return dict.fromkeys(keys.values())
    values = np.asarray(seconds) * 1000
    return {keys[key]: float(figure(values)) for key, figure in figures.items()}


def latencies(records: Iterable[Record]) -> dict[str, list[float]]:
    """Every metric's values over the requests that succeeded, in seconds."""
    good = [record for record in records if not record.error]
    return {
        "ttft": [record.ttft for record in good],
        "tpot": [record.tpot for record in good if record.tpot is not None],
        "itl": [gap for record in good for gap in record.itl],
        "e2el": [record.e2el for record in good],
    }


def tokens_by_second(records: Iterable[Record]) -> list[float]:
    """Output tokens in each second of the run.

    A request's tokens are spread evenly over its arrivals.
    """
    seconds: defaultdict[int, float] = defaultdict(float)
    for record in records:
        for at in record.arrivals:
            seconds[int(record.start + at)] += record.output_tokens / len(record.arrivals)
    return [seconds[second] for second in range(max(seconds, default=-1) + 1)]


def in_flight(records: Iterable[Record]) -> list[tuple[float, int]]:
    """(second, requests in flight from then on) at each start and end, in order.

    An end comes before a start at its moment.
    """
    changes = []
    for record in records:
        changes.append((record.start, 1))
        changes.append((record.start + record.e2el, -1))
    changes.sort()
    counts = accumulate(step for _, step in changes)
    return [(at, count) for (at, _), count in zip(changes, counts, strict=True)]


def summarise(
    records: Sequence[Record],
    duration: float,
    *,
    percentiles: Sequence[float] = (50, 99),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All figures of a run of `duration` seconds.

    Failed requests count as failed, under their reason, and no more.
    """
    done = [record for record in records if not record.error]
    inputs = sum(record.input_tokens for record in done)
    outputs = sum(record.output_tokens for record in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "failures": dict(Counter(r.error for r in records if r.error).most_common()),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(is_good(r, goodput) for r in done) / duration if goodput else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": max(tokens_by_second(done), default=0.0),
        "max_concurrent_requests": max((count for _, count in in_flight(done)), default=0),
    }
    for name, values in latencies(done).items():
        result |= statistics(values, name, percentiles)
    return result
