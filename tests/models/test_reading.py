"""config.json to ModelConfig: old and new spellings, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from moebius.config import RopeConfig
from moebius.errors import ConfigError
from moebius.models import MODEL_TYPES, model_config
from oracle import FAMILY, TINY

# What the hub's published config.json files hold (transformers 4 spelling), shortened to the keys that matter.
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def tiny(model_type: str, /, **changes: Any) -> dict[str, Any]:
    """As transformers would write it, with changes made to the written form."""
    written = AutoConfig.for_model(model_type, **{**TINY, **FAMILY[model_type]}).to_dict()
    return {**written, **changes}


def test_published_mixtral() -> None:
    config = model_config(MIXTRAL_8X7B)
    router = config.feed_forward[0].router
    assert router is not None
    assert (router.num_experts, router.top_k, router.score, router.weight) == (8, 2, "softmax", "renorm")
    assert config.head_dim == 128 and config.rope == RopeConfig(1e6) and config.windows == (None,) * 32


def test_published_qwen3_moe() -> None:
    config = model_config(QWEN3_30B_A3B)
    router = config.feed_forward[-1].router
    assert router is not None and router.weight == "renorm" and router.num_experts == 128
    assert config.q_size == 4096 and config.qk_norm == "head" and config.feed_forward[0].width == 768


def test_published_llama_with_long_context() -> None:
    config = model_config(LLAMA_3_2_1B)
    assert config.rope == RopeConfig(500_000.0, "llama3", 32.0, 8192, 1.0, 4.0)
    assert config.tie_word_embeddings and config.feed_forward[0].router is None


@pytest.mark.parametrize("raw", [MIXTRAL_8X7B, QWEN3_30B_A3B, LLAMA_3_2_1B], ids=lambda raw: raw["model_type"])
def test_old_and_new_spelling_are_the_same_model(raw: dict[str, Any]) -> None:
    """transformers 5 rewrites the published file; both must read alike."""
    rewritten = AutoConfig.for_model(**raw).to_dict()
    assert "rope_parameters" in rewritten and "rope_theta" not in rewritten
    assert model_config(rewritten) == model_config(raw)


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - {"moebius"}))
def test_absent_keys_have_the_defaults_of_transformers(model_type: str) -> None:
    """Every optional key, left out, means what transformers' class takes it to be."""
    needed = {**TINY, **FAMILY[model_type], "model_type": model_type}
    filled_in = AutoConfig.for_model(**needed).to_dict()
    assert model_config(needed) == model_config(filled_in)


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("llama", {"model_type": "gpt2"}, ["gpt2", "qwen3_moe"]),
        ("llama", {"model_type": None}, ["None", "supported"]),
        ("llama", {"hidden_size": None}, ["hidden_size", "missing"]),
        ("llama", {"hidden_size": "24"}, ["hidden_size", "'24'"]),
        ("llama", {"num_hidden_layers": True}, ["num_hidden_layers"]),
        ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ("llama", {"hidden_act": "relu2"}, ["hidden_act", "relu2", "silu"]),
        ("llama", {"attention_bias": "yes"}, ["attention_bias", "true or false"]),
        ("llama", {"head_dim": 7}, ["head_dim", "7"]),
        ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ("llama", {"hidden_size": 26, "head_dim": None}, ["hidden_size", "head_dim"]),
        ("llama", {"attention_sinks": 4}, ["attention_sinks", "4", "llama"]),
        ("llama", {"sliding_window": 8}, ["sliding_window"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["gptq", "bfloat16"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "neighbours"]),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["longrope", "neighbours"]),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, ["spiral", "yarn"]),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["linear", "factor"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, ["factor", "number"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "twist": 3}}, ["twist"]),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ("llama", {"rope_parameters": [1]}, ["rope_parameters", "object"]),
        ("mixtral", {"num_experts_per_tok": 6}, ["top_k", "6", "5"]),
        ("qwen3_moe", {"mlp_only_layers": "0"}, ["mlp_only_layers"]),
        ("qwen3_moe", {"n_shared_experts": 1}, ["n_shared_experts"]),
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


def test_unknown_keys_that_switch_nothing_on_are_harmless() -> None:
    plain = model_config(tiny("llama"))
    extra = {"_name_or_path": "x", "unsloth_version": "1", "logit_cap": None, "use_moe": False, "extra_layers": 0}
    assert model_config(tiny("llama", **extra)) == plain
