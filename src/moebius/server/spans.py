"""A span of OpenTelemetry for each request, where a collector is named; the extra `otel` has what
it takes.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set. All else is OpenTelemetry's own to configure, by its
variables: OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS and so on. A span says
what the log line says: ids, numbers and names that are the operator's, and no text.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from moebius import __version__
from moebius.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"

# What others call the facts of a log line: OpenTelemetry's semantic conventions.
_NAMES = {
    "status": "http.response.status_code",
    "method": "http.request.method",
    "route": "http.route",
    "code": "error.type",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}
# Seconds from the request's beginning, which become events in its span.
_EVENTS = {"scheduled_seconds": "scheduled", "first_token_seconds": "first token"}


class Spans:
    """Records requests that have ended. Exporting is a thread's of its own, and loses spans rather
    than hold anything up."""

    def __init__(self, provider: "TracerProvider", wall: Callable[[], int] = time.time_ns) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("moebius", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._wall = wall

    @classmethod
    def from_environment(cls) -> Self | None:
        """None where no collector is named. ConfigError where one is, without the extra."""
        if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"{ENDPOINT} is set, but OpenTelemetry is not installed; "
                "pip install 'moebius[otel]', or unset it"
            ) from error
        # What OTEL_SERVICE_NAME says wins.
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "moebius"}
        provider = TracerProvider(resource=Resource.create(named))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def record(self, traceparent: str | None, seconds: float, facts: Mapping[str, object]) -> None:
        """A request that took so long ends now.

        traceparent   what its client sent of W3C's trace context: the span is a child of that one
        facts         what its log line says
        """
        from opentelemetry.trace import SpanKind, StatusCode

        carrier = {} if traceparent is None else {"traceparent": traceparent}
        ended = self._wall()
        started = ended - int(seconds * 1e9)
        span = self._tracer.start_span(
            f"{facts.get('method')} {facts.get('route')}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=started,
            attributes=_attributes(facts),
        )
        for name, event in _EVENTS.items():
            after = facts.get(name)
            if isinstance(after, float):
                span.add_event(event, timestamp=started + int(after * 1e9))
        status = facts.get("status")
        if isinstance(status, int) and status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(end_time=ended)

    def close(self) -> None:
        """Export what is left, and stop."""
        self._provider.shutdown()


def _attributes(facts: Mapping[str, object]) -> dict[str, Any]:
    return {
        _NAMES.get(name, f"moebius.{name}"): value
        for name, value in facts.items()
        if value is not None and name not in _EVENTS
    }
