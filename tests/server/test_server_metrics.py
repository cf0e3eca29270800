"""/metrics read by prometheus_client's own parser."""

from __future__ import annotations

import math
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moebius.engine.client import (
    ExpertLoads,
    ExpertSpread,
    LayerLoad,
    LayerSpread,
    RankSpread,
)
from moebius.errors import EngineError, OverloadError
from moebius.parallel.traffic import Traffic
from server.serving import Server, engine, run, tokenizer

GAUGES = {
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_cached",
    "generation_tokens",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
    "request_success",
    "admission_rejections",
}
OWN_COUNTERS = {"engine_restarts", "requests_replayed", "tool_calls"} | {
    f"kv_disk_{what}"
    for what in (
        "reads",
        "misses",
        "writes",
        "dropped",
        "evictions",
        "late",
        "read_bytes",
        "written_bytes",
    )
}
OWN_GAUGES = {"kv_disk_files", "kv_disk_bytes"}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_num_preemptions",
    "request_max_num_generation_tokens",
    "iteration_tokens_total",
}
PROCESS = {
    "process_resident_memory_bytes",
    "process_cpu_seconds",
    "process_open_fds",
    "process_start_time_seconds",
}
LOAD = LayerLoad(3, 2, 100, 1.5, 0.25, 0.875, (1, 4), (100, 0, 50, 50, 0), (900, 9, 9, 9, 9))


async def scrape(server: Server) -> tuple[dict[str, str], dict[tuple[str, Any], float]]:
    """Types by family, values by sample name and label values other than the two that never
    change."""
    response = await server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    types, values = {}, {}
    for family in text_string_to_metric_families(response.text):
        assert family.name not in types
        types[family.name] = family.type
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith(("moebius_", "vllm:")):
                assert labels.pop("model_name") == "tiny" and labels.pop("engine") == "0"
            key = (
                sample.name,
                tuple(sorted(labels.values()))
                if len(labels) > 1
                else next(iter(labels.values()), None),
            )
            assert key not in values
            values[key] = sample.value
    return types, values


def test_all_families_under_both_names() -> None:
    async def check(server: Server) -> None:
        await server.complete()
        types, values = await scrape(server)
        for prefix in ("moebius_", "vllm:"):
            found = {
                name.removeprefix(prefix): kind
                for name, kind in types.items()
                if name.startswith(prefix)
            }
            own_gauges = OWN_GAUGES if prefix == "moebius_" else set()
            gauges = {name for name, kind in found.items() if kind == "gauge"}
            assert gauges == GAUGES | own_gauges
            own = OWN_COUNTERS if prefix == "moebius_" else set()
            assert {name for name, kind in found.items() if kind == "counter"} == COUNTERS | own
            assert {name for name, kind in found.items() if kind == "histogram"} == HISTOGRAMS
            assert values[prefix + "kv_cache_usage_perc", None] == 0.25
            assert values[prefix + "prefix_cache_hits_total", None] == 20
            facts = ("1048576", "16", "64", "int8")
            assert values[prefix + "cache_config_info", facts] == 1
        rest = {name for name in types if not name.startswith(("moebius_", "vllm:"))}
        assert rest >= PROCESS | {"http_requests"} and all(
            n.startswith(("process_", "http_")) for n in rest
        )
        shared = GAUGES | COUNTERS | HISTOGRAMS
        assert len(types) == 2 * len(shared) + len(OWN_COUNTERS | OWN_GAUGES) + len(rest)
        assert values["process_resident_memory_bytes", None] > 2**20
        assert (
            values["moebius_iteration_tokens_total_count", None]
            == values["vllm:num_preemptions_total", None] + 13
        )

    run(check)


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

        finished = {
            reason: value("request_success_total", reason)
            for reason in ("stop", "length", "abort", "error")
        }
        assert finished == {"stop": 1, "length": 3, "abort": 0, "error": 1}
        rejected = {
            r: value("admission_rejections_total", r)
            for r in ("invalid_request", "context_length", "error")
        }
        assert rejected == {"invalid_request": 2, "context_length": 1, "error": 1}
        assert value("admission_rejections_total", "http") == 1
        assert value("time_to_first_token_seconds_count") == 4
        assert value("inter_token_latency_seconds_count") == 3 * 4 + chat_tokens - 1
        assert value("e2e_request_latency_seconds_count") == 5
        assert value("request_generation_tokens_sum") == 15 + chat_tokens
        assert value("request_decode_time_seconds_count") == 4
        assert (
            0 < value("time_to_first_token_seconds_sum") < value("e2e_request_latency_seconds_sum")
        )
        assert value("generation_tokens_total") == 15 + chat_tokens

    run(check, engine("hello world"))


