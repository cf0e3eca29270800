"""Every model type against transformers: logits of prefill, chunked prefill and each decode step,
and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from covering import chosen, rest
from models.ropes import LINEAR, LLAMA3, YARN
from moebius.models.decoder import Decoder
from moebius.models.family import family, model_config
from moebius.models.layout import sources
from moebius.models.store.heads import of_heads
from moebius.models.store.load import load_decoder
from moebius.nn.packed import PackedPast
from moebius.ops import Ops, select_ops
from moebius.ops.reference import ReferenceOps
from moebius.train.initial import init_weights
from oracle import (
    FAMILY,
    ONE_OF_EACH_KIND,
    Server,
    assert_close,
    load_theirs,
    saved_tiny,
    tiny_model,
)

ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "llama", {}),
    ("no-gqa-tied", "llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("gqa8-biases", "llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 48,
                              "attention_bias": True, "mlp_bias": True, "vocab_size": 131}),
    ("llama3-rope", "llama", {"rope_parameters": LLAMA3}),
    ("linear-rope", "llama", {"rope_parameters": LINEAR}),
    ("head-size", "llama", {"head_dim": 14, **ONE_LAYER}),
    ("gelu", "llama", {"hidden_act": "gelu_pytorch_tanh", **ONE_LAYER}),
    ("plain", "granite", {}),
    ("biases-tied", "granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("window", "mistral", {"sliding_window": 4}),
    ("no-window", "mistral", {"sliding_window": None, "head_dim": 22}),
    ("plain", "qwen2", {}),
    ("upper-window", "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
                               "tie_word_embeddings": True}),
    ("plain", "qwen3", {}),
    ("yarn", "qwen3", {"rope_parameters": YARN, "attention_bias": True}),
    ("layer-types", "qwen3", {"use_sliding_window": True, "sliding_window": 3,
                              "layer_types": ["sliding_attention", "full_attention"]}),
    ("plain", "mixtral", {}),
    ("k1-window", "mixtral", {"num_experts_per_tok": 1, "sliding_window": 6, "tie_word_embeddings": True}),
    ("k-all", "mixtral", {"num_experts_per_tok": 5, "hidden_act": "relu", **ONE_LAYER}),
    ("plain", "qwen2_moe", {}),
    ("sparse-step", "qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3],
                                  "norm_topk_prob": True}),
    ("windows", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2,
                              "num_hidden_layers": 3, "qkv_bias": False}),
    ("plain", "qwen3_moe", {}),
    ("raw-weights", "qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1, "attention_bias": True}),
    ("dense-first", "qwen3_moe", {"mlp_only_layers": [0], "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("window-yarn", "qwen3_moe", {"use_sliding_window": True, "sliding_window": 4,
                                  "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False,
                                                      "beta_fast": 8, "beta_slow": 2}}),
    ("aligned", "qwen3_moe", {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 8}),
    ("plain", "olmoe", {}),
    ("clip", "olmoe", {"clip_qkv": 0.5, "attention_bias": True}),
    ("renorm", "olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4, **ONE_LAYER}),
    ("plain", "dots1", {}),
    ("groups", "dots1", {"n_group": 3, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    ("window", "dots1", {"sliding_window": 4, "max_window_layers": 1, "first_k_dense_replace": 0,
                         "attention_bias": True, "tie_word_embeddings": True}),
    ("plain", "granitemoe", {}),
    ("k-all-tied", "granitemoe", {"num_experts_per_tok": 5, "tie_word_embeddings": True, "attention_bias": True}),
    ("plain", "gpt_oss", {}),
    ("clamped", "gpt_oss", {"swiglu_limit": 0.3, "swiglu_alpha": 1.1, "num_hidden_layers": 3, "num_attention_heads": 6,
                            "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 160, "head_dim": 14}),
    ("k-all-full", "gpt_oss", {"num_experts_per_tok": 5, "layer_types": ["full_attention"] * 2, "attention_bias": False,
                               "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("window-types", "gpt_oss", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6,
                                 "num_key_value_heads": 1, "rope_parameters": {**YARN, "attention_factor": 1.2}}),
    ("plain", "glm4_moe", {}),
    ("groups-bare", "glm4_moe", {"n_group": 3, "topk_group": 2, "use_qk_norm": False, "attention_bias": False,
                                 "first_k_dense_replace": 0, "norm_topk_prob": False}),
    ("yarn", "glm4_moe", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.34}, "tie_word_embeddings": True}),
    ("plain", "minimax_m2", {}),
    ("whole-heads-k1", "minimax_m2", {"rotary_dim": None, "num_experts_per_tok": 1, "num_key_value_heads": 1}),
    ("plain", "granitemoeshared", {}),
    ("none-shared", "granitemoeshared", {"shared_intermediate_size": 0, "tie_word_embeddings": True}),
    ("plain", "ernie4_5_moe", {}),
    ("interval", "ernie4_5_moe", {"num_hidden_layers": 5, "moe_layer_interval": 2, "moe_layer_start_index": 2,
                                  "moe_layer_end_index": 3, "tie_word_embeddings": False, "head_dim": 10}),
    ("clamped", "ernie4_5_moe", {"moe_norm_min": 0.9, "moe_num_shared_experts": 0, "num_hidden_layers": 2}),
    ("window", "mellum", {}),
    ("ropes-dense", "mellum", {"mlp_layer_types": ["dense", "sparse"], "norm_topk_prob": False, "attention_bias": True,
                               "rope_parameters": {"full_attention": {**YARN, "factor": 2.0},
                                                   "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}),
    ("full", "mellum", {"layer_types": None, "sliding_window": None, "tie_word_embeddings": True}),
    ("window", "exaone_moe", {}),
    ("groups-full-first", "exaone_moe", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                                         "num_hidden_layers": 3, "n_group": 3, "topk_group": 2, "head_dim": 10,
                                         "mlp_layer_types": ["sparse", "dense", "sparse"], "norm_topk_prob": False}),
    ("plain", "solar_open", {}),
    ("plain", "cohere2_moe", {}),
    ("sum-softmax", "cohere2_moe", {"shared_expert_combination_strategy": "sum", "expert_selection_fn": "softmax",
                                    "tie_word_embeddings": False, "attention_bias": True, "hidden_size": 36}),
    ("root-mean-square", "cohere2_moe", {"rms_norm_eps": 1e-3, "norm_topk_prob": False, "num_shared_experts": 0}),
    ("four-layers", "cohere2_moe", {"layer_types": None, "mlp_layer_types": None, "first_k_dense_replace": 2, "num_hidden_layers": 4,
                                    "sliding_window_pattern": 2, "prefix_dense_sliding_window_pattern": 2,
                                    "prefix_dense_intermediate_size": None}),
    ("bias-yarn", "solar_open", {"attention_bias": True, "rope_parameters": YARN, "n_group": 2, "norm_topk_prob": False}),
    ("plain", "hy_v3", {}),
    ("sparse-first", "hy_v3", {"mlp_layer_types": ["sparse", "dense"], "attention_bias": True,
                               "enable_moe_fp32_combine": False, "tie_word_embeddings": True}),
    ("plain", "hunyuan_v1_moe", {}),
    ("alpha-topk-list", "hunyuan_v1_moe", {"moe_topk": [1, 3], "attention_bias": True, "num_key_value_heads": 1,
                                           "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0,
                                                               "rope_theta": 100.0}}),
    ("plain", "flex_olmo", {}),
    ("renorm-biases", "flex_olmo", {"norm_topk_prob": True, "attention_bias": True, "num_experts_per_tok": 5}),
    ("window", "afmoe", {}),
    ("all-full", "afmoe", {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2,
                           "num_dense_layers": 0, "mup_enabled": False, "attention_bias": True}),
    ("window", "laguna", {}),
    ("elementwise-full", "laguna", {"gating": "per-element", "layer_types": None, "attention_bias": True,
                                    "num_attention_heads_per_layer": None, "moe_router_logit_softcapping": 0.7,
                                    "mlp_layer_types": ["sparse", "dense"]}),
    ("plain", "phi3", {}),
    ("window", "gemma3_text", {}),
    ("caps-ropes", "gemma3_text", {"query_pre_attn_scalar": 7, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "attention_bias": True,
                                   "tie_word_embeddings": False, "rope_parameters": {
                                       "full_attention": {**LINEAR, "rope_theta": 900.0},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}),
    ("plain", "deepseek_v2", {}),
    ("groups-bare", "deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "q_lora_rank": None,
                                    "norm_topk_prob": True, "first_k_dense_replace": 0, "rms_norm_eps": 0.1}),
    ("yarn-bias", "deepseek_v2", {"attention_bias": True, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
                                  "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("plain", "deepseek_v3", {}),
    ("yarn-bias-bare", "deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "n_group": 1, "topk_group": 1,
                                       "rope_parameters": {**YARN, "mscale": 1.3, "mscale_all_dim": 1.3},
                                       "norm_topk_prob": False, "rms_norm_eps": 0.1}),
    ("half-split-odd", "deepseek_v3", {"rope_interleave": False, "first_k_dense_replace": 0, "num_attention_heads": 1,
                                       "num_key_value_heads": 1, "v_head_dim": 5, "qk_nope_head_dim": 7, "kv_lora_rank": 33}),
    ("many-heads", "deepseek_v3", {"num_attention_heads": 72, "num_key_value_heads": 72, "num_hidden_layers": 1,
                                   "first_k_dense_replace": 1, "rope_parameters": LINEAR}),
    ("plain", "glm4_moe_lite", {}),
    ("dense-last", "glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"], "tie_word_embeddings": True, "n_group": 2,
                                     "topk_group": 1, "v_head_dim": 11, "rms_norm_eps": 0.1}),
    ("plain", "mistral4", {}),
    ("groups-bare", "mistral4", {"n_group": 3, "topk_group": 2, "norm_topk_prob": False, "q_lora_rank": None,
                                 "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "attention_bias": True}),
    ("plain", "axk1", {}),
    ("all-sparse-yarn", "axk1", {"mlp_layer_types": ["sparse", "sparse"], "rope_parameters": {**YARN, "mscale_all_dim": 1.0},
                                 "attention_bias": True, "rms_norm_eps": 0.1}),
    ("plain", "deepseek_v32", {}),
    ("types-short", "deepseek_v32", {"mlp_layer_types": ["sparse", "dense"], "index_topk": 20, "norm_topk_prob": False}),
    ("plain", "glm_moe_dsa", {}),
    ("bias", "glm_moe_dsa", {"attention_bias": True, "index_topk": 19, "n_group": 1, "topk_group": 1}),
    ("window", "gemma4_text", {}),
    ("dense-own-values", "gemma4_text", {"enable_moe_block": False, "attention_k_eq_v": False, "final_logit_softcapping": 3.0,
                                         "tie_word_embeddings": False, "num_key_value_heads": 4}),
    ("window-seven-layers", "gemma4_text", {"num_hidden_layers": 7, "layer_types": None, "attention_bias": True,
                                            "num_global_key_value_heads": None, "top_k_experts": 5, "hidden_size": 36}),
    ("ropes-last-full", "gemma4_text", {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3, "global_head_dim": 26,
        "num_global_key_value_heads": 4, "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 900.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}),
    ("window-taken-keys", "gemma4_unified_text", {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 5, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    ("window", "gemma4_unified_text", {}),
    ("same-heads", "gemma4_unified_text", {"global_head_dim": 10, "attention_k_eq_v": True, "final_logit_softcapping": 2.0}),
    ("window-partial", "phi3", {"sliding_window": 4, "tie_word_embeddings": True, "head_dim": 10,
                                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                                    "partial_rotary_factor": 0.67}}),
]  # fmt: skip
PROMPTS = ([5, 66, 0, 17, 23, 23, 41, 8, 30, 2, 60, 11, 1], [9, 9, 33, 50, 64, 3, 28])


def _serve(server: Server) -> list[list[int]]:
    """Two prompts, the first in chunks beside the second's decodes, then both decode: token ids of
    each."""
    first, second = (list(prompt) for prompt in PROMPTS)
    server.step([(0, first[:4]), (1, second[:1])])
    server.step([(1, second[1:]), (0, first[4:5])])
    second.append(server.greedy(1))
    server.step([(0, first[5:]), (1, second[-1:])])
    for _ in range(5):
        first.append(server.greedy(0))
        second.append(server.greedy(1))
        server.step([(0, first[-1:]), (1, second[-1:])])
    return [first, second]


OPS = [ReferenceOps(), select_ops("cpu", torch.float32)]


def in_every_run(ops: Ops, name: str, model_type: str, overrides: dict[str, Any]) -> bool:
    """Every case by our kernels; the plainest of one family of each kind by plain PyTorch too."""
    return ops is OPS[1] or (model_type in ONE_OF_EACH_KIND and not overrides)


BY_BOTH = [(ops, *case) for case in CASES for ops in OPS]


@pytest.mark.parametrize(
    ("ops", "name", "model_type", "overrides"),
    [case if in_every_run(*case) else rest(*case) for case in BY_BOTH],
    ids=[f"{model_type}-{name}-{ops.name}" for ops, name, model_type, _ in BY_BOTH],
)
def test_served_logits_equal_transformers(
    tmp_path: Path, ops: Ops, name: str, model_type: str, overrides: dict[str, Any]
) -> None:
    model = saved_tiny(tmp_path, model_type, **overrides)
    decoder = load_decoder(tmp_path, torch.float32, ops=ops)
    for block_size in (3, 16) if model_type in ONE_OF_EACH_KIND and not overrides else (5,):
        server = Server(decoder, block_size, num_blocks=60 // block_size + 2)
        for sequence, ids in enumerate(_serve(server)):
            with torch.inference_mode():
                theirs = model(torch.tensor([ids])).logits[0]
            ours = server.all_logits(sequence)
            assert ours.shape == theirs.shape and ours.dtype == torch.float32
            assert_close(ours, theirs)
            prompt = len(PROMPTS[sequence])
            assert ids[prompt:] == theirs[prompt - 1 : -1].argmax(-1).tolist()


def test_greedy_tokens_equal_generate(tmp_path: Path) -> None:
    """transformers' own cached generation, not only its full forward."""
    model = saved_tiny(tmp_path, "qwen3_moe")
    server = Server(load_decoder(tmp_path, torch.float32), block_size=4, num_blocks=16)
    ours = _serve(server)[0]
    theirs = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=5, do_sample=False)
    assert ours == theirs[0].tolist()


