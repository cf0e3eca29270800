"""Prometheus metrics: the engine's own counts at scrape time, and what the front door measures.

What vLLM has too is recorded once, under `moebius_`; vLLM's names are the same series again. Label
values are fixed when the server starts, or of a fixed few; none comes from a request.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from moebius.engine.client import (
    STEP_TOKENS_BOUNDS,
    EngineClient,
    EngineStats,
    ExpertSpread,
    LayerLoad,
    StepOutput,
)
from moebius.files import package_table
from moebius.server.recent import Recent

_OWN = "moebius_"
_OWN_NAME = re.compile(rb"^(# HELP |# TYPE )?moebius_", re.MULTILINE)
_CREATED = re.compile(rb"^(?:# HELP |# TYPE )?\w+_created[ {].*\n", re.MULTILINE)
_LABELS = ("model_name", "engine")
OTHER = "other"
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

Spread = Callable[[], ExpertSpread | None]
"""How ranks share the model's experts; None where one process has them all."""

_TABLE = package_table("server/metrics.toml")

FINISHED_REASONS = ("stop", "length", "abort", "error")
TOOL_CALLS = ("parsed", "malformed")
REJECTIONS = (
    "invalid_request",
    "context_length",
    "overload",
    "rate_limit",
    "draining",
    "deadline",
    "error",
    "http",
)


@dataclass(slots=True)
class SequenceTimes:
    """When what happened to a sequence, in seconds on one monotonic clock, the engine's.

    first, last      its first and its latest tokens reached the front door
    scheduled        it first had a place in a step
    first_computed   its first tokens were computed
    ended            its latest output was computed
    """

    arrival: float
    first: float | None = None
    last: float | None = None
    scheduled: float | None = None
    first_computed: float | None = None
    ended: float = 0.0
    num_preemptions: int = 0

    def told(self) -> dict[str, float]:
        """What a log line says: seconds from the arrival, as far as it came."""
        found = {"scheduled_seconds": self.scheduled, "first_token_seconds": self.first}
        return {name: at - self.arrival for name, at in found.items() if at is not None}

    def computed(self, output: StepOutput) -> None:
        """Note what the engine says with an output."""
        self.ended = output.at
        if output.scheduled is not None:
            self.scheduled = output.scheduled
            self.num_preemptions = output.num_preemptions
        if output.token_ids and self.first_computed is None:
            self.first_computed = output.at


