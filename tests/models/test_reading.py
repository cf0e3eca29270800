"""config.json to ModelConfig: old and new spellings, and every refusal."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import tiny_t5
from models.config_keys import TABLES
from moebius.errors import ConfigError
from moebius.models.family import model_config, read_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.nn.attention import GQA
from moebius.nn.mixers.latent import MLA
from moebius.nn.rope import RopeConfig
from oracle import FAMILY, TINY, Server, assert_close, load_theirs, save_tiny, tiny_of

STILL = {"kimi_linear", "nemotron_h"}
"""Models without positions."""
NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
PUBLISHED = {
    path.stem: path for path in sorted((Path(__file__).parent / "published").glob("*.json"))
}
"""config.json files as they are on the hub, of transformers 4, by the last part of the repository's
name."""


def published(name: str) -> dict[str, Any]:
    return dict(json.loads(PUBLISHED[name].read_text()))


def tiny(model_type: str, /, **changes: Any) -> dict[str, Any]:
    """As transformers would write it, with changes made to the written form."""
    written = AutoConfig.for_model(model_type, **{**TINY, **FAMILY[model_type]}).to_dict()
    return {**written, **changes}


def test_published_mixtral() -> None:
    config = model_config(published("Mixtral-8x7B-v0.1"))
    router = config.feed_forward[0].router
    assert router is not None
    assert (router.num_experts, router.top_k, router.score, router.weight) == (
        8,
        2,
        "softmax",
        "renorm",
    )
    assert config.num_layers == 32 and {layer.mixer for layer in config.layers} == {
        GQA(32, 8, 128, rope=RopeConfig(1e6))
    }


def test_published_qwen3_moe() -> None:
    config = model_config(published("Qwen3-30B-A3B"))
    router = config.feed_forward[-1].router
    assert router is not None and router.weight == "renorm" and router.num_experts == 128
    assert (
        config.attention.q_size == 4096
        and config.attention.qk_norm == "head"
        and config.feed_forward[0].width == 768
    )


def test_published_llama_with_long_context() -> None:
    config = model_config(published("Llama-3.2-1B-Instruct"))
    assert config.attention.rope == RopeConfig(500_000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    assert config.tie_word_embeddings and config.feed_forward[0].router is None


@pytest.mark.case("C1")
@pytest.mark.parametrize("name", PUBLISHED)
def test_old_and_new_spelling_are_the_same_model(name: str) -> None:
    """transformers 5 rewrites the published file; both must read alike."""
    raw = published(name)
    rewritten = AutoConfig.for_model(**raw).to_dict()
    assert "rope_parameters" in rewritten and "rope_theta" not in rewritten
    assert model_config(rewritten) == model_config(raw)


SMALL: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 20, "moe_intermediate_size": 14, "num_hidden_layers": 3, "vocab_size": 67,
    "shared_expert_intermediate_size": 18, "num_experts": 5, "num_local_experts": 5, "n_routed_experts": 5,
    "num_experts_per_tok": 2, "head_dim": 10, "max_window_layers": 2, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "torch_dtype": "float32",
}  # fmt: skip


def shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    """The same keys with small sizes: a file that was published, for a model that a test can
    run."""
    heads = {"num_attention_heads": 4}
    if "num_key_value_heads" in raw:
        heads["num_key_value_heads"] = (
            4 if raw["num_key_value_heads"] == raw["num_attention_heads"] else 2
        )
    less: dict[str, Any] = {"sliding_window": 4} if raw.get("sliding_window") else {}
    if "layer_types" in raw:
        less["layer_types"] = raw["layer_types"][: SMALL["num_hidden_layers"]]
    return raw | {key: value for key, value in SMALL.items() if raw.get(key)} | heads | less


@pytest.mark.case("C1")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    raw = shrunk(published(name))
    model = tiny_of(AutoConfig.for_model(**raw))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ids = [5, 66, 0, 17, 23, 23, 41, 8, 30, 2]
    server = Server(load_decoder(tmp_path, torch.float32), block_size=4, num_blocks=4)
    server.step([(0, ids)])
    with torch.inference_mode():
        assert_close(server.all_logits(0), model(torch.tensor([ids])).logits[0])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.case("C1")
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"rope_scaling": {**YARN, "truncate": None}}),
        (
            "qwen3",
            {
                "rope_scaling": {
                    **YARN,
                    "beta_fast": None,
                    "beta_slow": None,
                    "attention_factor": None,
                }
            },
        ),
        ("llama", {"partial_rotary_factor": 0.5}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 99.0,
                    "partial_rotary_factor": 0.5,
                }
            },
        ),
        ("qwen3_moe", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_edited_files_give_the_logits_of_transformers(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path, model_type)
    raw = json.loads((tmp_path / "config.json").read_text())
    new = {
        key: value for key, value in raw.items() if key not in ("rope_parameters", "layer_types")
    }
    (tmp_path / "config.json").write_text(json.dumps({**new, "rope_theta": 99.0, **changes}))
    ids = [5, 66, 0, 17, 23, 23, 41, 8, 30, 2]
    server = Server(load_decoder(tmp_path, torch.float32), block_size=4, num_blocks=4)
    server.step([(0, ids)])
    with torch.inference_mode():
        assert_close(server.all_logits(0), load_theirs(tmp_path)(torch.tensor([ids])).logits[0])


@pytest.mark.case("C1")
@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        (
            "Qwen3-Coder-30B-A3B-Instruct",
            "max_window_layers qkv_bias shared_expert_intermediate_size use_qk_norm",
        ),
        ("SmolLM2-135M-Instruct", "is_llama_config rope_interleaved transformers.js_config"),
        ("unsloth-finetuned-Llama-3.2-1B", "unsloth_fixed unsloth_version"),
        ("dots.llm1.inst", "moe_layer_freq scoring_func topk_method use_sliding_window"),
        ("llama-7b", "max_sequence_length"),
        ("Yarn-Llama-2-7b-64k", "rope_scaling.finetuned"),
        ("Llama-3.1-8B-Instruct", ""),
        ("granite-3.0-1b-a400m-instruct", ""),
    ],
)
def test_keys_that_change_nothing_are_named_in_one_line(
    name: str, ignored: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = shrunk(published(name))
    tiny_of(AutoConfig.for_model(**raw)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with caplog.at_level(logging.INFO, logger="moebius"):
        open_checkpoint(tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(ignored)
    assert all(
        f"reads {', '.join(ignored.split())}, which changes nothing" in line for line in lines
    )


@pytest.mark.case("C1")
def test_llama_1_has_the_context_of_its_class() -> None:
    assert "max_position_embeddings" not in published("llama-7b")
    assert model_config(published("llama-7b")).context == 2048


@pytest.mark.parametrize("model_type", TABLES)
def test_absent_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    """Every optional key, left out, means what transformers' class takes it to be."""
    sizes = {**TINY, **FAMILY[model_type]} if model_type in FAMILY else tiny_t5.TINY
    needed = {**sizes, "model_type": model_type}
    filled_in = AutoConfig.for_model(**needed).to_dict()
    assert model_config(needed) == model_config(filled_in)


