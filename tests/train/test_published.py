"""Every kind of model a recipe can describe: saved, loaded by transformers, served by us or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.config import EngineConfig
from moebius.engine.load import prepare
from moebius.errors import ConfigError
from moebius.models.decoder import Decoder
from moebius.models.weights import load_decoder
from moebius.nn.attention import CausalAttend
from moebius.ops.reference import ReferenceOps
from moebius.train.data import PreparedData
from moebius.train.export import export, parameter_counts
from moebius.train.recipe import Recipe
from moebius.train.trainer import Trainer
from oracle import assert_close, load_theirs

SHARED = {"shared_width": 32}
SIGMOID = {"score": "sigmoid", "selection_bias": True, "scale": 2.5, **SHARED}
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("olmoe", {"weight": "raw"}),
    ("olmoe", {"weight": "raw", "experts_per_token": 1, "expert": "geglu"}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"weight": "raw", "sparse_every": 2}),
    ("qwen3_moe", {"dense_first": 1, "dense_width": 24}),
    ("qwen2_moe", {"shared_gate": True, **SHARED}),
    ("qwen2_moe", {"shared_gate": True, "weight": "raw", "sparse_every": 2, **SHARED}),
    ("dots1", SIGMOID),
    ("dots1", {**SIGMOID, "dense_first": 1, "weight": "raw", "scale": 1.0}),
    ("qwen3", {"num_experts": 0, "dense_width": 48}),
    ("qwen2", {"num_experts": 0, "dense_width": 48, "attention": "qkv_bias"}),
]
UNPUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("feed-forwards of two matrices", {"expert": "relu"}),
    ("feed-forwards of two matrices", {"expert": "relu", "num_experts": 0, "dense_width": 48}),
    ("softmax scores with an ungated shared expert", SHARED),
    ("softmax scores with a selection bias", {"selection_bias": True}),
    ("softmax weights with a scale", {"scale": 2.0}),
    ("sigmoid scores without ungated shared experts", {"score": "sigmoid"}),
    ("sigmoid scores with a dense layer after one", {**SIGMOID, "sparse_every": 2, "num_layers": 3}),
    ("OLMoE's attention in a dense model", {"num_experts": 0, "dense_width": 48, "attention": "full_norm"}),
    ("qkv_bias attention in a qwen3_moe", {"attention": "qkv_bias"}),
]


def trained(recipe: Recipe, data: PreparedData, changes: dict[str, Any], folder: Path) -> Trainer:
    """Two steps, so that biases and routers are not as they began."""
    assert recipe.model is not None
    training = dataclasses.replace(recipe.training, bias_rate=0.1 if changes.get("selection_bias") else 0.0)
    model = dataclasses.replace(recipe.model, init_std=0.1, **changes)
    trainer = Trainer(dataclasses.replace(recipe, model=model, training=training), data)
    for _ in range(2):
        trainer.step()
    export(trainer, folder)
    return trainer


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor, ops: Any = None) -> torch.Tensor:
    decoder = load_decoder(folder, torch.float32, ops=ops)
    hidden, _ = decoder(ids, torch.arange(len(ids)), CausalAttend(decoder.config, len(ids)))
    return decoder.logits(hidden)


@pytest.mark.parametrize(("kind", "changes"), PUBLISHED, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(PUBLISHED)])
def test_transformers_and_the_kernels_agree(
    recipe: Recipe, data: PreparedData, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    trained(recipe, data, changes, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == kind and stored["architectures"][0].lower().startswith(kind.replace("_", ""))
    ids = torch.tensor(data.tokenizer.encode("def f(x):\n    return x + 1\n").ids)
    with torch.no_grad():
        theirs = load_theirs(tmp_path)(ids.unsqueeze(0)).logits[0]
    assert_close(logits(tmp_path, ids), theirs)
    assert_close(logits(tmp_path, ids, ReferenceOps()), theirs)
    assert prepare(tmp_path, EngineConfig()).checkpoint.config.model_type == kind


@pytest.mark.parametrize(("lacks", "changes"), UNPUBLISHED, ids=range(len(UNPUBLISHED)))
def test_what_no_type_expresses_trains_and_is_not_served(
    recipe: Recipe, data: PreparedData, tmp_path: Path, lacks: str, changes: dict[str, Any]
) -> None:
    trainer = trained(recipe, data, changes, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "moebius" and stored["unpublished"].startswith(lacks)
    with pytest.raises(ConfigError, match=f"but not served: no published architecture has {lacks}"):
        prepare(tmp_path, EngineConfig())
    ids = torch.arange(20)
    same = Decoder(trainer.decoder.config, ReferenceOps())
    same.load_state_dict({name: x.float() for name, x in trainer.decoder.state_dict().items()})
    with torch.no_grad():
        hidden, _ = same(ids, torch.arange(20), CausalAttend(same.config, 20))
        assert torch.equal(logits(tmp_path, ids, ReferenceOps()), same.logits(hidden))


@pytest.mark.parametrize(
    "changes",
    [{}, {"weight": "raw"}, {"shared_gate": True, **SHARED}, SIGMOID, {"sparse_every": 2}, {"expert": "relu"}],
)
def test_the_dense_twin_has_as_many_active_parameters(
    recipe: Recipe, data: PreparedData, changes: dict[str, Any]
) -> None:
    """To the width's multiple of 8: at most 4 columns of 3 matrices a layer."""
    assert recipe.model is not None
    sparse = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **changes))
    twin = sparse.dense_twin()
    used, total = (parameter_counts(Trainer(r, data).decoder)[1] for r in (sparse, twin))
    assert abs(used - total) <= 2 * 4 * 3 * 32 + 2 * 4
    assert twin.model is not None and twin.name == "tiny-dense" and twin.training == sparse.training
    assert parameter_counts(Trainer(twin, data).decoder) == (total, total)
    with pytest.raises(ConfigError, match="dense already"):
        twin.dense_twin()
