"""Prometheus metrics: the engine's own counts at scrape time, and what the front door measures.

Everything is recorded once, under `moebius_`; vLLM's names are the same series again. Label values are fixed when the
server starts; none comes from a request.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moebius.config import package_table
from moebius.engine.client import EngineClient

_OWN = "moebius_"
_OWN_NAME = re.compile(rb"^(# HELP |# TYPE )?moebius_", re.MULTILINE)
_CREATED = re.compile(rb"^(?:# HELP |# TYPE )?moebius_\w+_created[ {].*\n", re.MULTILINE)
_LABELS = ("model_name", "engine")

_TABLE = package_table("server/metrics.toml")

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
            name: Histogram(_OWN + name, text, _LABELS, buckets=_TABLE["buckets"][buckets], registry=self._registry)
            .labels(*self._labels)
            .observe
            for name, (text, buckets) in _TABLE["histograms"].items()
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
        for kind, series in ((GaugeMetricFamily, _TABLE["gauges"]), (CounterMetricFamily, _TABLE["counters"])):
            for name, (text, field) in series.items():
                family = kind(_OWN + name, text, labels=_LABELS)
                family.add_metric(self._labels, getattr(stats, field))
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