@pytest.mark.case("C1")
@pytest.mark.parametrize("model_type", TABLES)
def test_all_keys_absent_is_the_class_as_it_is(model_type: str) -> None:
    """Sizes too: a checkpoint of exactly the class's size may have been saved without any."""
    open_ended = {
        "dots1": {"n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3},
        "glm4_moe": {"head_dim": 128},
        "deepseek_v2": {"num_experts_per_tok": 6},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
        "gemma4_text": {"hidden_size_per_layer_input": 0},
    }
    needed = {"model_type": model_type, **open_ended.get(model_type, {})}
    config = AutoConfig.for_model(**needed)
    ours = model_config(needed)
    assert ours == model_config(config.to_dict())
    if ours.encoder_layers:
        assert ours.encoder_layers == config.num_layers and ours.hidden_size == config.d_model
        assert ours.num_layers == config.num_layers + 2 * config.num_decoder_layers
        return
    assert ours.num_layers == config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [None] * ours.num_layers
    found: list[RopeConfig | None] = []
    for mixer, kind in zip(ours.mixers, kinds, strict=False):
        if not isinstance(mixer, GQA | MLA):
            continue
        found.append(mixer.rope)
        heads = mixer.num_heads if isinstance(mixer, MLA) else mixer.num_kv_heads
        assert heads == config.num_key_value_heads
        if mixer.rope is not None:
            theirs = config.rope_parameters.get(kind, config.rope_parameters)
            assert mixer.rope.theta == theirs["rope_theta"]
    assert any(found) != (model_type in STILL) or not found
    eps = [getattr(config, name, None) for name in NORM_EPS]
    assert ours.norm_eps == next(each for each in eps if each is not None)
    assert ours.tie_word_embeddings == config.tie_word_embeddings
    most = getattr(config, "index_topk", None) or config.max_position_embeddings
    assert ours.context == min(most, config.max_position_embeddings)


@pytest.mark.case("C1")
def test_null_is_not_absent() -> None:
    absent = {
        key: value
        for key, value in tiny("mistral").items()
        if key not in ("sliding_window", "layer_types")
    }
    assert model_config(absent).attention.window == 4096
    assert model_config({**absent, "sliding_window": None}).attention.window is None
    assert model_config(tiny("llama", num_key_value_heads=None)).attention.num_kv_heads == 4


@pytest.mark.case("C1")
@pytest.mark.parametrize(
    ("model_type", "name", "other"),
    [
        ("mixtral", "num_local_experts", "num_experts"),
        ("olmoe", "num_experts", "num_local_experts"),
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("dots1", "n_routed_experts", "num_local_experts"),
    ],
)
def test_other_names_of_the_number_of_experts(model_type: str, name: str, other: str) -> None:
    raw = tiny(model_type)
    for each in (name, other):
        raw.pop(each, None)
    assert model_config({**raw, other: 4}) == model_config({**raw, name: 4})
    assert model_config(AutoConfig.for_model(**{**raw, other: 4}).to_dict()) == model_config(
        {**raw, name: 4}
    )
    with pytest.raises(ConfigError, match=f"{name} is .* by its other name"):
        model_config({**raw, other: 4, name: 5})


def test_a_name_that_the_class_does_not_know_is_none() -> None:
    """qwen2_moe has no other name for num_experts; transformers leaves such a key alone."""
    config, ignored, _, _ = read_config(tiny("qwen2_moe", num_local_experts=3))
    router = config.feed_forward[0].router
    assert ignored == ["num_local_experts"] and router is not None and router.num_experts == 5


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"model_type": "gpt2"}, ["gpt2", "qwen3_moe"]),
        ("llama", {"model_type": None}, ["None", "supported"]),
        ("llama", {"hidden_size": None}, ["hidden_size", "null", "4096"]),
        ("llama", {"hidden_size": "24"}, ["hidden_size", "'24'"]),
        ("llama", {"num_hidden_layers": True}, ["num_hidden_layers"]),
        ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ("llama", {"hidden_act": "softsign"}, ["hidden_act", "softsign", "silu"]),
        ("llama", {"attention_bias": "yes"}, ["attention_bias", "true or false"]),
        ("llama", {"head_dim": 7}, ["head_dim", "7"]),
        ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ("llama", {"hidden_size": 26, "head_dim": None}, ["hidden_size", "head_dim"]),
        ("llama", {"attention_chunk_size": 4}, ["attention_chunk_size", "4", "llama"]),
        ("llama", {"sliding_window": 8}, ["sliding_window"]),
        ("llama", {"is_causal": False}, ["is_causal", "False"]),
        ("llama", {"per_layer_config": {"0": {"hidden_act": "relu"}}}, ["per_layer_config", "relu"]),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types[0]", "no sliding window"]),
        ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, ["layer_types[1]"]),
        ("dots1", {"n_group": None}, ["n_group", "null"]),
        ("dots1", {"n_shared_experts": None}, ["n_shared_experts", "null"]),
        ("llama", {"quantization_config": {"quant_method": "torchao"}}, ["torchao", "bfloat16"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "neighbours"]),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["longrope", "neighbours"]),
        ("llama", {"quantization_config": "fp8"}, ["fp8", "bfloat16"]),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, ["spiral", "yarn"]),
        ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, ["['yarn']", "unknown"]),
        ("llama", {"rms_norm_eps": float("inf")}, ["rms_norm_eps", "finite"]),
        ("llama", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "finite"]),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, ["rope_theta", "finite"]),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["linear", "factor"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, ["factor", "number"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
         ["partial_rotary_factor", "0.5"]),
        ("llama", {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
         ["partial_rotary_factor", "0.5"]),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 99.0}}}, ["full_attention", "all layers"]),
        ("qwen3", {"is_causal": None}, ["is_causal", "None"]),
        ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True,
                       "layer_types": ["sliding_attention", "full_attention"]}, ["layer_types[1]"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_slow": -1}}, ["beta_slow", "-1"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}}, ["rope_theta", "yarn"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 1e308}}, ["factor", "1e+308"]),
        ("llama", {"rms_norm_eps": -1e-6}, ["rms_norm_eps", "-1e-06"]),
        ("granitemoe", {"logits_scaling": 0.0}, ["logits_scaling", "0"]),
        ("olmoe", {"clip_qkv": 0.0}, ["clip_qkv", "0.0"]),
        ("llama", {"rope_parameters": [1]}, ["rope_parameters", "object"]),
        ("mixtral", {"num_experts_per_tok": 6}, ["top_k", "6", "5"]),
        ("glm4_moe", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.3}}, ["0.3", "is 3", "even"]),
        ("minimax_m2", {"rotary_dim": "8"}, ["rotary_dim", "'8'"]),
        ("ernie4_5_moe", {"use_bias": True}, ["use_bias", "True"]),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, ["moe_layer_interval", "0"]),
        ("mellum", {"rope_parameters": {"full_attention": {"rope_theta": 9.0}}}, ["no object for sliding_attention"]),
        ("mellum", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, ["no object for"]),
        ("mellum", {"mlp_layer_types": ["dense", "moe"]}, ["mlp_layer_types", "dense, sparse"]),
        ("mellum", {"sliding_window": None}, ["sliding_window", "null"]),
        ("exaone_moe", {"layer_types": None, "sliding_window_pattern": "LLLG"}, ["sliding_window_pattern", "LLLG"]),
        ("solar_open", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ("hy_v3", {"mlp_bias": True}, ["mlp_bias", "True"]),
        ("hunyuan_v1_moe", {"moe_topk": [2]}, ["moe_topk", "[2]"]),
        ("hunyuan_v1_moe", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "neighbours"]),
        ("hunyuan_v1_moe", {"rope_parameters": {"rope_type": "dynamic", "alpha": "50"}}, ["alpha", "'50'"]),
        ("afmoe", {"sliding_window": None}, ["sliding_window", "null"]),
        ("cohere2_moe", {"expert_selection_fn": "top"}, ["expert_selection_fn", "'top'", "softmax, sigmoid"]),
        ("cohere2_moe", {"shared_expert_combination_strategy": None}, ["shared_expert_combination_strategy"]),
        ("cohere2_moe", {"logit_scale": 0.0}, ["logit_scale", "0.0"]),
        ("cohere2_moe", {"sliding_window": None}, ["sliding_window", "null"]),
        ("laguna", {"gating": "tanh"}, ["gating", "tanh", "per-element"]),
        ("laguna", {"gating": False}, ["gating", "False"]),
        ("laguna", {"num_attention_heads_per_layer": [4]}, ["num_attention_heads_per_layer"]),
        ("laguna", {"num_attention_heads_per_layer": [4, 5]}, ["5", "num_key_value_heads = 2"]),
        ("laguna", {"moe_apply_router_weight_on_input": True}, ["moe_apply_router_weight_on_input"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, ["use_bidirectional_attention", "'all'"]),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, ["hidden_size_per_layer_input is 8", "E2B"]),
        ("gemma4_text", {"num_kv_shared_layers": 1}, ["num_kv_shared_layers", "some kind"]),
        ("gemma4_text", {"num_kv_shared_layers": 3}, ["num_kv_shared_layers", "some kind"]),
        ("gemma4_text", {"per_layer_config": {"1": {"sliding_window": 3}}}, ["per_layer_config", "sliding_window"]),
        ("gemma4_text", {"per_layer_config": {"2": {"head_dim": 8}}}, ["per_layer_config", "'2'"]),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": "8"}}}, ["per_layer_config", "'8'"]),
        ("gemma4_text", {"per_layer_config": [8]}, ["per_layer_config"]),
        ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 8}}, "layer_types": ["full_attention"] * 2},
         ["per_layer_config", "differs among layers of full_attention"]),
        ("gemma4_text", {"num_experts": None}, ["num_experts", "null"]),
        ("gemma4_text", {"hidden_activation": "tanh"}, ["hidden_activation", "tanh"]),
        ("gemma4_text", {"rope_parameters": {"full_attention": {"rope_type": "proportional", "rope_theta": 9.0}}},
         ["no object for sliding_attention"]),
        ("gemma4_text", {"rope_parameters": {"sliding_attention": {"rope_theta": 9.0}, "full_attention": {
            "rope_type": "proportional", "rope_theta": 9.0, "partial_rotary_factor": 1.5}}}, ["partial_rotary_factor is 1.5"]),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ["longrope", "neighbours"]),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, ["longrope", "short_factor"]),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 0.0], "long_factor": [1.0]}},
         ["short_factor", "positive"]),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [1.0] * 3}},
         ["2 divisors", "3 pairs"]),
        ("qwen3_moe", {"mlp_only_layers": "0"}, ["mlp_only_layers"]),
        ("qwen3", {"layer_types": ["full_attention"]}, ["layer_types"]),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_", "use_sliding_window"]),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0,
                                       "high_freq_factor": 4.0}}, ["low_freq_factor"]),
    ],
)  # fmt: skip
def test_refusals_name_the_key(model_type: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config(tiny(model_type, **changes))
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.case("C1")
def test_what_counts_may_have_the_value_that_changes_nothing() -> None:
    neutral = {
        "is_causal": True,
        "attention_chunk_size": None,
        "per_layer_config": {},
        "sliding_window": None,
    }
    found = read_config(tiny("llama", layer_types=["full_attention", "attention"], **neutral))
    assert found.config == model_config(tiny("llama")) and not found.ignored


def test_a_key_that_no_model_reads_changes_nothing() -> None:
    extra = {"attention_sinks": 4, "use_moe": True, "_name_or_path": "x", "logit_cap": None}
    found = read_config(
        tiny("llama", rope_parameters={"rope_type": "default", "twist": 3}, **extra)
    )
    assert found.config == model_config(tiny("llama"))
    assert sorted(found.ignored) == ["attention_sinks", "rope_parameters.twist", "use_moe"]


def test_of_our_own_type_every_key_counts() -> None:
    """No transformers says what changes nothing there; a newer version may have written it."""
    part = {"width": 16, "router": None}
    raw = {
        "model_type": "moebius", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20,
        "max_position_embeddings": 32, "feed_forward": [part], "architectures": ["MoebiusForCausalLM"],
    }  # fmt: skip
    assert model_config(raw).feed_forward[0].width == 16
    with pytest.raises(ConfigError, match="twist = 3 is not supported for model_type 'moebius'"):
        model_config({**raw, "twist": 3})
