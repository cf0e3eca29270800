"""/metrics read by prometheus_client's own parser."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from moebius.errors import EngineError
from server.serving import Server, engine, run, tokenizer

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "request_success",
    "admission_rejections",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
}


async def scrape(server: Server) -> tuple[dict[str, str], dict[tuple[str, Any], float]]:
    """Types by family, values by sample name and label values other than the two that never change."""
    response = await server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    types, values = {}, {}
    for family in text_string_to_metric_families(response.text):
        assert family.name not in types
        types[family.name] = family.type
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny" and labels.pop("engine") == "0"
            key = (
                sample.name,
                tuple(sorted(labels.values())) if len(labels) > 1 else next(iter(labels.values()), None),
            )
            assert key not in values
            values[key] = sample.value
    return types, values


def test_all_families_under_both_names() -> None:
    async def check(server: Server) -> None:
        await server.complete()
        types, values = await scrape(server)
        for prefix in ("moebius_", "vllm:"):
            found = {name.removeprefix(prefix): kind for name, kind in types.items() if name.startswith(prefix)}
            assert {name for name, kind in found.items() if kind == "gauge"} == GAUGES
            assert {name for name, kind in found.items() if kind == "counter"} == COUNTERS
            assert {name for name, kind in found.items() if kind == "histogram"} == HISTOGRAMS
            assert values[prefix + "kv_cache_usage_perc", None] == 0.25
            assert values[prefix + "prefix_cache_hits_total", None] == 20
            assert values[prefix + "cache_config_info", ("16", "64")] == 1
        assert len(types) == 2 * len(GAUGES | COUNTERS | HISTOGRAMS)

    run(check)


def test_vllms_names_can_be_left_out() -> None:
    async def check(server: Server) -> None:
        types, _ = await scrape(server)
        assert types and all(name.startswith("moebius_") for name in types)

    run(check, vllm_metric_names=False)


def test_what_the_front_door_counts() -> None:
    async def check(server: Server) -> None:
        await server.complete(n=3, max_tokens=5, ignore_eos=True)
        await server.chat(max_tokens=100)
        for fields in ({"n": 99}, {"zzz": 1}, {"prompt": [5] * 600}):
            await server.post("/v1/completions", {"prompt": "x", **fields})
        server.engine.fault = lambda request, step: EngineError("x")
        await server.post("/v1/completions", {"prompt": "x"})
        await server.http.get("/nowhere")
        _, values = await scrape(server)
        chat_tokens = len(tokenizer().encode("hello world", False)) + 1

        def value(name: str, label: Any = None) -> float:
            assert values["moebius_" + name, label] == values["vllm:" + name, label]
            return values["vllm:" + name, label]

        finished = {reason: value("request_success_total", reason) for reason in ("stop", "length", "abort", "error")}
        assert finished == {"stop": 1, "length": 3, "abort": 0, "error": 1}
        rejected = {r: value("admission_rejections_total", r) for r in ("invalid_request", "context_length", "error")}
        assert rejected == {"invalid_request": 2, "context_length": 1, "error": 1}
        assert value("admission_rejections_total", "http") == 1
        assert value("time_to_first_token_seconds_count") == 4
        assert value("inter_token_latency_seconds_count") == 3 * 4 + chat_tokens - 1
        assert value("e2e_request_latency_seconds_count") == 5
        assert value("request_generation_tokens_sum") == 15 + chat_tokens
        assert value("request_decode_time_seconds_count") == 4
        assert 0 < value("time_to_first_token_seconds_sum") < value("e2e_request_latency_seconds_sum")
        assert value("generation_tokens_total") == 15 + chat_tokens

    run(check, engine("hello world"))


def test_the_number_of_series_does_not_grow_with_requests() -> None:
    async def check(server: Server) -> None:
        _, before = await scrape(server)
        for i in range(20):
            await server.post("/v1/completions", {"prompt": "x", f"field{i}": 1, "user": f"user{i}"})
            await server.post("/v1/completions", {"prompt": f"{i}", "model": "alias", "max_tokens": 1})
            await server.http.get(f"/route{i}")
        _, after = await scrape(server)
        assert before.keys() == after.keys()

    run(check)
