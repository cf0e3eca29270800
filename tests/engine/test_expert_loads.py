"""What the routers of an engine are counted to have done, against a decoder that routes the same
tokens on its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebius.engine import expert_loads
from moebius.engine.client import ExpertLoads
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine
from moebius.models.store.load import load_decoder
from moebius.nn.packed import PackedPast
from moebius.ops import RouterTally, select_ops
from moebius.ops.config import RouterConfig
from moebius.ops.reference import ReferenceOps
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request
from oracle import save_tiny


def load(directory: Path) -> Engine:
    return load_engine(directory, EngineConfig(kv_cache_memory_bytes=2**20, max_model_len=64))


def generate(one: Engine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Each prompt with all that was drawn but the last token, which no step computes."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    limits = one.info.limits
    requests = [
        Request(EngineRequest.create(str(i), p, params, limits, arrival=0.0))
        for i, p in enumerate(prompts)
    ]
    for request in requests:
        one.add(request)
    while one.has_work:
        one.step()
    return [[*request.prompt_ids, *request.output_ids[:-1]] for request in requests]


def routed(directory: Path, rows: list[list[int]], layers: int) -> tuple[list[Tensor], list[float]]:
    """Pairs of each expert and the mean entropy of softmax probabilities, by layer, in plain
    PyTorch."""
    decoder = load_decoder(directory, torch.float32, ops=ReferenceOps())
    ids, probabilities = [[] for _ in range(layers)], [[] for _ in range(layers)]  # type: ignore[var-annotated]
    for row in rows:
        tokens = torch.tensor(row)
        with torch.no_grad():
            routings = decoder(tokens, torch.arange(len(row)), PackedPast(len(row)))[1]
        for layer, routing in enumerate(routings):
            ids[layer].append(routing.expert_ids_TK.flatten())
            probabilities[layer].append(torch.softmax(routing.logits_TE.double(), -1))
    experts = probabilities[0][0].shape[1]
    pairs = [torch.bincount(torch.cat(part), minlength=experts) for part in ids]
    p = [torch.cat(part) for part in probabilities]
    return pairs, [float(-(p_TE * p_TE.log()).sum(-1).mean()) for p_TE in p]


PROMPTS = [[5, 9, 3, 200, 17, 4, 4, 31], [7], [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233]]


@pytest.mark.case("C21")
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_serving_counts_what_the_routers_chose(
    tiny_model: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        monkeypatch.setenv("MOEBIUS_CPU_ISA", "reference")
    one = load(tiny_model)
    assert all(layer.tokens == 0 for layer in one.expert_loads().layers), (
        "what warmed up is counted"
    )
    rows = generate(one, PROMPTS, 9)
    loads = one.expert_loads()
    pairs, entropies = routed(tiny_model, rows, len(loads.layers))
    tokens = sum(map(len, rows))
    assert [layer.layer for layer in loads.layers] == [0, 1]
    for layer, expected_E, entropy in zip(loads.layers, pairs, entropies, strict=True):
        counts = expected_E.tolist()
        mean = sum(counts) / len(counts)
        assert list(layer.pairs) == list(layer.total_pairs) == counts
        assert (layer.tokens, layer.top_k) == (tokens, 2)
        assert layer.max_over_mean == pytest.approx(max(counts) / mean)
        assert layer.cv == pytest.approx(
            math.sqrt(sum((c - mean) ** 2 for c in counts) / len(counts)) / mean
        )
        assert layer.router_entropy == pytest.approx(entropy, rel=1e-4)
        assert layer.dead == tuple(e for e, c in enumerate(counts) if c < 0.1 * mean)


@pytest.mark.case("C21")
def test_figures_are_of_the_last_one_to_two_windows(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_loads, "WINDOW_STEPS", 10)
    one = load(tiny_model)
    sizes = []
    for _ in range(35):
        generate(one, [[5, 9, 3]], 1)
        loads = one.expert_loads()
        sizes.append(loads.steps)
        assert all(layer.tokens <= 3 * loads.steps for layer in loads.layers)
    assert sizes == [*range(1, 20), *range(10, 20), *range(10, 16)]
    assert sum(loads.layers[0].total_pairs) > sum(loads.layers[0].pairs)


@pytest.mark.case("C21")
def test_nothing_computed_is_no_dead_expert_and_a_dense_model_has_no_layers(
    tiny_model: Path, tmp_path: Path
) -> None:
    layers = load(tiny_model).expert_loads().layers
    assert layers and all(not layer.dead and math.isnan(layer.max_over_mean) for layer in layers)
    save_tiny(tmp_path, "qwen3")
    dense = load(tmp_path)
    generate(dense, [[1, 2, 3]], 3)
    assert dense.expert_loads() == ExpertLoads(dense.expert_loads().steps, ())


ROUTERS = {
    "softmax": RouterConfig(12, 3),
    "renormalised": RouterConfig(12, 3, weight="renorm", logit_softcap=3.0),
    "chosen softmax": RouterConfig(12, 3, score="logits", weight="softmax"),
    "sigmoid": RouterConfig(
        12, 3, score="sigmoid", weight="renorm", selection_bias=True, num_groups=4, groups_kept=2
    ),
}


@pytest.mark.case("C21")
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_counting_changes_no_bit_and_survives_numbers_that_went_wrong(
    router: str, backend: str
) -> None:
    config = ROUTERS[router]
    ops = ReferenceOps() if backend == "reference" else select_ops("cpu", torch.float32, 2)
    logits = 4 * torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    logits[7, 3] = 90.0
    bias = torch.linspace(-0.1, 0.1, 12) if config.selection_bias else None
    tally = RouterTally(torch.zeros(12, dtype=torch.int64), torch.zeros(2, dtype=torch.float64))
    weights, ids = ops.route(logits, config, bias)
    counted_weights, counted_ids = ops.route(logits, config, bias, tally)
    assert torch.equal(
        weights.view(torch.int32), counted_weights.view(torch.int32)
    ) and torch.equal(ids, counted_ids)
    assert torch.equal(tally.pairs_E, torch.bincount(ids.flatten(), minlength=12))
    x = logits.double() if config.logit_softcap is None else 3 * torch.tanh(logits.double() / 3)
    scores = torch.sigmoid(x) if config.score == "sigmoid" else torch.exp(x)
    p = scores / scores.sum(-1, keepdim=True)
    assert float(tally.sums[0]) == pytest.approx(float(-torch.xlogy(p, p).sum()), rel=1e-5)
    assert float(tally.sums[1]) == 50
    before = float(tally.sums[0])
    ops.route(torch.full((1, 12), math.nan), config, bias, tally)
    assert float(tally.sums[0]) == before and float(tally.sums[1]) == 50
