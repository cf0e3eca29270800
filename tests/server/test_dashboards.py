"""The series that vLLM's Grafana dashboards draw, as a real engine exports them after some
requests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from server.serving import wait_until
from serving import serving

HISTOGRAM = ("_bucket", "_sum", "_count")


class Panel(NamedTuple):
    """What a panel shows, the family it reads, which samples of it, and the labels that it filters
    or groups by."""

    shows: str
    family: str
    samples: tuple[str, ...]
    labels: tuple[str, ...] = ()


PERFORMANCE = [
    Panel(
        "end-to-end latency: mean over time, percentiles", "e2e_request_latency_seconds", HISTOGRAM
    ),
    Panel(
        "time to first token: mean over time, percentiles", "time_to_first_token_seconds", HISTOGRAM
    ),
    Panel(
        "time between tokens: mean over time, percentiles", "inter_token_latency_seconds", HISTOGRAM
    ),
    Panel("tokens a second: drawn", "generation_tokens", ("_total",), ("model_name",)),
    Panel("tokens a second: of prompts", "prompt_tokens", ("_total",)),
    Panel("tokens a second: steps", "iteration_tokens_total", ("_count",)),
]
QUERIES = [
    Panel(
        "successful requests over time, their rate", "request_success", ("_total",), ("model_name",)
    ),
    Panel(
        "latency percentiles by model", "e2e_request_latency_seconds", ("_bucket",), ("model_name",)
    ),
    Panel(
        "prompt sizes: distribution, percentiles",
        "request_prompt_tokens",
        ("_bucket",),
        ("model_name",),
    ),
    Panel(
        "prompt sizes: mean; prompt tokens over time", "prompt_tokens", ("_total",), ("model_name",)
    ),
    Panel("drawn tokens over time", "generation_tokens", ("_total",), ("model_name",)),
]
MODEL = ("model_name",)
OVERVIEW = [
    Panel("end-to-end latency", "e2e_request_latency_seconds", HISTOGRAM, MODEL),
    Panel("token throughput: prompts", "prompt_tokens", ("_total",), MODEL),
    Panel("token throughput: drawn", "generation_tokens", ("_total",), MODEL),
    Panel("time between tokens", "inter_token_latency_seconds", HISTOGRAM, MODEL),
    Panel("scheduler: running", "num_requests_running", ("",), MODEL),
    Panel("scheduler: waiting", "num_requests_waiting", ("",), MODEL),
    Panel("time to first token", "time_to_first_token_seconds", HISTOGRAM, MODEL),
    Panel("cache in use", "kv_cache_usage_perc", ("",), MODEL),
    Panel("heat map of prompt lengths", "request_prompt_tokens", ("_bucket",), MODEL),
    Panel("heat map of answer lengths", "request_generation_tokens", ("_bucket",), MODEL),
    Panel("finish reasons", "request_success", ("_total",), ("model_name", "finished_reason")),
    Panel("time in the queue", "request_queue_time_seconds", ("_sum",), MODEL),
    Panel("time in prefill", "request_prefill_time_seconds", ("_sum",), MODEL),
    Panel("time in decode", "request_decode_time_seconds", ("_sum",), MODEL),
    Panel("longest answer of a prompt", "request_max_num_generation_tokens", ("_sum",), MODEL),
]


@pytest.fixture(scope="module")
def samples(tiny_model: Path) -> Iterator[list[Sample]]:
    with serving(tiny_model, "tiny") as address, httpx.Client(base_url=address, timeout=30) as http:
        for prompt in ("hello", "def fibonacci(n):"):
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "n": 2, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
        chat = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 8,
            "stream": True,
        }
        assert http.post("/v1/chat/completions", json=chat).status_code == 200
        found: list[Sample] = []

        def all_counted() -> bool:
            """An answer is counted when it has been sent, which its client may know a moment
            before."""
            families = text_string_to_metric_families(http.get("/metrics").text)
            found[:] = [sample for family in families for sample in family.samples]
            posts = (
                each
                for each in found
                if each.name == "http_requests_total" and each.labels["method"] == "POST"
            )
            longest = "vllm:request_max_num_generation_tokens_count"
            ended = (each.value for each in found if each.name == longest)
            return sum(each.value for each in posts) >= 3 and sum(ended) >= 3

        wait_until(all_counted)
        yield found


@pytest.mark.case("C21")
@pytest.mark.parametrize(
    "panel", PERFORMANCE + QUERIES + OVERVIEW, ids=lambda panel: f"{panel.shows}, {panel.family}"
)
def test_no_panel_is_empty(samples: list[Sample], panel: Panel) -> None:
    for suffix in panel.samples:
        found = [sample for sample in samples if sample.name == f"vllm:{panel.family}{suffix}"]
        assert found, f"no {panel.family}{suffix}"
        for sample in found:
            assert set(panel.labels) <= set(sample.labels) and sample.labels["model_name"] == "tiny"
            assert ("le" in sample.labels) == (suffix == "_bucket")
        if suffix:
            assert any(sample.value > 0 for sample in found), f"{panel.family}{suffix} stays at 0"
        if suffix == "_bucket":
            assert any(sample.labels["le"] == "+Inf" for sample in found)


# Bounds that vLLM documents, and that its dashboards offer as targets.
LATENCIES = [
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
]
FIRST = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
]
TOKEN = [
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
]
STEP = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
BOUNDS = {
    "time_to_first_token_seconds": [*FIRST, 2560],
    "inter_token_latency_seconds": TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "iteration_tokens_total": STEP,
    "e2e_request_latency_seconds": LATENCIES,
    **{
        f"request_{name}_time_seconds": LATENCIES
        for name in ("queue", "prefill", "decode", "inference")
    },
}


@pytest.mark.case("C21")
@pytest.mark.parametrize("family", BOUNDS)
def test_a_share_within_a_target_can_be_asked_for(samples: list[Sample], family: str) -> None:
    bounds = {sample.labels["le"] for sample in samples if sample.name == f"vllm:{family}_bucket"}
    assert {floatToGoString(bound) for bound in BOUNDS[family]} <= bounds


@pytest.mark.case("C21")
def test_the_share_of_server_errors_can_be_asked_for(samples: list[Sample]) -> None:
    answers = [sample for sample in samples if sample.name == "http_requests_total"]
    assert {sample.labels["status"] for sample in answers} == {"2xx"}, (
        "vLLM counts by class, and asks for 5xx"
    )
    assert sum(sample.value for sample in answers if sample.labels["method"] == "POST") == 3


@pytest.mark.case("C21")
def test_times_of_a_request_add_up(samples: list[Sample]) -> None:
    """Queue and inference are at most the whole as its client sees it; prefill and decode are
    inference."""
    value = {
        sample.name: sample.value for sample in samples if sample.name.endswith(("_sum", "_count"))
    }
    times = {
        name: f"vllm:request_{name}_time_seconds"
        for name in ("queue", "prefill", "decode", "inference")
    }
    assert {value[f"{name}_count"] for name in times.values()} == {5}
    total = {name: value[f"{full}_sum"] for name, full in times.items()}
    assert all(seconds > 0 for seconds in total.values())
    assert total["prefill"] + total["decode"] == pytest.approx(total["inference"])
    assert total["queue"] + total["inference"] <= value["vllm:e2e_request_latency_seconds_sum"]
    assert value["vllm:request_max_num_generation_tokens_sum"] <= 12 + 12 + 8
    assert value["vllm:request_max_num_generation_tokens_count"] == 3


@pytest.mark.case("C21")
def test_each_layer_says_how_its_experts_are_loaded(samples: list[Sample]) -> None:
    figures = (
        "expert_load_max_over_mean",
        "expert_load_cv",
        "router_entropy",
        "dead_experts",
        "expert_load_tokens",
    )
    found = {name: [s for s in samples if s.name == f"moebius_{name}"] for name in figures}
    assert all([s.labels["layer"] for s in family] == ["0", "1"] for family in found.values())
    for most, cv, entropy, dead, tokens in zip(*found.values(), strict=True):
        assert 1 <= most.value <= 4 and 0 <= cv.value <= math.sqrt(3)
        assert 0 < entropy.value <= math.log(4) and 0 <= dead.value <= 2 and tokens.value > 50
    assert not any(
        sample.name.startswith(("vllm:expert", "vllm:router", "vllm:dead")) for sample in samples
    )
