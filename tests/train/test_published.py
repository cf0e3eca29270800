"""Every kind of model a recipe can describe: saved, loaded by transformers, served by us or
refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.errors import ConfigError
from moebius.models.decoder import Decoder
from moebius.models.family import model_config
from moebius.models.store.load import load_decoder
from moebius.moe.config import FeedForwardConfig
from moebius.nn.packed import PackedPast
from moebius.ops.config import RouterConfig
from moebius.ops.reference import ReferenceOps
from moebius.train.data import PreparedData
from moebius.train.export import export, parameter_counts
from moebius.train.recipe import Recipe
from moebius.train.trainer import Trainer
from oracle import assert_close, load_theirs

DOTS1 = {"n_routed_experts": 4, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
DENSE = {"num_experts": None, "intermediate_size": 48}
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("olmoe", {"norm_topk_prob": False, "intermediate_size": 16}),
    (
        "olmoe",
        {
            "norm_topk_prob": False,
            "num_experts_per_tok": 1,
            "hidden_act": "gelu",
            "intermediate_size": 16,
        },
    ),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 2, "intermediate_size": 32}),
    ("qwen3_moe", {"mlp_only_layers": [0], "intermediate_size": 24}),
    ("qwen2_moe", {"shared_expert_intermediate_size": 32, "intermediate_size": 48}),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 32, "intermediate_size": 48, "decoder_sparse_step": 2},
    ),
    ("dots1", {**DOTS1, "intermediate_size": 48}),
    (
        "dots1",
        {**DOTS1, "intermediate_size": 48, "first_k_dense_replace": 1, "norm_topk_prob": False},
    ),
    ("mixtral", {"num_local_experts": 4, "num_experts": None, "intermediate_size": 16}),
    ("granitemoe", {"num_local_experts": 4, "num_experts": None, "intermediate_size": 16}),
    ("qwen3", DENSE),
    ("qwen2", DENSE),
]
ROUTER = RouterConfig(4, 2, weight="renorm")
RELU = FeedForwardConfig(16, ROUTER, "relu", gated=False)
UNPUBLISHED: list[tuple[str, tuple[FeedForwardConfig, ...], dict[str, Any]]] = [
    ("feed-forwards of two matrices", (RELU,), {}),
    ("feed-forwards of two matrices", (dataclasses.replace(RELU, width=48, router=None),), {}),
    (
        "softmax scores with an ungated shared expert",
        (FeedForwardConfig(16, ROUTER, shared_width=32),),
        {},
    ),
    (
        "softmax scores with a selection bias",
        (FeedForwardConfig(16, dataclasses.replace(ROUTER, selection_bias=True)),),
        {},
    ),
    (
        "softmax weights with a scale",
        (FeedForwardConfig(16, dataclasses.replace(ROUTER, scale=2.0)),),
        {},
    ),
    (
        "learned jitter",
        (FeedForwardConfig(16, dataclasses.replace(ROUTER, learned_noise=True)),),
        {},
    ),
    (
        "sigmoid scores alone",
        (FeedForwardConfig(16, dataclasses.replace(ROUTER, score="sigmoid")),),
        {},
    ),
    (
        "a dense layer after one with experts",
        (FeedForwardConfig(16, ROUTER), FeedForwardConfig(32)),
        {},
    ),
    ("OLMoE's attention in a dense model", (FeedForwardConfig(48),), {"qk_norm": "full"}),
    (
        "no norms, but biases",
        (FeedForwardConfig(16, ROUTER),),
        {"qk_norm": "none", "qkv_bias": True},
    ),
]


def model(recipe: Recipe, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The tests' model table as another type's; None takes a key away."""
    assert recipe.model is not None
    table = {**recipe.model, "initializer_range": 0.1, "model_type": kind, **changes}
    if kind in ("moebius", "qwen2", "qwen3", "dots1", "mixtral", "granitemoe"):
        own = {
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
        } - changes.keys()
        kept = {"num_experts_per_tok"} if kind not in ("moebius", "qwen2", "qwen3") else set()
        kept |= {"moe_intermediate_size", "norm_topk_prob"} if kind == "dots1" else set()
        table = {key: value for key, value in table.items() if key not in own - kept}
    if kind == "olmoe":
        del table["moe_intermediate_size"]
    return {key: value for key, value in table.items() if value is not None}


