"""Each technique taken away from a tiny model's engine: that it is really away, and that the
answers stay."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import ablate as script
from ablation.measure import Outcome, ablate
from ablation.replay import Replay
from ablation.report import HEAD, panels, plot, rows, table
from ablation.variants import (
    CONTIGUOUS,
    FULL,
    Variant,
    dense_width,
    mixed_samples,
    settle,
    variants,
    write_twin,
)
from moebius.bench.workload import Sample
from moebius.engine.config import EngineConfig
from moebius.engine.load import load_engine, prepare
from moebius.errors import ConfigError
from tiny import write_model

CONFIG = EngineConfig(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=32, block_size=8)
COUNT = 16


@pytest.fixture(scope="module")
def outcomes(tiny_model: Path) -> dict[str, Outcome]:
    heard: list[str] = []
    rate, config, found = ablate(
        tiny_model, CONFIG, num_prompts=COUNT, seed=2, progress=heard.append
    )
    assert rate > 0 and config.max_model_len == 128
    assert heard == [
        "finding the request rate",
        *(f"round 1 of 1: {name}" for name in variants(config)),
    ]
    return {outcome["name"]: outcome for outcome in found}


def test_answers_are_the_same_where_the_model_is(outcomes: dict[str, Outcome]) -> None:
    same = {name: outcome["same"] for name, outcome in outcomes.items()}
    twins = {name: same.pop(name) for name in list(same) if name.startswith("dense")}
    assert set(same.values()) == {COUNT} and list(twins.values()) == [None, None]
    lengths = [
        s.output_tokens for s in mixed_samples(COUNT, vocab_size=320, max_model_len=128, seed=2)
    ]
    for outcome in outcomes.values():
        assert [len(tokens) for tokens in outcome["tokens"]] == lengths
        assert outcome["completed"] == COUNT and outcome["total_output_tokens"] == sum(lengths)
    assert outcomes["dense: equal total"]["tokens"] != outcomes[FULL]["tokens"]


def test_each_technique_is_really_away(outcomes: dict[str, Outcome], tiny_model: Path) -> None:
    """The cache holds 2 sequences of 128 tokens: that many fit when each reserves all it might
    need."""
    config, prepared = settle(tiny_model, CONFIG, COUNT)
    budget = config.kv_cache_memory_bytes
    assert budget == 2 * 128 * prepared.plan.bytes_per_token
    assert all(outcome["kv_held"] <= budget for outcome in outcomes.values())
    assert outcomes[CONTIGUOUS]["most_running"] == 2 < outcomes[FULL]["most_running"]
    assert (
        outcomes[CONTIGUOUS]["fill"]
        < 0.6
        < outcomes["no prefix cache"]["fill"]
        <= 1.0
        < outcomes[FULL]["fill"]
    )


def test_weights_of_the_twins(tiny_model: Path, tmp_path: Path) -> None:
    prepared = prepare(tiny_model, CONFIG)
    model = prepared.checkpoint.config
    assert (dense_width(model, "total"), dense_width(model, "active")) == (4 * 24, 2 * 24)
    write_twin(prepared, "total", tmp_path)
    twin, weights = (
        load_file(tmp_path / "model.safetensors"),
        load_file(tiny_model / "model.safetensors"),
    )

    def size(tensors: dict[str, Any], part: str) -> int:
        return sum(tensor.numel() for name, tensor in tensors.items() if part in name)

    # The experts are stored stacked or apart; routers alone have no counterpart.
    routers = sum(t.numel() for name, t in weights.items() if name.endswith("mlp.gate.weight"))
    assert size(twin, "mlp") == size(weights, "mlp") - routers
    assert size(twin, "self_attn") == size(weights, "self_attn") and size(twin, "embed") == size(
        weights, "embed"
    )
    assert all(tensor.float().std() > 0 for name, tensor in twin.items() if "norm" not in name)


def computed(tiny_model: Path, tmp_path: Path, name: str) -> list[tuple[int, int, int]]:
    """Each chunk that a variant's engine computes for COUNT requests at once: (request, first
    position, tokens)."""
    config, _ = settle(tiny_model, CONFIG, COUNT)
    variant = variants(config)[name]
    engine = load_engine(
        tiny_model, replace(config, trace=str(tmp_path / "trace"), **variant.config)
    )
    samples = mixed_samples(COUNT, vocab_size=320, max_model_len=128, seed=2)
    Replay(engine, samples, [0.0] * COUNT, variant).run()
    engine.close()
    plans = [
        event
        for event in map(json.loads, (tmp_path / "trace").read_text().splitlines())
        if "chunks" in event
    ]
    return [
        (int(id.partition(".")[0]), start, size)
        for plan in plans
        for id, start, size, *_ in plan["chunks"]
    ]


def test_without_a_kv_cache_every_token_computes_all_before_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    samples = mixed_samples(COUNT, vocab_size=320, max_model_len=128, seed=2)
    every = sum(s.input_tokens + i for s in samples for i in range(s.output_tokens))
    assert sum(size for _, _, size in computed(tiny_model, tmp_path, "no KV cache")) == every
    once = sum(s.input_tokens + s.output_tokens - 1 for s in samples)
    assert sum(size for _, _, size in computed(tiny_model, tmp_path, FULL)) < once < every / 4


def test_without_chunks_a_prompt_is_computed_whole(tiny_model: Path, tmp_path: Path) -> None:
    samples = mixed_samples(COUNT, vocab_size=320, max_model_len=128, seed=2)

    def split(name: str) -> set[int]:
        """Requests of which some chunk ends within the prompt."""
        chunks = computed(tiny_model, tmp_path, name)
        return {
            index for index, start, size in chunks if start + size < samples[index].input_tokens
        }

    assert split("no chunked prefill") == set() and len(split(FULL)) > 2


@pytest.mark.parametrize("batching", [True, False])
def test_a_static_batch_starts_when_the_last_one_is_over(tiny_model: Path, batching: bool) -> None:
    engine = load_engine(tiny_model, replace(CONFIG, kv_cache_memory_bytes=2**20, max_num_seqs=2))
    samples = [Sample((5, 6, 7 + i), 3, 2 + 3 * i) for i in range(5)]
    replay = Replay(engine, samples, [0.0] * 5, Variant(batching=batching))
    duration = replay.run()
    begins, ends = [r.ttft for r in replay.records], [r.e2el for r in replay.records]
    assert duration >= max(ends) and replay.most_running == 2
    # Two at a time: 0 with 1, 2 with 3, then 4. Continuous batching gives 0's seat to 2 before 1 is
    # finished.
    assert (begins[2] > max(ends[:2])) is not batching
    assert (begins[4] > max(ends[2:4])) is not batching
    assert engine.scheduler.drained


def test_a_static_batch_holds_no_more_than_the_cache(tiny_model: Path) -> None:
    plan = prepare(tiny_model, replace(CONFIG, kv_cache_memory_bytes=2**20)).plan
    config = replace(CONFIG, max_model_len=64, kv_cache_memory_bytes=8 * 8 * plan.bytes_per_token)
    engine = load_engine(tiny_model, config)
    samples = [
        Sample(tuple(range(24 * i, 24 * i + 24)), 24, 8) for i in range(4)
    ]  # 4 of 8 blocks each
    replay = Replay(engine, samples, [0.0] * 4, Variant(batching=False))
    replay.run()
    assert replay.most_running == 2 and engine.stats().preemptions == 0
    assert replay.records[2].ttft > replay.records[1].e2el


def test_nothing_runs_before_it_arrives(tiny_model: Path) -> None:
    engine = load_engine(tiny_model, replace(CONFIG, kv_cache_memory_bytes=2**20))
    replay = Replay(engine, [Sample((1, 2, 3), 3, 2)] * 2, [0.0, 0.2], Variant())
    assert replay.run() >= 0.2 and replay.records[1].ttft > 0


def test_rounds_and_a_choice(tiny_model: Path) -> None:
    chosen = ["static batching", "no prefix cache"]
    heard: list[str] = []
    rate, _, found = ablate(
        tiny_model,
        CONFIG,
        num_prompts=4,
        request_rate=500.0,
        names=chosen,
        rounds=2,
        progress=heard.append,
    )
    assert rate == 500.0 and [outcome["name"] for outcome in found] == [FULL, *chosen]
    assert len(heard) == 6 and [outcome["same"] for outcome in found] == [4, 4, 4]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"names": ["no luck"]}, "there is no no luck; there are full engine, no KV cache"),
        (CONFIG, {"num_prompts": 0}, "--prompts is 0"),
        (CONFIG, {"rounds": 0}, "--rounds is 0"),
        (
            replace(CONFIG, max_model_len=1100),
            {},
            "1100 tokens are too long for 'contiguous reservation', which takes at most 1024",
        ),
        (CONFIG, {"request_rate": 0.0}, "--request-rate is 0.0"),
    ],
)
def test_bad_choices(
    tiny_model: Path, config: EngineConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ablate(tiny_model, config, **options)


def test_a_model_without_experts_is_compared_with_itself(tmp_path: Path) -> None:
    write_model(tmp_path, num_experts=4, mlp_only_layers=[0, 1])
    model = prepare(tmp_path, CONFIG).checkpoint.config
    assert dense_width(model, "total") == dense_width(model, "active") == 48


def test_table_and_chart(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    found = list(outcomes.values())
    shown = rows(found)
    assert all(len(row) == len(HEAD) for row in shown)
    assert (
        shown[0][2] == "1.00"
        and shown[0][-1] == f"{COUNT}/{COUNT}"
        and shown[-1][-1] == "other model"
    )
    lines = table(HEAD, shown).splitlines()
    assert len(lines) == 2 + len(shown) and {line.count("|") for line in lines} == {len(HEAD) + 1}
    assert (
        len({len(line) for line in lines}) == 1
        and lines[1].startswith("| ---")
        and lines[1].endswith("-: |")
    )
    plot(tmp_path / "chart.svg", "a title", [o["name"] for o in found], panels(found))
    svg = (tmp_path / "chart.svg").read_text()
    assert svg.startswith("<?xml") and "a title" in svg and "contiguous reservation" in svg


def test_the_requests() -> None:
    m = 256
    samples = mixed_samples(64, vocab_size=500, max_model_len=m, seed=4)
    assert samples == mixed_samples(64, vocab_size=500, max_model_len=m, seed=4)
    assert samples != mixed_samples(64, vocab_size=500, max_model_len=m, seed=5)
    [(prefix, shared)] = Counter(s.prompt[: m // 4] for s in samples).most_common(1)
    assert len(prefix) == m // 4
    longest = [s for s in samples if s.input_tokens >= m // 2]
    short = [s for s in samples if s.input_tokens <= m // 8]
    assert (shared, len(short), len(longest)) == (32, 24, 8)
    assert all(s.input_tokens + s.output_tokens <= m * 3 // 4 for s in samples)
    outputs = sorted(s.output_tokens for s in samples)
    assert outputs[0] >= 2 and outputs[-1] <= m // 8 and outputs[-1] > 3 * outputs[32], (
        "a few long answers"
    )


def test_the_script(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.png"
    sizes = ("--prompts", "4", "--only", "static batching", "--threads", "1")
    files = ("--output-json", str(figures), "--plot", str(chart))
    script.main([str(tiny_model), *sizes, *files])
    out = capsys.readouterr().out
    assert "| full engine " in out and "| static batching " in out and "4/4" in out
    assert "no prefix cache" not in out
    found = json.loads(figures.read_text())
    assert found["static batching"]["same"] == 4
    assert found["config"]["max_num_seqs"] == 16 and found["config"]["threads"] == 1
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_script_refuses_before_it_runs(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no luck; there are full engine"):
        script.main([str(tiny_model), "--only", "luck"])
    both = str(tmp_path / "both.png")
    with pytest.raises(ConfigError, match="--output-json and --plot are one file"):
        script.main([str(tiny_model), "--output-json", both, "--plot", both])
    assert list(tmp_path.iterdir()) == []