def test_the_number_of_series_does_not_grow_with_requests() -> None:
    async def check(server: Server) -> None:
        _, before = await scrape(server)
        for i in range(20):
            await server.post(
                "/v1/completions", {"prompt": "x", f"field{i}": 1, "user": f"user{i}"}
            )
            await server.post(
                "/v1/completions", {"prompt": f"{i}", "model": "alias", "max_tokens": 1}
            )
            await server.http.get(f"/route{i}")
        _, after = await scrape(server)
        new = {
            key for key in after.keys() - before.keys() if not key[0].startswith("http_requests")
        }
        assert not new, "a label's value came from a request"
        answers = {
            ("/metrics", "GET", "2xx"),
            ("/v1/completions", "POST", "2xx"),
            ("/v1/completions", "POST", "4xx"),
        }
        answers.add(("other", "GET", "4xx"))
        assert {labels for name, labels in after if name == "http_requests_total"} == {
            tuple(sorted(one)) for one in answers
        }

    run(check)


@pytest.mark.case("C21")
def test_requests_are_counted_by_route_and_status_refused_ones_too() -> None:
    async def check(server: Server) -> None:
        http, key = server.http, {"Authorization": "Bearer key"}
        await http.get("/v1/models/tiny", headers=key)
        await http.get("/v1/models/nobody/knows", headers=key)
        await http.get("/v1/models")
        await http.request("BREW", "/v1/models", headers=key)
        await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=key)
        await http.post("/v1/completions", content=b"{}", headers=key)
        big = {"Content-Type": "application/json", "Content-Length": str(2**30)}
        await http.post("/v1/completions", content=b"{}", headers={**key, **big})
        server.engine.refuse = OverloadError("full", retry_after=1)
        await http.post("/v1/completions", json={"prompt": "x"}, headers=key)
        await http.get("/secret?key=1", headers=key)
        page = (await http.get("/metrics", headers=key)).text
        families = text_string_to_metric_families(page)
        samples = [sample for family in families for sample in family.samples]
        found = {
            (s.labels["method"], s.labels["handler"], s.labels["status"]): s.value
            for s in samples
            if s.name == "http_requests_total"
        }
        assert found == {
            ("GET", "/v1/models/{id}", "2xx"): 1,
            ("GET", "/v1/models/{id}", "4xx"): 1,
            ("GET", "/v1/models", "4xx"): 1,
            ("other", "/v1/models", "4xx"): 1,
            ("POST", "/v1/completions", "2xx"): 1,
            ("POST", "/v1/completions", "4xx"): 2,
            ("POST", "/v1/completions", "5xx"): 1,
            ("GET", "other", "4xx"): 1,
        }

    run(check, api_keys=("key",))


@pytest.mark.case("C21")
def test_times_come_from_the_engine_and_preemptions_are_counted_a_request() -> None:
    async def check(server: Server) -> None:
        await server.complete(n=2, max_tokens=5, ignore_eos=True, stop=["never"])
        # Ends by a string, which the engine does not know of.
        stopped = await server.complete(max_tokens=400, ignore_eos=True, stop=["world"])
        assert stopped["choices"][0]["finish_reason"] == "stop"
        longest = 5 + stopped["usage"]["completion_tokens"]
        _, values = await scrape(server)
        for name in ("queue", "prefill", "decode", "inference"):
            assert values[f"moebius_request_{name}_time_seconds_count", None] == 3
        sums = {
            n: values[f"moebius_request_{n}_time_seconds_sum", None]
            for n in ("prefill", "decode", "inference")
        }
        assert sums["prefill"] + sums["decode"] == pytest.approx(sums["inference"], abs=1e-6)
        assert values["moebius_request_num_preemptions_sum", None] == 3 * 7
        assert values["moebius_request_max_num_generation_tokens_sum", None] == longest

    run(check, engine("hello world", preemptions=7))


def test_drafts_are_counted_under_vllms_names() -> None:
    async def check(server: Server) -> None:
        _, values = await scrape(server)
        for prefix in ("moebius_", "vllm:"):
            name = prefix + "spec_decode_num_"
            assert values[f"{name}drafts_total", None] == 6
            assert values[f"{name}draft_tokens_total", None] == 20
            assert values[f"{name}accepted_tokens_total", None] == 9
            places = [
                values[f"{name}accepted_tokens_per_pos_total", str(place)] for place in range(7)
            ]
            assert places == [5, 3, 1, 0, 0, 0, 0]

    run(check, engine())


