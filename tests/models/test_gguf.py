"""GGUF files of every architecture and every type, against transformers on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from covering import chosen, each_value, rest
from models.gguf_beside_json import assert_keys_say_the_same
from models.gguf_hybrids import FirstConverter
from models.gguf_recurrent import converter
from models.gguf_writing import TypeOf, plain
from models.ropes import LINEAR, LLAMA3, YARN
from moebius.errors import WeightsError
from moebius.gguf import open_gguf
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.ops import Ops, select_ops
from moebius.ops.reference import ReferenceOps
from moebius.quantize.export import write_model
from oracle import PROMPT, Server, assert_same_answers, save_tiny

DENSE_NEMOTRON = ["mlp", "linear_attention", "mlp", "full_attention"]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "llama", {}),
    ("tied-no-gqa", "llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("biases", "llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("llama3-rope", "llama", {"rope_parameters": LLAMA3}),
    ("linear-rope", "llama", {"rope_parameters": LINEAR}),
    ("head-size", "llama", {"head_dim": 14}),
    ("plain", "mistral", {"sliding_window": None}),
    ("plain", "mixtral", {}),
    ("plain", "qwen2", {}),
    ("tied", "qwen2", {"tie_word_embeddings": True}),
    ("plain", "qwen2_moe", {}),
    ("plain", "qwen3", {}),
    ("yarn", "qwen3", {"rope_parameters": YARN}),
    ("yarn-attention", "qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    ("plain", "qwen3_moe", {}),
    ("plain", "olmoe", {}),
    ("plain", "dots1", {"n_group": 1, "topk_group": 1}),
    ("groups", "dots1", {"n_group": 3, "topk_group": 2, "norm_topk_prob": False}),
    ("plain", "granite", {}),
    ("biases", "granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("plain", "granitemoe", {}),
    ("tied", "granitemoe", {"tie_word_embeddings": True}),
    ("plain", "gpt_oss", {}),
    ("plain-rope", "gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150.0}}),
    ("three-layers", "gpt_oss", {"num_hidden_layers": 3, "attention_bias": False, "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 150.0,
        "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}}),
    ("plain", "glm4_moe", {}),
    ("bare-yarn", "glm4_moe", {"use_qk_norm": False, "attention_bias": False, "rope_parameters": YARN}),
    ("llama3-rope", "glm4_moe", {"rope_parameters": LLAMA3}),
    ("plain", "minimax_m2", {}),
    ("plain", "granitemoeshared", {}),
    ("none-shared", "granitemoeshared", {"shared_intermediate_size": 0}),
    ("plain", "ernie4_5_moe", {}),
    ("interval", "ernie4_5_moe", {"num_hidden_layers": 5, "moe_layer_interval": 2, "moe_num_shared_experts": 0}),
    ("window", "mellum", {}),
    ("yarn", "mellum", {"rope_parameters": {"full_attention": {**YARN, "factor": 2.0},
                                            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}}),
    ("window", "exaone_moe", {}),
    ("types-groups", "exaone_moe", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                                    "num_hidden_layers": 3, "n_group": 3, "topk_group": 2, "norm_topk_prob": False}),
    ("plain", "solar_open", {}),
    ("plain", "cohere2_moe", {}),
    ("softmax", "cohere2_moe", {"expert_selection_fn": "softmax", "rms_norm_eps": 1e-3, "num_shared_experts": 0,
                                "prefix_dense_intermediate_size": None, "tie_word_embeddings": False}),
    ("plain", "hy_v3", {}),
    ("sparse-first", "hy_v3", {"mlp_layer_types": ["sparse", "dense"]}),
    ("plain", "hunyuan_v1_moe", {}),
    ("alpha", "hunyuan_v1_moe", {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 100.0}}),
    ("window", "afmoe", {}),
    ("five-layers", "laguna", {"num_hidden_layers": 5, "num_attention_heads_per_layer": [4, 6, 6, 2, 4],
                               "layer_types": ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"]}),
    ("elementwise", "laguna", {"gating": "per-element", "num_attention_heads_per_layer": [4, 4]}),
    ("seven-layers", "gemma3_text", {"num_hidden_layers": 7, "layer_types": None, "final_logit_softcapping": 3.0}),
    ("window", "gemma4_text", {}),
    ("seven-layers-dense", "gemma4_text", {"num_hidden_layers": 7, "layer_types": None, "enable_moe_block": False, "num_experts": None,
                                           "moe_intermediate_size": None, "top_k_experts": None, "final_logit_softcapping": 3.0,
                                           "global_head_dim": 26, "tie_word_embeddings": False}),
    ("taken-keys", "gemma4_unified_text", {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    ("dense", "gemma4_unified_text", {}),
    ("plain", "phi3", {}),
    ("partial", "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.67}}),
    ("plain", "deepseek_v2", {}),
    ("groups-bare", "deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "q_lora_rank": None}),
    ("plain", "deepseek_v3", {}),
    ("yarn-bare", "deepseek_v3", {"q_lora_rank": None, "rope_parameters": {**YARN, "mscale": 1.3, "mscale_all_dim": 1.3},
                                  "v_head_dim": 5, "qk_nope_head_dim": 7, "first_k_dense_replace": 0}),
    ("plain", "glm4_moe_lite", {}),
    ("plain", "mistral4", {}),
    ("plain", "qwen3_next", {}),
    ("one-value-head-a-key", "qwen3_next", {"linear_num_value_heads": 2, "tie_word_embeddings": True}),
    ("plain", "qwen3_5_text", {}),
    ("three-a-key", "qwen3_5_text", {"linear_num_value_heads": 6, "linear_conv_kernel_dim": 3, "layer_types": [
        "full_attention", "linear_attention", "linear_attention"], "num_hidden_layers": 3}),
    ("plain", "qwen3_5_moe_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 90.0,
                                                       "partial_rotary_factor": 0.5}}),
    ("plain", "lfm2", {}),
    ("adjusted", "lfm2", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 8, "intermediate_size": 40,
                          "tie_word_embeddings": False}),
    ("plain", "lfm2_moe", {}),
    ("convolutions-first", "lfm2_moe", {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 0, "conv_L_cache": 4}),
    ("plain", "granitemoehybrid", {}),
    ("dense-turning", "granitemoehybrid", {"num_local_experts": 0, "position_embedding_type": "rope", "mamba_n_groups": 1,
                                           "mamba_conv_bias": False, "attention_bias": True, "tie_word_embeddings": True}),
    ("plain", "nemotron_h", {}),
    ("dense", "nemotron_h", {"layers_block_type": DENSE_NEMOTRON}),
    ("dense-biased", "nemotron_h", {"layers_block_type": DENSE_NEMOTRON[1:], "num_hidden_layers": 3, "mlp_bias": True,
                                    "attention_bias": True, "use_conv_bias": False}),
    ("latent-groups", "nemotron_h", {"moe_latent_size": 10, "n_group": 3, "topk_group": 2, "use_conv_bias": False}),
    ("plain", "kimi_linear", {}),
    ("narrow-queries", "kimi_linear", {"q_lora_rank": 10, "n_group": 3, "topk_group": 2, "tie_word_embeddings": True}),
    ("plain", "bailing_hybrid", {}),
    ("full-first", "bailing_hybrid", {"layer_types": ["full_attention", "linear_attention"], "mlp_layer_types": ["sparse", "sparse"],
                                      "kda_lower_bound": -0.75, "short_conv_kernel_size": 3, "norm_topk_prob": False}),
]  # fmt: skip
OPS = [ReferenceOps(), select_ops("cpu", torch.float32)]


def saved(
    directory: Path,
    model_type: str,
    overrides: dict[str, Any],
    type_of: TypeOf = plain,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """A tiny model's file; the directory beside it holds the same numbers."""
    save_tiny(directory, model_type, **overrides)
    path = directory / "tiny.gguf"
    converter(directory, type_of).save(path, change)
    return path


