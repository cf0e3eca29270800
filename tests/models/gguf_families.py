"""The keys that llama.cpp's converter writes for one family each, beside those of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gguf

Config = dict[str, Any]
SIGMOID = gguf.ExpertGatingFuncType.SIGMOID
SOFTMAX = gguf.ExpertGatingFuncType.SOFTMAX


def turning(w: gguf.GGUFWriter, c: Config) -> None:
    size = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    w.add_rope_dimension_count(int(size * c["rope_parameters"].get("partial_rotary_factor", 1.0)))


def groups(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_expert_weights_scale(c["routed_scaling_factor"])
    w.add_expert_weights_norm(c["norm_topk_prob"])
    w.add_expert_group_count(c["n_group"])
    w.add_expert_group_used_count(c["topk_group"])
    w.add_expert_gating_func(SIGMOID)


def windows(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_sliding_window(c["sliding_window"])
    w.add_sliding_window_pattern([kind == "sliding_attention" for kind in c["layer_types"]])


def dots1(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_leading_dense_block_count(c.get("first_k_dense_replace", 0))
    w.add_expert_shared_count(c["n_shared_experts"])
    groups(w, c)


def glm4_moe(w: gguf.GGUFWriter, c: Config) -> None:
    dots1(w, c)
    turning(w, c)


def minimax_m2(w: gguf.GGUFWriter, c: Config) -> None:
    turning(w, c)
    w.add_expert_feed_forward_length(c["intermediate_size"])
    w.add_expert_gating_func(SIGMOID)


def granitemoe(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_attention_scale(c["attention_multiplier"])
    w.add_embedding_scale(c["embedding_multiplier"])
    w.add_residual_scale(c["residual_multiplier"])
    w.add_logit_scale(c["logits_scaling"])
    if c.get("shared_intermediate_size"):
        w.add_expert_shared_feed_forward_length(c["shared_intermediate_size"])


def ernie4_5_moe(w: gguf.GGUFWriter, c: Config) -> None:
    shared = c["moe_num_shared_experts"]
    w.add_expert_used_count(c["moe_k"])
    w.add_interleave_moe_layer_step(c["moe_layer_interval"])
    w.add_leading_dense_block_count(c["moe_layer_start_index"])
    w.add_expert_shared_count(shared)
    if shared:
        w.add_expert_shared_feed_forward_length(shared * c["moe_intermediate_size"])


def mellum(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_rope_freq_base_swa(c["rope_parameters"]["sliding_attention"]["rope_theta"])
    if c["sliding_window"] is not None:
        windows(w, c)


def exaone_moe(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_vocab_size(c["vocab_size"])
    w.add_expert_shared_count(c["num_shared_experts"])
    w.add_expert_shared_feed_forward_length(c["moe_intermediate_size"] * c["num_shared_experts"])
    w.add_leading_dense_block_count(c["first_k_dense_replace"])
    w.add_nextn_predict_layers(0)
    w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    groups(w, c)
    windows(w, c)


def hy_v3(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_expert_shared_feed_forward_length(c["moe_intermediate_size"] * c["num_shared_experts"])
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(c["router_scaling_factor"])
    w.add_expert_gating_func(SIGMOID)


def hunyuan_v1_moe(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_expert_shared_feed_forward_length(c["intermediate_size"])
    w.add_expert_feed_forward_length(c["intermediate_size"])
    w.add_expert_used_count(c["moe_topk"])
    w.add_expert_shared_count(1)
    rope = c["rope_parameters"]
    if rope["rope_type"] == "dynamic":
        size = c["head_dim"]
        w.add_rope_freq_base(rope["rope_theta"] * rope["alpha"] ** (size / (size - 2)))
        w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        w.add_rope_scaling_factor(1)
        w.add_rope_scaling_orig_ctx_len(256 * 1024)


def afmoe(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_vocab_size(c["vocab_size"])
    w.add_rope_dimension_count(c["head_dim"])
    w.add_expert_shared_count(c["num_shared_experts"])
    w.add_leading_dense_block_count(c["num_dense_layers"])
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(c["route_scale"])
    w.add_sliding_window(c["sliding_window"])


def gemma3_text(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_sliding_window(c["sliding_window"])
    w.add_rope_freq_base_swa(c["rope_parameters"]["sliding_attention"]["rope_theta"])
    w.add_final_logit_softcapping(c["final_logit_softcapping"])


def full_heads(c: Config) -> Config:
    """Sizes of heads where a layer sees everything."""
    own = c.get("per_layer_config") or {}
    full = [i for i, kind in enumerate(c["layer_types"]) if kind == "full_attention"]
    found = {int(layer): sizes for layer, sizes in own.items()}.get(full[0], {})
    return {"head_dim": c["head_dim"], **found}


def gemma4(w: gguf.GGUFWriter, c: Config) -> None:
    full = full_heads(c)
    sliding = [kind == "sliding_attention" for kind in c["layer_types"]]
    w.add_shared_kv_layers(c["num_kv_shared_layers"])
    w.add_embedding_length_per_layer_input(c.get("hidden_size_per_layer_input") or 0)
    w.add_sliding_window(c["sliding_window"])
    w.add_sliding_window_pattern(sliding)
    w.add_key_length(full["head_dim"])
    w.add_value_length(full["head_dim"])
    w.add_key_length_swa(c["head_dim"])
    w.add_value_length_swa(c["head_dim"])
    w.add_rope_dimension_count(full["head_dim"])
    w.add_rope_dimension_count_swa(c["head_dim"])
    w.add_rope_freq_base_swa(c["rope_parameters"]["sliding_attention"]["rope_theta"])
    if c.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(c["final_logit_softcapping"])
    if c.get("top_k_experts"):
        w.add_expert_used_count(c["top_k_experts"])
    if c["use_double_wide_mlp"]:
        first = c["num_hidden_layers"] - c["num_kv_shared_layers"]
        width = c["intermediate_size"]
        w.add_feed_forward_length(
            [width if i < first else 2 * width for i in range(c["num_hidden_layers"])]
        )
    if "num_key_value_heads" in full:
        heads = c["num_key_value_heads"]
        w.add_head_count_kv(
            [heads if slides else full["num_key_value_heads"] for slides in sliding]
        )


def laguna(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_vocab_size(c["vocab_size"])
    w.add_head_count(c["num_attention_heads_per_layer"])
    w.add_sliding_window(c["sliding_window"])
    w.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(c["moe_routed_scaling_factor"])
    w.add_expert_gating_func(SIGMOID)
    w.add_leading_dense_block_count(c["mlp_layer_types"].index("sparse"))
    ropes = c["rope_parameters"]
    for kind, add in (
        ("full_attention", w.add_rope_dimension_count),
        ("sliding_attention", w.add_rope_dimension_count_swa),
    ):
        add(int(c["head_dim"] * ropes[kind].get("partial_rotary_factor", 1.0)))
    w.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


def cohere2_moe(w: gguf.GGUFWriter, c: Config) -> None:
    windows(w, c)
    w.add_logit_scale(c["logit_scale"])
    w.add_vocab_size(c["vocab_size"])
    w.add_layer_norm_eps(c["layer_norm_eps"])
    w.add_expert_feed_forward_length(c["intermediate_size"])
    w.add_leading_dense_block_count(c["mlp_layer_types"].index("sparse"))
    w.add_expert_weights_norm(c["norm_topk_prob"])
    w.add_expert_gating_func({"softmax": SOFTMAX, "sigmoid": SIGMOID}[c["expert_selection_fn"]])
    if c["num_shared_experts"]:
        w.add_expert_shared_count(c["num_shared_experts"])
        shared = c["intermediate_size"] * c["num_shared_experts"]
        w.add_expert_shared_feed_forward_length(shared)
    turning(w, c)


def latent(w: gguf.GGUFWriter, c: Config) -> None:
    w.add_vocab_size(c["vocab_size"])
    if c["q_lora_rank"] is not None:
        w.add_q_lora_rank(c["q_lora_rank"])
    w.add_kv_lora_rank(c["kv_lora_rank"])
    w.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    w.add_value_length(c["kv_lora_rank"])
    w.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    w.add_value_length_mla(c["v_head_dim"])
    w.add_rope_dimension_count(c["qk_rope_head_dim"])
    w.add_expert_shared_count(c["n_shared_experts"])
    types = c.get("mlp_layer_types")
    w.add_leading_dense_block_count(types.index("sparse") if types else c["first_k_dense_replace"])
    w.add_expert_weights_scale(c["routed_scaling_factor"])
    w.add_expert_weights_norm(c["norm_topk_prob"])
    if c["n_group"] is not None:
        w.add_expert_group_count(c["n_group"])
        w.add_expert_group_used_count(c["topk_group"])
    if "mscale_all_dim" in c["rope_parameters"]:
        w.add_rope_scaling_yarn_log_mul(0.1 * c["rope_parameters"]["mscale_all_dim"])


def deepseek_v2(w: gguf.GGUFWriter, c: Config) -> None:
    latent(w, c)
    w.add_expert_gating_func(SOFTMAX)


def deepseek_v3(w: gguf.GGUFWriter, c: Config) -> None:
    latent(w, c)
    w.add_expert_gating_func(SIGMOID)


def mistral4(w: gguf.GGUFWriter, c: Config) -> None:
    deepseek_v2(w, c)
    rope = c["rope_parameters"]
    w.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    w.add_attn_temperature_length(rope["original_max_position_embeddings"])


def phi3(w: gguf.GGUFWriter, c: Config) -> None:
    turning(w, c)
    original = c["original_max_position_embeddings"]
    w.add_rope_scaling_orig_ctx_len(original)
    rope = c["rope_parameters"]
    if rope["rope_type"] == "longrope":
        scale = c["max_position_embeddings"] / original
        usual = math.sqrt(1 + math.log(scale) / math.log(original))
        w.add_rope_scaling_attn_factors(rope.get("attention_factor", usual))
    w.add_sliding_window(c["sliding_window"] or 0)


OWN_KEYS: dict[str, Callable[[gguf.GGUFWriter, Config], None]] = {
    "dots1": dots1,
    "glm4_moe": glm4_moe,
    "solar_open": glm4_moe,
    "minimax_m2": minimax_m2,
    "granite": granitemoe,
    "granitemoe": granitemoe,
    "granitemoeshared": granitemoe,
    "ernie4_5_moe": ernie4_5_moe,
    "mellum": mellum,
    "exaone_moe": exaone_moe,
    "hy_v3": hy_v3,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "afmoe": afmoe,
    "gemma3_text": gemma3_text,
    "gemma4_text": gemma4,
    "gemma4_unified_text": gemma4,
    "laguna": laguna,
    "cohere2_moe": cohere2_moe,
    "phi3": phi3,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "glm4_moe_lite": deepseek_v3,
    "mistral4": mistral4,
}