class ServerMetrics:
    """The metrics of one server, with a registry of their own."""

    def __init__(
        self,
        client: EngineClient,
        model_name: str,
        *,
        spread: Spread = lambda: None,
    ) -> None:
        self.recent: Recent | None = None
        """Hears what happens, too, while a live page is open."""
        self._client = client
        self._labels = (model_name, "0")
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        # What goes by one name only.
        self._single = CollectorRegistry(auto_describe=False)
        self._single.register(_Experts(client, self._labels))
        self._single.register(_Ranks(spread, self._labels))
        self._single.register(_Engines(client, self._labels))
        ProcessCollector(registry=self._single)
        self._answered = Counter(
            "http_requests",
            "Requests, refused ones too",
            ("method", "handler", "status"),
            registry=self._single,
        )
        self._tool_calls = Counter(
            _OWN + "tool_calls",
            "Tool calls in replies to chats",
            (*_LABELS, "result"),
            registry=self._single,
        )
        for result in TOOL_CALLS:
            self._tool_calls.labels(*self._labels, result)
        self._observe: dict[str, Callable[[float], None]] = {}
        for name, (text, buckets) in _TABLE["histograms"].items():
            histogram = Histogram(
                _OWN + name,
                text,
                _LABELS,
                buckets=_TABLE["buckets"][buckets],
                registry=self._registry,
            )
            self._observe[name] = histogram.labels(*self._labels).observe
        self._finished = self._counter(
            "request_success", "Sequences that ended", "finished_reason", FINISHED_REASONS
        )
        refused = "Calls refused or failed without an answer"
        self._rejected = self._counter("admission_rejections", refused, "reason", REJECTIONS)

    def tokens(self, times: SequenceTimes, count: int, now: float) -> None:
        """A step brought a sequence `count` tokens."""
        if times.last is None:
            times.first = now
            self._observe["time_to_first_token_seconds"](now - times.arrival)
            if self.recent is not None:
                self.recent.first_token.add(now - times.arrival)
            count -= 1
        for _ in range(count):
            seconds = 0.0 if times.last is None else (now - times.last) / count
            self._observe["inter_token_latency_seconds"](seconds)
            if self.recent is not None:
                self.recent.between_tokens.add(seconds)
        times.last = now

    def sequence_finished(
        self, reason: str, times: SequenceTimes, now: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        """A sequence ended; `reason` is one of FINISHED_REASONS."""
        self._finished.labels(*self._labels, reason).inc()
        if self.recent is not None:
            self.recent.finished[reason] += 1
        self._observe["e2e_request_latency_seconds"](now - times.arrival)
        self._observe["request_prompt_tokens"](prompt_tokens)
        self._observe["request_generation_tokens"](output_tokens)
        self._observe["request_num_preemptions"](times.num_preemptions)
        if times.scheduled is not None:
            self._observe["request_queue_time_seconds"](times.scheduled - times.arrival)
            self._observe["request_inference_time_seconds"](times.ended - times.scheduled)
            if times.first_computed is not None:
                self._observe["request_prefill_time_seconds"](
                    times.first_computed - times.scheduled
                )
        if times.first_computed is not None:
            seconds = times.ended - times.first_computed
            self._observe["request_decode_time_seconds"](seconds)
            if output_tokens > 1:
                self._observe["request_time_per_output_token_seconds"](
                    seconds / (output_tokens - 1)
                )

    def tool_calls(self, parsed: int, malformed: int) -> None:
        """A reply to a chat ended: so many calls of it parsed, and so many did not."""
        for result, count in zip(TOOL_CALLS, (parsed, malformed), strict=True):
            self._tool_calls.labels(*self._labels, result).inc(count)

    def prompt_finished(self, longest: int) -> None:
        """All choices of a prompt have ended; the longest has so many tokens."""
        self._observe["request_max_num_generation_tokens"](longest)

    def answered(self, method: str, handler: str, status: int) -> None:
        """A request got a response; `handler` is a route's template or OTHER.

        Status is counted by its class, 2xx to 5xx, as vLLM does, whose dashboards ask for `5xx`.
        """
        method = method if method in _METHODS else OTHER
        self._answered.labels(method, handler, f"{status // 100}xx").inc()

    def rejected(self, reason: str) -> None:
        """A call got an error; `reason` is one of REJECTIONS."""
        assert reason in REJECTIONS, reason
        self._rejected.labels(*self._labels, reason).inc()
        if self.recent is not None:
            self.recent.refused[reason] += 1

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        own = _CREATED.sub(b"", generate_latest(self._registry))
        single = _CREATED.sub(b"", generate_latest(self._single))
        return own + _OWN_NAME.sub(rb"\1vllm:", own) + single

    def collect(self) -> Iterable[Metric]:
        """The engine's own counts, asked for by the registry at each scrape."""
        stats = self._client.stats()
        info = self._client.info
        for kind, series in (
            (GaugeMetricFamily, _TABLE["gauges"]),
            (CounterMetricFamily, _TABLE["counters"]),
        ):
            for name, (text, field) in series.items():
                family = kind(_OWN + name, text, labels=_LABELS)
                family.add_metric(self._labels, getattr(stats, field))
                yield family
        yield self._waiting_by_reason(stats)
        yield self._step_tokens(stats)
        yield self._accepted_drafts(stats)
        facts = {
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "cache_dtype": info.kv_dtype,
            "kv_cache_memory_bytes": str(info.kv_bytes),
        }
        config = GaugeMetricFamily(
            _OWN + "cache_config_info", "Facts of the KV cache", labels=(*_LABELS, *facts)
        )
        config.add_metric((*self._labels, *facts.values()), 1)
        yield config

    def _waiting_by_reason(self, stats: EngineStats) -> Metric:
        """With vLLM's two reasons, which together are all that wait."""
        text = (
            "Sequences that wait for room (capacity), or for a prefix that another computes "
            "(deferred)"
        )
        family = GaugeMetricFamily(
            _OWN + "num_requests_waiting_by_reason", text, labels=(*_LABELS, "reason")
        )
        deferred = min(stats.deferred, stats.waiting)
        for reason, count in (("capacity", stats.waiting - deferred), ("deferred", deferred)):
            family.add_metric((*self._labels, reason), count)
        return family

    def _step_tokens(self, stats: EngineStats) -> Metric:
        bounds = [*map(floatToGoString, STEP_TOKENS_BOUNDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(stats.step_tokens), strict=True))
        family = HistogramMetricFamily(
            _OWN + "iteration_tokens_total", "Tokens computed in a step", labels=_LABELS
        )
        family.add_metric(self._labels, buckets, stats.step_tokens_sum)
        return family

    def _accepted_drafts(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            _OWN + "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were right, by their place behind the last token",
            labels=(*_LABELS, "position"),
        )
        for place, count in enumerate(stats.accepted_per_place):
            family.add_metric((*self._labels, str(place)), count)
        return family

    def _counter(self, name: str, text: str, label: str, values: Iterable[str]) -> Counter:
        """A counter with a label, at 0 for each of the label's values."""
        counter = Counter(_OWN + name, text, (*_LABELS, label), registry=self._registry)
        for value in values:
            counter.labels(*self._labels, value)
        return counter


class _Experts(Collector):
    """How each layer's router spreads the tokens: of the last steps, see
    EngineClient.expert_loads."""

    def __init__(self, client: EngineClient, labels: tuple[str, str]) -> None:
        self._client = client
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        layers = self._client.expert_loads().layers
        for name, (text, figure) in _TABLE["experts"].items() if layers else ():
            family = GaugeMetricFamily(_OWN + name, text, labels=(*_LABELS, "layer"))
            for layer in layers:
                family.add_metric((*self._labels, str(layer.layer)), _figure(layer, figure))
            yield family


class _Ranks(Collector):
    """How ranks share the experts, and what they exchange: nothing where one process has all."""

    def __init__(self, spread: Spread, labels: tuple[str, str]) -> None:
        self._spread = spread
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        spread = self._spread()
        if spread is None:
            return
        text = "Tokens of the busiest rank over the mean, 1 when even: by the present placement of "
        text += "experts, and by that at the start"
        family = GaugeMetricFamily(
            _OWN + "expert_rank_imbalance", text, labels=(*_LABELS, "layer", "placement")
        )
        for layer in spread.layers:
            number = str(layer.layer)
            family.add_metric((*self._labels, number, "present"), layer.imbalance)
            family.add_metric((*self._labels, number, "linear"), layer.imbalance_linear)
        yield family
        for name, (text, figure) in _TABLE["group"].items():
            counter = CounterMetricFamily(_OWN + name, text, labels=_LABELS)
            counter.add_metric(self._labels, getattr(spread, figure))
            yield counter
        for name, (text, figure) in _TABLE["exchange"].items():
            counter = CounterMetricFamily(_OWN + name, text, labels=(*_LABELS, "rank"))
            for rank in spread.ranks:
                counter.add_metric((*self._labels, str(rank.rank)), getattr(rank.traffic, figure))
            yield counter


class _Engines(Collector):
    """How many engines in processes of their own were lost, and what a KV cache on disk does."""

    def __init__(self, client: EngineClient, labels: tuple[str, str]) -> None:
        self._client = client
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        stats = self._client.stats()
        for name, (text, field) in _TABLE["losses"].items():
            family = CounterMetricFamily(_OWN + name, text, labels=_LABELS)
            family.add_metric(self._labels, getattr(stats, field))
            yield family
        for kind, table in (
            (GaugeMetricFamily, "disk_gauges"),
            (CounterMetricFamily, "disk_counters"),
        ):
            for name, (text, field) in _TABLE[table].items():
                series = kind(_OWN + name, text, labels=_LABELS)
                series.add_metric(self._labels, getattr(stats.disk, field))
                yield series


def _figure(layer: LayerLoad, name: str) -> float:
    """One figure of a layer; of no tokens there is none, not even that no expert is dead."""
    if name == "dead":
        return float(len(layer.dead)) if layer.tokens else math.nan
    return float(getattr(layer, name))