@pytest.mark.parametrize(("model_type", "overrides"), [
    ("qwen3_moe", {}),
    ("qwen3_moe", {"hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 8}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("granitemoe", {}),
    ("dots1", {"hidden_size": 32, "moe_intermediate_size": 16}),
    ("llama", {"mlp_bias": True}),
    ("gpt_oss", {}),
    ("qwen3_next", {}),
    ("qwen3_5_moe_text", {"linear_num_value_heads": 2}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 6}),
    ("mistral4", {}),
    ("gemma4_text", {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
])  # fmt: skip
def test_training_logits_and_gradients_equal_transformers(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = saved_tiny(tmp_path, model_type, **overrides).train()
    decoder = load_decoder(tmp_path, torch.float32, ops=ReferenceOps(), mapped=False)
    ids = torch.randint(0, 67, (3, 11), generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 67, (33,), generator=torch.Generator().manual_seed(2))

    theirs = model(ids).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(theirs, targets).backward()
    past = PackedPast(row_length=11)
    hidden, _ = decoder(ids.flatten(), torch.arange(11).repeat(3), past)
    ours = decoder.logits(hidden)
    torch.nn.functional.cross_entropy(ours, targets).backward()

    assert_close(ours, theirs)
    layouts = family(model_type).layouts
    grads = {name: p.grad for name, p in model.named_parameters()}
    trained = [[s for s in sources(decoder.config, layout) if not s.float32] for layout in layouts]
    parameters = dict(decoder.named_parameters())
    for source in next(wanted for wanted in trained if all(s.name in grads for s in wanted)):
        theirs_grad = grads[source.name]
        if source.heads:
            theirs_grad = of_heads(theirs_grad, source).reshape(source.shape)
        elif source.entry is not None:
            entry = theirs_grad[source.entry]
            theirs_grad = (entry.t() if source.transposed else entry)[slice(*source.rows)]
        grad = parameters[source.parameter].grad
        scale = grads[source.name].abs().max()
        assert (grad - theirs_grad).abs().max() <= 1e-4 * scale, source.parameter


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_next"])
def test_documents_in_a_row_do_not_see_each_other(model_type: str) -> None:
    config = model_config(tiny_model(model_type).config.to_dict())
    decoder = Decoder(config, ReferenceOps())
    init_weights(decoder, torch.Generator().manual_seed(0), std=0.2)
    ids = torch.arange(12)
    documents = torch.tensor([0] * 5 + [1] * 7)
    positions = torch.cat((torch.arange(5), torch.arange(7)))
    packed, _ = decoder(ids, positions, PackedPast(12, documents))
    for part in (slice(0, 5), slice(5, 12)):
        length = part.stop - part.start
        alone, _ = decoder(ids[part], positions[part], PackedPast(length))
        assert_close(packed[part], alone, 1e-5)


@pytest.mark.parametrize("model_type", chosen(FAMILY, ONE_OF_EACH_KIND.__contains__))
def test_bfloat16_serves_close_to_its_float32_self(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    logits = {}
    for dtype in (torch.bfloat16, torch.float32):
        server = Server(load_decoder(tmp_path, dtype), block_size=4, num_blocks=16)
        server.step([(0, PROMPTS[0])])
        logits[dtype] = server.all_logits(0)
    # Loaded anew: converting a module would round its rotary frequencies too.
    with torch.inference_mode():
        theirs = load_theirs(tmp_path)(torch.tensor([PROMPTS[0]])).logits[0]
    assert_close(logits[torch.float32], theirs)
    assert_close(logits[torch.bfloat16], theirs, 0.2)
    assert not torch.equal(logits[torch.bfloat16].bfloat16().float(), logits[torch.bfloat16]), (
        "logits were rounded"
    )
