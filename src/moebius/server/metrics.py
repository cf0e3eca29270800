"""Prometheus metrics: the engine's own counts at scrape time, and what the front door measures.

Everything is recorded once, under `moebius_`; vLLM's names are the same series again. Label values are fixed when the
server starts; none comes from a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moebius.engine.client import EngineClient, EngineStats

_OWN = "moebius_"
_OWN_NAME = re.compile(rb"^(# HELP |# TYPE )?moebius_", re.MULTILINE)
_CREATED = re.compile(rb"^(?:# HELP |# TYPE )?moebius_\w+_created[ {].*\n", re.MULTILINE)
_LABELS = ("model_name", "engine")

_Read = Callable[[EngineStats], float]

_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("num_requests_running", "Sequences in the running batch", lambda s: s.running),
    ("num_requests_waiting", "Sequences that wait for a place in the batch", lambda s: s.waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", lambda s: s.used_blocks / max(s.total_blocks, 1)),
)
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda s: s.prefix_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda s: s.prefix_hits),
    ("num_preemptions", "Sequences taken out of the batch to be recomputed", lambda s: s.preemptions),
    ("prompt_tokens", "Prompt tokens processed", lambda s: s.prompt_tokens),
    ("prompt_tokens_cached", "Prompt tokens that came from the prefix cache", lambda s: s.prompt_tokens_cached),
    ("generation_tokens", "Tokens drawn", lambda s: s.generation_tokens),
)
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_SLOW = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_HISTOGRAMS: tuple[tuple[str, str, Sequence[float]], ...] = (
    ("time_to_first_token_seconds", "From a request's arrival to its first token", _FIRST),
    ("inter_token_latency_seconds", "Between two tokens of a sequence", _FAST),
    ("request_time_per_output_token_seconds", "A sequence's mean time between tokens", _FAST),
    ("e2e_request_latency_seconds", "From a request's arrival to its end", _SLOW),
    ("request_decode_time_seconds", "From a sequence's first token to its last", _SLOW),
    ("request_prompt_tokens", "Prompt tokens of a sequence", _COUNTS),
    ("request_generation_tokens", "Tokens drawn for a sequence", _COUNTS),
)

FINISHED_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("invalid_request", "context_length", "overload", "draining", "deadline", "error", "http")


@dataclass(slots=True)
class SequenceTimes:
    """When a sequence arrived and got its first and its latest tokens, on one monotonic clock in seconds."""

    arrival: float
    first: float | None = None
    last: float | None = None


class ServerMetrics:
    """The metrics of one server, with a registry of their own."""

    def __init__(self, client: EngineClient, model_name: str, *, vllm_names: bool = True) -> None:
        self._client = client
        self._labels = (model_name, "0")
        self._vllm_names = vllm_names
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._observe = {
            name: Histogram(_OWN + name, text, _LABELS, buckets=buckets, registry=self._registry)
            .labels(*self._labels)
            .observe
            for name, text, buckets in _HISTOGRAMS
        }
        self._finished = self._counter("request_success", "Sequences that ended", "finished_reason", FINISHED_REASONS)
        refused = "Calls refused or failed without an answer"
        self._rejected = self._counter("admission_rejections", refused, "reason", REJECTIONS)

    def tokens(self, times: SequenceTimes, count: int, now: float) -> None:
        """A step brought a sequence `count` tokens."""
        if times.last is None:
            times.first = now
            self._observe["time_to_first_token_seconds"](now - times.arrival)
            count -= 1
        for _ in range(count):
            self._observe["inter_token_latency_seconds"](0.0 if times.last is None else (now - times.last) / count)
        times.last = now

    def sequence_finished(
        self, reason: str, times: SequenceTimes, now: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        """A sequence ended; `reason` is one of FINISHED_REASONS."""
        self._finished.labels(*self._labels, reason).inc()
        self._observe["e2e_request_latency_seconds"](now - times.arrival)
        self._observe["request_prompt_tokens"](prompt_tokens)
        self._observe["request_generation_tokens"](output_tokens)
        if times.first is not None and times.last is not None:
            seconds = times.last - times.first
            self._observe["request_decode_time_seconds"](seconds)
            if output_tokens > 1:
                self._observe["request_time_per_output_token_seconds"](seconds / (output_tokens - 1))

    def rejected(self, reason: str) -> None:
        """A call got an error; `reason` is one of REJECTIONS."""
        assert reason in REJECTIONS, reason
        self._rejected.labels(*self._labels, reason).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        own = _CREATED.sub(b"", generate_latest(self._registry))
        return own + _OWN_NAME.sub(rb"\1vllm:", own) if self._vllm_names else own

    def collect(self) -> Iterable[Metric]:
        """The engine's own counts, asked for by the registry at each scrape."""
        stats, info = self._client.stats(), self._client.info
        for kind, series in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text, read in series:
                family = kind(_OWN + name, text, labels=_LABELS)
                family.add_metric(self._labels, read(stats))
                yield family
        facts = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_blocks)}
        config = GaugeMetricFamily(_OWN + "cache_config_info", "Facts of the KV cache", labels=(*_LABELS, *facts))
        config.add_metric((*self._labels, *facts.values()), 1)
        yield config

    def _counter(self, name: str, text: str, label: str, values: Iterable[str]) -> Counter:
        """A counter with a label, at 0 for each of the label's values."""
        counter = Counter(_OWN + name, text, (*_LABELS, label), registry=self._registry)
        for value in values:
            counter.labels(*self._labels, value)
        return counter