@pytest.mark.case("C21")
def test_expert_loads_as_metrics_and_as_json() -> None:
    async def check(server: Server) -> None:
        _, values = await scrape(server)
        found = {
            name: value
            for (name, layer), value in values.items()
            if layer == "3" and "vllm" not in name and "per_pos" not in name
        }
        assert found == {
            "moebius_expert_load_max_over_mean": 1.5,
            "moebius_expert_load_cv": 0.25,
            "moebius_router_entropy": 0.875,
            "moebius_dead_experts": 2,
            "moebius_expert_load_tokens": 100,
        }
        assert all(math.isnan(values[name, "5"]) for name in found if not name.endswith("tokens"))
        stats = (await server.http.get("/v1/moe/stats")).json()
        assert stats["object"] == "moe.stats" and stats["window_steps"] == 40
        layer, idle = stats["layers"]
        assert (
            layer["layer"] == 3
            and layer["top_k"] == 2
            and layer["tokens"] == 100
            and layer["dead"] == [1, 4]
        )
        assert layer["pairs"] == [100, 0, 50, 50, 0] and layer["total_pairs"] == [900, 9, 9, 9, 9]
        assert idle["max_over_mean"] is None

    nan = math.nan
    idle = LayerLoad(5, 2, 0, nan, nan, nan, (), (0, 0), (0, 0))
    run(check, engine(loads=ExpertLoads(40, (LOAD, idle))))


@pytest.mark.case("C21")
def test_a_dense_model_exports_no_experts() -> None:
    async def check(server: Server) -> None:
        types, _ = await scrape(server)
        assert not [name for name in types if "expert" in name or "router" in name]
        assert (await server.http.get("/v1/moe/stats")).json()["layers"] == []

    run(check)


@pytest.mark.case("C21")
@pytest.mark.parametrize("deferred, capacity", [(0, 2), (1, 1), (2, 0), (9, 0)])
def test_all_that_wait_do_so_for_a_reason(deferred: int, capacity: int) -> None:
    """The engine counts both between two scrapes, not at one instant; together they are what
    waits."""

    async def check(server: Server) -> None:
        _, values = await scrape(server)
        assert values["vllm:num_requests_waiting", None] == 2
        assert values["vllm:num_requests_waiting_by_reason", "capacity"] == capacity
        assert values["vllm:num_requests_waiting_by_reason", "deferred"] == 2 - capacity

    run(check, engine(deferred=deferred))


def test_how_ranks_share_experts_is_told() -> None:
    spread = ExpertSpread(
        epoch=3,
        moves=2,
        ranks=(
            RankSpread(0, True, Traffic(7, 100, 200, 0.5)),
            RankSpread(1, False, Traffic()),
        ),
        layers=(
            LayerSpread(1, ((0, 1), (2, 0)), imbalance=1.25, imbalance_linear=1.5),
            LayerSpread(4, ((0, 1, 2), (1,)), imbalance=1.0, imbalance_linear=1.0),
        ),
    )

    async def check(server: Server) -> None:
        _, values = await scrape(server)
        name = "moebius_expert_rank_imbalance"
        assert {key[1]: value for key, value in values.items() if key[0] == name} == {
            ("1", "present"): 1.25,
            ("1", "linear"): 1.5,
            ("4", "present"): 1.0,
            ("4", "linear"): 1.0,
        }
        assert values["moebius_group_epochs_total", None] == 3
        assert values["moebius_expert_moves_total", None] == 2
        exchanged = {key: value for key, value in values.items() if "exchange" in key[0]}
        assert exchanged == {
            ("moebius_exchange_calls_total", "0"): 7,
            ("moebius_exchange_calls_total", "1"): 0,
            ("moebius_exchange_bytes_out_total", "0"): 100,
            ("moebius_exchange_bytes_out_total", "1"): 0,
            ("moebius_exchange_bytes_in_total", "0"): 200,
            ("moebius_exchange_bytes_in_total", "1"): 0,
            ("moebius_exchange_wait_seconds_total", "0"): 0.5,
            ("moebius_exchange_wait_seconds_total", "1"): 0,
        }, "under our own names alone"
        group = (await server.http.get("/v1/moe/stats")).json()["group"]
        assert group == {
            "epoch": 3,
            "moves": 2,
            "ranks": [
                {
                    "rank": 0,
                    "computing": True,
                    "traffic": {
                        "calls": 7,
                        "bytes_out": 100,
                        "bytes_in": 200,
                        "seconds_waited": 0.5,
                    },
                },
                {
                    "rank": 1,
                    "computing": False,
                    "traffic": {
                        "calls": 0,
                        "bytes_out": 0,
                        "bytes_in": 0,
                        "seconds_waited": 0.0,
                    },
                },
            ],
            "layers": [
                {
                    "layer": 1,
                    "held": [[0, 1], [2, 0]],
                    "imbalance": 1.25,
                    "imbalance_linear": 1.5,
                },
                {
                    "layer": 4,
                    "held": [[0, 1, 2], [1]],
                    "imbalance": 1.0,
                    "imbalance_linear": 1.0,
                },
            ],
        }

    run(check, spread=lambda: spread)


def test_one_process_has_no_group() -> None:
    async def check(server: Server) -> None:
        types, _ = await scrape(server)
        assert not [name for name in types if name.split("_")[1] in ("group", "exchange")]
        assert "moebius_expert_rank_imbalance" not in types
        assert (await server.http.get("/v1/moe/stats")).json()["group"] is None

    run(check)