@pytest.mark.parametrize(
    ("name", "model_type", "overrides"), CASES, ids=[f"{kind}-{name}" for name, kind, _ in CASES]
)
def test_keys_and_configuration_say_the_same(
    tmp_path: Path, name: str, model_type: str, overrides: dict[str, Any]
) -> None:
    """And every tensor has its place."""
    open_checkpoint(saved(tmp_path, model_type, overrides))
    assert_keys_say_the_same(tmp_path, name, model_type)


# Every run has each family's first case with one backend, in turn.
BY_BOTH = [(ops, *case) for case in CASES for ops in OPS]
FIRST = {model_type: name for name, model_type, _ in reversed(CASES)}
BACKEND = {model_type: OPS[i % 2] for i, model_type in enumerate(FIRST)}


@pytest.mark.parametrize(
    ("ops", "name", "model_type", "overrides"),
    [
        case if case[1] == FIRST[case[2]] and case[0] is BACKEND[case[2]] else rest(*case)
        for case in BY_BOTH
    ],
    ids=[f"{model_type}-{name}-{ops.name}" for ops, name, model_type, _ in BY_BOTH],
)
def test_every_architecture_answers_as_the_original(
    tmp_path: Path, ops: Ops, name: str, model_type: str, overrides: dict[str, Any]
) -> None:
    """By its file alone."""
    path = saved(tmp_path, model_type, overrides)
    assert_same_answers(load_decoder(path, torch.float32, ops=ops), tmp_path)


@pytest.mark.parametrize(
    ("kind", "ops"),
    each_value([Type.F32, Type.Q8_0], OPS[::-1]),
    ids=lambda value: value.name,
)
def test_qwen3_next_of_the_first_weeks(tmp_path: Path, kind: Type, ops: Ops) -> None:
    """Queries, keys, values and gates in one tensor, a key head's behind one another."""
    sizes = {"hidden_size": 64} if kind == Type.Q8_0 else {}
    save_tiny(tmp_path, "qwen3_next", linear_num_key_heads=2, linear_num_value_heads=6, **sizes)
    path = tmp_path / "tiny.gguf"
    FirstConverter(tmp_path, lambda place: kind if "ssm_in" in place else Type.F32).save(path)
    assert open_gguf(path).tensors["blk.0.ssm_in.weight"].type.name == kind.name
    if kind == Type.F32 or ops.name == "reference":
        assert_same_answers(load_decoder(path, torch.float32, ops=ops), tmp_path)
    again = tmp_path / "again.gguf"
    write_model(path, again, "f32")
    assert "blk.0.ssm_in.weight" in open_gguf(again).tensors
    assert_same_answers(load_decoder(again, torch.float32, ops=ops), tmp_path)


