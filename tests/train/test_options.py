"""Every option of a recipe's model: exported and loaded back to the same logits, or refused before
training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.errors import ConfigError
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.store.load import load_decoder
from moebius.moe.config import FeedForwardConfig
from moebius.moe.training import TrainingRouting
from moebius.nn.attention import GQA
from moebius.nn.packed import PackedPast
from moebius.ops.config import RouterConfig
from moebius.train.data import PreparedData
from moebius.train.evaluate import measuring
from moebius.train.export import export
from moebius.train.ops import TrainingOps
from moebius.train.recipe import Recipe
from moebius.train.trainer import Trainer

ROUTER = RouterConfig(4, 2)
GROUPS = {"num_groups": 2, "groups_kept": 1}
REFUSED = "REFUSED"
# Options by record: the values to try, each with what it needs beside; what is refused says so.
ROUTERS: dict[str, list[dict[str, Any]]] = {
    "num_experts": [{"num_experts": 6}],
    "top_k": [
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 5, REFUSED: "it must lie between 1 and num_experts = 4"},
    ],
    "score": [
        {"score": "sigmoid"},
        {"score": "logits", "weight": "softmax"},
        {"score": "best", REFUSED: "score is 'best'; it must be one of softmax, sigmoid, logits"},
    ],
    "weight": [{"weight": w} for w in ("renorm", "softmax", "sigmoid")]
    + [
        {"weight": "renorm", "top_k": 1, REFUSED: "a renormalised top-1 router"},
        {
            "weight": "none",
            REFUSED: "weight is 'none'; it must be one of raw, renorm, softmax, sigmoid",
        },
    ],
    "selection_bias": [{"selection_bias": True}],
    "num_groups": [GROUPS, {"num_groups": 3, REFUSED: "do not divide"}],
    "groups_kept": [
        {"num_groups": 4, "groups_kept": 3},
        {"groups_kept": 2, REFUSED: "2 of 1 expert groups"},
    ],
    "group_score": [
        {**GROUPS, "group_score": "top2"},
        {
            **GROUPS,
            "group_score": "mean",
            REFUSED: "group_score is 'mean'; it must be one of max, top2",
        },
    ],
    "group_fill": [
        {**GROUPS, "group_fill": "never"},
        {**GROUPS, "group_fill": "one", REFUSED: "must be one of zero, never"},
    ],
    "renorm_eps": [{"weight": "renorm", "renorm_eps": 0.5}],
    "renorm_least": [{"weight": "renorm", "renorm_least": 0.9}],
    "scale": [{"scale": 3.0}],
    "logit_bias": [
        {"logit_bias": True},
        {"logit_bias": True, "selection_bias": True, "learned_noise": True},
    ],
    "logit_softcap": [
        {"logit_softcap": 0.1},
        {"logit_softcap": 0.0, REFUSED: "logit_softcap is 0.0; it must be pos"},
    ],
    "learned_noise": [{"learned_noise": True}],
    "float32": [{"float32": True}],
    "capacity": [
        {"capacity": 3, REFUSED: "capacity is 3; it is an encoder's"},
        {"capacity": 0, REFUSED: "capacity is 0"},
    ],
}
PARTS: dict[str, list[dict[str, Any]]] = {
    "width": [{"width": 24}, {"width": 12, REFUSED: "must be multiples of 8"}],
    "router": [{"router": None}],
    "activation": [{"activation": a} for a in ("gelu", "gelu_tanh", "relu", "relu_squared")]
    + [
        {
            "activation": "tanh",
            REFUSED: "activation is 'tanh'; it must be one of silu, gelu, gelu_tanh, relu",
        }
    ],
    "bias": [
        {"bias": True},
        {"bias": True, "gated": False, "shared_width": 8, "shared_gate": True},
    ],
    "shared_width": [
        {"shared_width": 8},
        {"shared_width": 8, "router": None, REFUSED: "this feed-forward has none"},
    ],
    "shared_gate": [
        {"shared_width": 8, "shared_gate": True},
        {"shared_gate": True, REFUSED: "give shared_width"},
    ],
    "gated": [{"gated": False}],
    "latent": [
        {"latent": 16},
        {"latent": 16, "router": None, REFUSED: "this feed-forward has none"},
    ],
}
TABLES: dict[str, list[dict[str, Any]]] = {
    "model_type": [
        {"model_type": "qwen3", "intermediate_size": 16, REFUSED: "know no feed_forward"}
    ],
    "hidden_size": [{"hidden_size": 40, "head_dim": 8}],
    "layers": [
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 0, REFUSED: "num_hidden_layers is 0"},
    ],
    "mixer": [{"layer_types": ["linear_attention"], REFUSED: "layer_types"}],
    "feed_forward": [{"num_hidden_layers": True, REFUSED: "num_hidden_layers is True"}],
    "num_heads": [{"num_attention_heads": 2}],
    "num_kv_heads": [{"num_key_value_heads": 4}],
    "head_dim": [{"head_dim": 16}, {"head_dim": 7, REFUSED: "needs an even one"}],
    "vocab_size": [
        {"vocab_size": 500, REFUSED: "model.vocab_size changes nothing .* tokenizer.vocab_size"}
    ],
    "context": [{"max_position_embeddings": 96}],
    "rope": [
        {"rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope_scaling": {"rope_type": "fancy"}, REFUSED: "fancy"},
    ],
    "window": [{"sliding_window": 8, "use_sliding_window": True, REFUSED: "is not supported"}],
    "norm_eps": [{"rms_norm_eps": 0.1}],
    "tie_word_embeddings": [{"tie_word_embeddings": False}],
    "qk_norm": [
        {"qk_norm": "head"},
        {"qk_norm": "full"},
        {"qk_norm": "some", REFUSED: "qk_norm is 'some'; it must be one of none, head, full"},
    ],
    "qkv_bias": [{"qkv_bias": True}],
    "output_bias": [{"attention_bias": True, REFUSED: "attention_bias = True is not supported"}],
    "clip_qkv": [{"clip_qkv": 1.0, REFUSED: "clip_qkv = 1.0 is not supported"}],
    "value_dim": [{"v_head_dim": 16, REFUSED: "v_head_dim = 16 is not supported"}],
    "softcap": [{"attn_logit_softcapping": 50.0, REFUSED: "is not supported"}],
    "sinks": [{"sinks": True, REFUSED: "sinks = True is not supported"}],
    "gated": [{"gated": "heads", REFUSED: "gated = 'heads' is not supported"}],
    "gate_function": [
        {"gate_function": "silu", REFUSED: "gate_function = 'silu' is not supported"}
    ],
    "multiplier_rounded": [{"multiplier_rounded": True, REFUSED: "is not supported"}],
    "norm": [{"norm": "float32", REFUSED: "norm = 'float32' is not supported"}],
    "norms": [{"norms": "sandwich", REFUSED: "norms = 'sandwich' is not supported"}],
    "scaled": [{"scaled": True, REFUSED: "scaled = True is not supported"}],
    "logits_softcap": [{"final_logit_softcapping": 30.0, REFUSED: "is not supported"}],
    "scale": [{"attention_multiplier": 0.5, REFUSED: "is not supported"}],
    "embedding_multiplier": [{"embedding_multiplier": 2.0, REFUSED: "is not supported"}],
    "residual_multiplier": [{"residual_multiplier": 2.0, REFUSED: "is not supported"}],
    "logits_divisor": [{"logits_scaling": 2.0, REFUSED: "is not supported"}],
    "encoder_layers": [{"encoder_layers": 1, REFUSED: "encoder_layers = 1 is not supported"}],
    "start_id": [{"start_id": 1, REFUSED: "start_id = 1 is not supported"}],
    "unpublished": [{"unpublished": "this"}],
    "capped": [{"capped": "so", REFUSED: "capped = 'so' is not supported"}],
    "longer": [{"rope_scaling": {"rope_type": "longrope"}, REFUSED: "longrope"}],
    # Keys that no field has: of training, or none at all.
    "": [
        {
            "attention_dropout": 0.1,
            REFUSED: "model.attention_dropout changes nothing .* finetune.dropout",
        },
        {
            "router_aux_loss_coef": 0.1,
            REFUSED: "model.router_aux_loss_coef changes nothing .* training.load_balance",
        },
        {
            "router_jitter_noise": 0.1,
            REFUSED: "model.router_jitter_noise changes nothing .* routing.jitter",
        },
        {"torch_dtype": "float32", REFUSED: "model.torch_dtype changes nothing .* training.dtype"},
        {"eos_token_id": 5, REFUSED: "model.eos_token_id changes nothing .* tokenizer.end_of_text"},
        {"hidden_act": "relu", REFUSED: "hidden_act = 'relu' is not supported"},
    ],
}


def test_every_option_is_walked() -> None:
    for records, walked in (
        ([RouterConfig], ROUTERS),
        ([FeedForwardConfig], PARTS),
        ([ModelConfig, LayerSpec, GQA], TABLES),
    ):
        named = {field.name for record in records for field in dataclasses.fields(record)}
        assert named == walked.keys() - {""}


CASES = [
    pytest.param(which, case, id=f"{which}-{name}-{number}")
    for which, walked in (("router", ROUTERS), ("part", PARTS), ("table", TABLES))
    for name, cases in walked.items()
    for number, case in enumerate(cases)
]


def described(recipe: Recipe, which: str, case: dict[str, Any]) -> Recipe:
    """A recipe whose model differs from a plain one by this case."""
    changes = {key: value for key, value in case.items() if key != REFUSED}
    assert recipe.model is not None
    ours = (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    )
    table = {"model_type": "moebius", "num_hidden_layers": 1, "initializer_range": 0.2}
    table |= {key: recipe.model[key] for key in ours}
    router = dataclasses.replace(ROUTER, **changes) if which == "router" else ROUTER
    part = FeedForwardConfig(
        **({"width": 16, "router": router} | (changes if which == "part" else {}))
    )
    training = dataclasses.replace(
        recipe.training, bias_rate=0.1 if router.selection_bias else 0.0, warmup_steps=0
    )
    table |= changes if which == "table" else {}
    return dataclasses.replace(recipe, model=table, layers=(part,), training=training)


@torch.no_grad()
def logits(decoder: Any) -> torch.Tensor:
    ids = torch.arange(3, 33)
    hidden, _ = decoder(ids, torch.arange(30), PackedPast(30))
    return decoder.logits(hidden)


@pytest.mark.case("A6")
@pytest.mark.parametrize(("which", "case"), CASES)
def test_an_option_comes_back_or_is_refused(
    recipe: Recipe, data: PreparedData, tmp_path: Path, which: str, case: dict[str, Any]
) -> None:
    if REFUSED in case:
        with pytest.raises(ConfigError, match=case[REFUSED]):
            described(recipe, which, case)
        return
    trainer = Trainer(described(recipe, which, case), data)
    for _ in range(2):
        trainer.step()
    export(trainer, tmp_path)
    loaded = load_decoder(tmp_path, torch.bfloat16, ops=TrainingOps())
    assert loaded.config == trainer.decoder.config
    trained = dict(trainer.decoder.named_parameters())
    assert trained.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert not parameter.is_meta and torch.equal(parameter, trained[name]), name
    biases = [parameter for name, parameter in trained.items() if "bias" in name]
    assert all(bias.abs().sum() > 0 for bias in biases), "trained, so that losing one would show"
    with measuring(trainer.decoder):
        assert torch.equal(logits(loaded), logits(trainer.decoder))


@pytest.mark.case("A6")
@pytest.mark.parametrize(
    "case", [case for cases in ROUTERS.values() for case in cases if REFUSED not in case]
)
def test_a_routers_option_changes_what_is_computed(recipe: Recipe, case: dict[str, Any]) -> None:
    """Or the walk above would prove nothing of it: config.json says the option, and it is read
    back."""
    plain = described(recipe, "router", {}).config_json(320)["feed_forward"]
    assert described(recipe, "router", case).config_json(320)["feed_forward"] != plain


def test_layers_that_no_layer_takes_are_refused(recipe: Recipe) -> None:
    plain = described(recipe, "router", {})
    with pytest.raises(
        ConfigError, match=r"3 layers are described, but model\.num_hidden_layers is 1"
    ):
        dataclasses.replace(plain, layers=plain.layers * 3)


def test_what_is_for_training_alone_is_not_in_the_model(recipe: Recipe) -> None:
    """A model is served without any of it, as its docstring promises."""
    limits = TrainingRouting(
        dropless=False, capacity_factor=1.0, jitter=0.1, second_policy="random"
    )
    plain = described(recipe, "router", {})
    assert dataclasses.replace(plain, routing=limits).config_json(320) == plain.config_json(320)
