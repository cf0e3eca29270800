"""Spans: what each request leaves, whose child it is, and that no text gets out."""

from __future__ import annotations

import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from moebius.errors import ConfigError
from moebius.server.spans import Spans
from server.serving import MODEL, Server, engine, run

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exported() -> tuple[Spans, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider), exporter


def test_a_request_leaves_a_span_with_its_times(
    exported: tuple[Spans, InMemorySpanExporter],
) -> None:
    spans, exporter = exported

    async def check(server: Server) -> None:
        before = time.time_ns()
        body = {"model": MODEL, "prompt": "a secret prompt", "max_tokens": 3}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        response = await server.post("/v1/completions", body, headers=headers)
        assert response.status_code == 200
        (span,) = exporter.get_finished_spans()
        assert span.name == "POST /v1/completions" and span.parent is not None
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
        assert before <= span.start_time + 10**6 and span.end_time <= time.time_ns()
        scheduled, first = span.events
        assert [scheduled.name, first.name] == ["scheduled", "first token"]
        assert span.start_time <= scheduled.timestamp <= first.timestamp <= span.end_time
        usage = response.json()["usage"]
        told = dict(span.attributes or {})
        assert told["http.response.status_code"] == 200
        assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 3
        assert told["moebius.request_id"] == response.headers["x-request-id"]
        assert "secret" not in str(told)

    run(check, engine(step_seconds=0.01), spans=spans)


@pytest.mark.parametrize(
    "shown", [[], ["junk"], ["00-" + "0" * 32 + f"-{PARENT}-01"], [f"00-{TRACE}-{PARENT}-01"] * 2]
)
def test_what_is_no_trace_context_begins_a_trace(
    exported: tuple[Spans, InMemorySpanExporter], shown: list[str]
) -> None:
    spans, exporter = exported

    async def check(server: Server) -> None:
        headers = [("traceparent", value) for value in shown]
        await server.http.post("/v1/completions", headers=headers, json={"prompt": []})
        (span,) = exporter.get_finished_spans()
        assert span.parent is None
        told = dict(span.attributes or {})
        assert (told["http.response.status_code"], told["moebius.reason"]) == (
            400,
            "invalid_request",
        )
        assert span.status.status_code is StatusCode.UNSET

    run(check, spans=spans)


def test_it_is_off_unless_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert Spans.from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    spans = Spans.from_environment()
    assert spans is not None
    spans.close()
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'moebius\[otel\]'"):
        Spans.from_environment()