def test_both_ways_of_qwen3_next_in_one_file_are_refused(tmp_path: Path) -> None:
    def beside(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ssm_in.weight", np.zeros((72, 24), dtype=np.float32))

    path = saved(tmp_path, "qwen3_next", {}, change=beside)
    with pytest.raises(
        WeightsError, match=r"tensor 'blk\.0\.attn_(gate|qkv)\.weight' is left over"
    ):
        open_checkpoint(path)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """They stand behind the model's own, and the file counts them with these."""

    def predicting(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("glm4moe.block_count")
        writer.add_block_count(3)
        writer.add_nextn_predict_layers(1)
        for name in ("nextn.eh_proj.weight", "nextn.enorm.weight", "attn_q.weight"):
            writer.add_tensor(f"blk.2.{name}", np.zeros((32, 32), dtype=np.float32))

    path = saved(tmp_path, "glm4_moe", {}, change=predicting)
    assert_same_answers(load_decoder(path, torch.float32, ops=ReferenceOps()), tmp_path)
    again = tmp_path / "again.gguf"
    write_model(path, again, "f32")
    metadata = open_gguf(again).metadata
    assert metadata["glm4moe.block_count"] == 2
    assert "glm4moe.nextn_predict_layers" not in metadata
    assert not [name for name in open_gguf(again).tensors if name.startswith("blk.2.")]
    assert_same_answers(load_decoder(again, torch.float32, ops=ReferenceOps()), tmp_path)


# Wide enough for blocks of 256 in every matrix.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "initializer_range": 0.02,
}
TYPES = [
    Type.F16,
    Type.BF16,
    Type.Q8_0,
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q2_K,
    Type.Q3_K,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
    Type.IQ4_NL,
    Type.IQ4_XS,
    Type.MXFP4,
]


# The other types are those of mixed(), below.
@pytest.mark.parametrize(
    "kind", chosen(TYPES, lambda kind: kind in TYPES[:8]), ids=lambda kind: kind.name
)
def test_every_type_means_what_gguf_py_makes_of_it(tmp_path: Path, kind: Type) -> None:
    path = saved(tmp_path, "llama", WIDE, lambda _: kind)
    stored = {tensor.dtype for tensor in open_checkpoint(path).tensors.values()}
    assert stored == {"F32", kind.name}
    assert_same_answers(load_decoder(path, torch.float32, ops=ReferenceOps()), tmp_path)


def mixed(place: str) -> Type:
    """Another type for each kind of tensor, as files have them."""
    kinds = [
        "ffn_gate_exps",
        "ffn_up_exps",
        "ffn_down_exps",
        "attn_q",
        "attn_k",
        "attn_v",
        "output",
    ]
    return next((TYPES[-1 - i] for i, kind in enumerate(kinds) if kind in place), Type.Q8_0)


SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 256, "head_dim": 64},
    "granitemoe": {},
}


@pytest.mark.parametrize("model_type", SIZES)
def test_types_may_differ_from_tensor_to_tensor(tmp_path: Path, model_type: str) -> None:
    path = saved(tmp_path, model_type, {**WIDE, **SIZES[model_type]}, mixed)
    stored = {tensor.dtype for tensor in open_checkpoint(path).tensors.values()}
    assert len(stored) >= 8
    assert_same_answers(load_decoder(path, torch.float32, ops=ReferenceOps()), tmp_path)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    each_value(["qwen3_moe", "granitemoe"], [torch.bfloat16, torch.float32]),
    ids=str,
)
def test_quantised_answers_have_the_same_bits_in_any_batch(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    """Promise P1, with every kind of product that a mixed file asks for, and rows in pairs."""
    path = saved(tmp_path, model_type, {**WIDE, **SIZES[model_type]}, mixed)
    ops = select_ops("cpu", dtype)
    decoder = load_decoder(path, dtype, ops=ops)
    formats = {
        weight.format
        for weight in open_checkpoint(path).plan_weights(
            str(dtype).removeprefix("torch."), formats=ops.formats(dtype)
        )
        if weight.mapped
    }
    assert len(formats) >= 7, "blocks are read where they lie"
    alone, beside = (Server(decoder, block_size=5, num_blocks=12) for _ in range(2))
    for token in PROMPT:
        alone.step([(0, [token])])
    beside.step([(1, PROMPT[:7]), (0, PROMPT[:5])])
    beside.step([(0, PROMPT[5:]), (1, PROMPT[3:9])])
    assert torch.equal(alone.all_logits(0), beside.all_logits(0))