def trained(recipe: Recipe, data: PreparedData, folder: Path) -> Trainer:
    """Two steps, so that biases and routers are not as they began."""
    routers = {
        part.router for part in model_config(recipe.config_json(320)).feed_forward if part.router
    }
    biased = any(router.selection_bias for router in routers)
    training = dataclasses.replace(recipe.training, bias_rate=0.1 if biased else 0.0)
    trainer = Trainer(dataclasses.replace(recipe, training=training), data)
    for _ in range(2):
        trainer.step()
    export(trainer, folder)
    return trainer


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor, ops: Any = None) -> torch.Tensor:
    decoder = load_decoder(folder, torch.float32, ops=ops)
    hidden, _ = decoder(ids, torch.arange(len(ids)), PackedPast(len(ids)))
    return decoder.logits(hidden)


@pytest.mark.parametrize(
    ("kind", "changes"), PUBLISHED, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(PUBLISHED)]
)
def test_transformers_and_the_kernels_agree(
    recipe: Recipe, data: PreparedData, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    trained(dataclasses.replace(recipe, model=model(recipe, kind, changes)), data, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == kind and stored["architectures"][0].lower().startswith(
        kind.replace("_", "")
    )
    ids = torch.tensor(data.tokenizer.encode("def f(x):\n    return x + 1\n").ids)
    with torch.no_grad():
        theirs = load_theirs(tmp_path)(ids.unsqueeze(0)).logits[0]
    assert_close(logits(tmp_path, ids), theirs)
    assert_close(logits(tmp_path, ids, ReferenceOps()), theirs)
    assert prepare(tmp_path, EngineConfig()).checkpoint.config.model_type == kind


@pytest.mark.parametrize(("lacks", "parts", "more"), UNPUBLISHED, ids=range(len(UNPUBLISHED)))
def test_what_no_type_expresses_trains_and_is_not_served(
    recipe: Recipe,
    data: PreparedData,
    tmp_path: Path,
    lacks: str,
    parts: tuple[FeedForwardConfig, ...],
    more: dict[str, Any],
) -> None:
    table = model(recipe, "moebius", {"qk_norm": "head", "unpublished": lacks, **more})
    trainer = trained(dataclasses.replace(recipe, model=table, layers=parts), data, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "moebius" and stored["unpublished"].startswith(lacks)
    with pytest.raises(ConfigError, match=f"but not served: no published architecture has {lacks}"):
        prepare(tmp_path, EngineConfig())
    ids = torch.arange(20)
    same = Decoder(trainer.decoder.config, ReferenceOps())
    same.load_state_dict({name: x.float() for name, x in trainer.decoder.state_dict().items()})
    with torch.no_grad():
        hidden, _ = same(ids, torch.arange(20), PackedPast(20))
        assert torch.equal(logits(tmp_path, ids, ReferenceOps()), same.logits(hidden))


@pytest.mark.parametrize(
    ("kind", "changes", "twin_kind"),
    [
        ("qwen3_moe", {}, "qwen3"),
        ("qwen3_moe", {"norm_topk_prob": False}, "qwen3"),
        ("qwen3_moe", {"decoder_sparse_step": 2, "intermediate_size": 32}, "qwen3"),
        ("qwen3_moe", {"decoder_sparse_step": 2, "intermediate_size": 64}, "moebius"),
        ("qwen2_moe", PUBLISHED[5][1], "qwen2"),
        ("olmoe", PUBLISHED[1][1] | {"norm_topk_prob": False}, "moebius"),
        ("dots1", PUBLISHED[7][1], "qwen3"),
        ("moebius", {"qk_norm": "head"}, "moebius"),
    ],
)
def test_the_dense_twin_has_as_many_active_parameters(
    recipe: Recipe, data: PreparedData, kind: str, changes: dict[str, Any], twin_kind: str
) -> None:
    """To the width's multiple of 8: at most 4 columns of 3 matrices a layer."""
    layers = (RELU,) if kind == "moebius" else ()
    sparse = dataclasses.replace(recipe, model=model(recipe, kind, changes), layers=layers)
    twin = sparse.dense_twin()
    used, total = (parameter_counts(Trainer(r, data).decoder)[1] for r in (sparse, twin))
    assert abs(used - total) <= 2 * 4 * 3 * 32 + 2 * 4
    assert twin.model is not None and twin.name == "tiny-dense" and twin.training == sparse.training
    assert twin.model["model_type"] == twin_kind
    assert parameter_counts(Trainer(twin, data).decoder) == (total, total)
    with pytest.raises(ConfigError, match="dense already"):
        twin.dense_twin()
