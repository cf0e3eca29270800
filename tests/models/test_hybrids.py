"""Hybrids, part of whose layers recur (Qwen3-Next and Qwen3.5, LFM2, Granite 4, Nemotron-H), against
transformers, token by token, in every layout that their checkpoints come in."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from covering import chosen, rest
from models.gguf_recurrent import converter
from models.quantization.test_loading import plain_copy
from models.ropes import LLAMA3, YARN
from moebius.errors import ConfigError, WeightsError
from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.family import model_config, read_config
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.nn.attention import GQA
from moebius.nn.mixers.gated_delta import GatedDelta
from moebius.ops import Ops, select_ops
from moebius.ops.config import DeltaSizes
from moebius.ops.reference import ReferenceOps
from moebius.quantize.cached import Quantized
from moebius.quantize.export import write_model
from oracle import (
    FAMILY,
    ONE_OF_EACH_KIND,
    TINY,
    Server,
    assert_close,
    load_theirs,
    save_tiny,
    saved_tiny,
    tiny_model,
)
from quantised import KINDS, write_quantised
from tiny import write_tokenizer

IDS = [5, 66, 0, 17, 23, 23, 41, 8, 30, 2, 60, 11, 1, 1, 50, 3, 44, 12, 9, 61]
OPS = [ReferenceOps(), select_ops("cpu", torch.float32)]
LINEAR = "linear_attention"
FULL = "full_attention"
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "qwen3_next", {}),
    ("one-value-head-a-key", "qwen3_next", {"linear_num_value_heads": 2, "linear_value_head_dim": 10}),
    ("one-key-head", "qwen3_next", {"linear_num_key_heads": 1, "linear_num_value_heads": 3, "norm_topk_prob": False}),
    ("attention-first", "qwen3_next", {"layer_types": [FULL, LINEAR, LINEAR], "num_hidden_layers": 3,
                                       "mlp_only_layers": [1], "tie_word_embeddings": True}),
    ("no-experts", "qwen3_next", {"num_experts": 0, "attention_bias": True, "linear_conv_kernel_dim": 2}),
    ("recurrent-alone", "qwen3_next", {"layer_types": [LINEAR, LINEAR], "decoder_sparse_step": 2}),
    ("attention-alone", "qwen3_next", {"layer_types": [FULL, FULL], "num_key_value_heads": 4, "rope_parameters": {
        "rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}}),
    ("plain", "qwen3_5_moe_text", {}),
    ("wide-values", "qwen3_5_moe_text", {"linear_value_head_dim": 11, "linear_num_value_heads": 6, "head_dim": 24,
                                         "num_experts_per_tok": 1}),
    ("yarn", "qwen3_5_moe_text", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
    ("plain", "qwen3_5_text", {}),
    ("positions-of-images", "qwen3_5_text", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True}}),
    ("every-third", "qwen3_5_text", {"full_attention_interval": 3, "num_hidden_layers": 4, "linear_conv_kernel_dim": 5,
                                     "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("plain", "lfm2", {}),
    ("convolutions-alone", "lfm2", {"layer_types": ["conv", "conv"], "conv_L_cache": 2, "conv_bias": True}),
    ("adjusted-biases", "lfm2", {"conv_bias": True, "conv_L_cache": 5, "block_auto_adjust_ff_dim": True, "block_multiple_of": 8,
                                 "block_ffn_dim_multiplier": 1.3, "intermediate_size": 40, "tie_word_embeddings": False}),
    ("by-number", "lfm2", {"layer_types": None, "full_attn_idxs": [0], "num_hidden_layers": 3, "rope_parameters": YARN}),
    ("plain", "lfm2_moe", {}),
    ("raw-scaled", "lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 2.5, "num_dense_layers": 0,
                                "num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("plain", "granitemoehybrid", {}),
    ("dense-turning", "granitemoehybrid", {"num_local_experts": 0, "position_embedding_type": "rope", "mamba_n_groups": 1,
                                           "mamba_conv_bias": False, "mamba_proj_bias": True, "attention_bias": True,
                                           "mamba_expand": 3, "mamba_d_conv": 2, "tie_word_embeddings": True}),
    ("mamba-alone", "granitemoehybrid", {"layer_types": None, "mamba_d_state": 17, "mamba_n_heads": 2, "num_experts_per_tok": 5}),
    ("attention-alone", "granitemoehybrid", {"layer_types": [FULL, FULL], "num_key_value_heads": 4}),
    ("plain", "nemotron_h", {}),
    ("latent-groups", "nemotron_h", {"moe_latent_size": 10, "n_group": 3, "topk_group": 2, "norm_topk_prob": False, "n_groups": 4}),
    ("dense-biases", "nemotron_h", {"layers_block_type": [LINEAR, "mlp", FULL, LINEAR, "mlp"], "num_hidden_layers": 5, "mlp_bias": True,
                                    "use_bias": True, "use_conv_bias": False, "n_groups": 1,
                                    "conv_kernel": 3, "tie_word_embeddings": True}),
    ("experts-first", "nemotron_h", {"layers_block_type": ["moe", "moe", FULL, FULL, LINEAR], "num_hidden_layers": 5,
                                     "num_experts_per_tok": 1, "ssm_state_size": 33, "mamba_head_dim": 20}),
    ("plain", "kimi_linear", {}),
    ("by-lists", "kimi_linear", {
        "layer_types": None, "mlp_layer_types": None, "num_hidden_layers": 3, "first_k_dense_replace": 2, "norm_topk_prob": False,
        "linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2, 3], "head_dim": 17, "num_heads": 2, "short_conv_kernel_size": 2}}),
    ("narrow-queries", "kimi_linear", {"q_lora_rank": 10, "attention_bias": True, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 0.5,
                                       "layer_types": [FULL, LINEAR], "tie_word_embeddings": True}),
    ("delta-alone", "kimi_linear", {"layer_types": [LINEAR, LINEAR], "mlp_layer_types": None, "num_experts_per_tok": 1}),
    ("every-fourth", "kimi_linear", {"layer_types": None, "mlp_layer_types": None, "num_hidden_layers": 5, "linear_head_dim": 33}),
    ("plain", "bailing_hybrid", {}),
    ("unsafe", "bailing_hybrid", {"kda_safe_gate": False, "layer_types": None, "layer_group_size": 2, "num_hidden_layers": 4,
                                  "mlp_layer_types": None, "first_k_dense_replace": 1, "short_conv_kernel_size": 2}),
    ("bounded-turning", "bailing_hybrid", {"kda_lower_bound": -0.5, "attention_bias": True, "rope_parameters": YARN, "head_dim": 6,
                                           "qk_rope_head_dim": 6, "norm_topk_prob": False, "tie_word_embeddings": True}),
    ("latents-alone", "bailing_hybrid", {"layer_types": [FULL, FULL], "n_group": 1, "n_shared_experts": 1}),
]  # fmt: skip


@torch.inference_mode()
def recurrent(model: Any, ids: list[int]) -> Tensor:
    """transformers' logits, each token by its recurrent step; of layers that all recur, which it
    takes no steps of, those of the whole text."""
    if FULL not in model.config.layer_types:
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits
    past = None
    rows = []
    for token in ids:
        out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Log-probabilities within 1e-4, and the same greedy tokens."""
    assert (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max() <= 1e-4
    assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist()


# Every run has each case by our kernels, and one of each kind of states by plain PyTorch too.
BY_BOTH = [(ops, *case) for case in CASES for ops in OPS]


@pytest.mark.parametrize(
    ("ops", "name", "model_type", "changes"),
    [
        case
        if case[0] is OPS[1] or (case[1] == "plain" and case[2] in ONE_OF_EACH_KIND)
        else rest(*case)
        for case in BY_BOTH
    ],
    ids=[f"{model_type}-{name}-{ops.name}" for ops, name, model_type, _ in BY_BOTH],
)
def test_prefill_and_each_step_equal_transformers_recurrence(
    tmp_path: Path, ops: Ops, name: str, model_type: str, changes: dict[str, Any]
) -> None:
    """Two prompts in chunks beside each other's steps; then each decodes what it chooses."""
    model = saved_tiny(tmp_path, model_type, **changes)
    for text, ours in served_beside_each_other(load_decoder(tmp_path, torch.float32, ops=ops)):
        assert_same(ours, recurrent(model, text))


def served_beside_each_other(decoder: Decoder) -> list[tuple[list[int], Tensor]]:
    """Each text, of a prompt and what follows, and the logits of its tokens."""
    server = Server(decoder, block_size=5, num_blocks=14)
    texts = [list(IDS), IDS[:7][::-1]]
    server.step([(0, texts[0][:4]), (1, texts[1][:1])])
    server.step([(1, texts[1][1:]), (0, texts[0][4:5])])
    server.step([(0, texts[0][5:])])
    for _ in range(3):
        for sequence, text in enumerate(texts):
            text.append(server.greedy(sequence))
        server.step([(sequence, text[-1:]) for sequence, text in enumerate(texts)])
    return [(text, server.all_logits(sequence)) for sequence, text in enumerate(texts)]


def test_bfloat16_is_close_to_float32(tmp_path: Path) -> None:
    saved_tiny(tmp_path, "qwen3_5_moe_text").to(torch.bfloat16).save_pretrained(tmp_path)
    logits = {}
    for dtype in (torch.bfloat16, torch.float32):
        server = Server(load_decoder(tmp_path, dtype), block_size=4, num_blocks=16)
        server.step([(0, IDS)])
        logits[dtype] = server.all_logits(0)
    assert_close(logits[torch.bfloat16], logits[torch.float32], 0.1)


def multimodal(directory: Path, kind: str, *, fused: bool, seed: int = 0, **changes: Any) -> Any:
    """A language model in the files of one that also sees: names, keys and tensors of vision and of
    multi-token prediction beside it; returns it."""
    text = f"{kind}_text"
    model = tiny_model(text, seed, **changes)
    config = AutoConfig.for_model(kind, vision_config={"depth": 1}).to_dict()
    config["text_config"] = model.config.to_dict()
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.", "model.language_model.", 1)
        if name.endswith("experts.gate_up_proj") and not fused:
            for expert, matrix in enumerate(tensor):
                before = f"{name.removesuffix('gate_up_proj')}{expert}."
                gate, up = matrix.chunk(2)
                tensors[f"{before}gate_proj.weight"] = gate.contiguous()
                tensors[f"{before}up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj") and not fused:
            for expert, matrix in enumerate(tensor):
                place = f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"
                tensors[place] = matrix.contiguous()
        else:
            tensors[name] = tensor
    for beside in ("model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight", "mtp.layers.0.x"):
        tensors[beside] = torch.zeros(2, 2)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_of_a_multimodal_one_is_read(
    kind: str, fused: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = multimodal(tmp_path, kind, fused=fused)
    caplog.set_level(logging.INFO)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.model_type == f"{kind}_text"
    assert "vision_config" in caplog.text
    server = Server(load_decoder(checkpoint, torch.float32), block_size=4, num_blocks=8)
    server.step([(0, IDS)])
    assert_same(server.all_logits(0), recurrent(model, IDS))


def test_a_head_may_be_tied_for_the_whole_file(tmp_path: Path) -> None:
    model = multimodal(tmp_path, "qwen3_5", fused=True)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' is missing"):
        open_checkpoint(tmp_path)
    config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    server = Server(load_decoder(tmp_path, torch.float32), block_size=4, num_blocks=8)
    server.step([(0, IDS)])
    model.lm_head.weight = model.model.embed_tokens.weight
    assert_same(server.all_logits(0), recurrent(model, IDS))


def test_projections_in_groups_are_read_where_they_lie(tmp_path: Path) -> None:
    """Qwen3-Next's matrices are mapped whole, as they are stored."""
    saved_tiny(tmp_path, "qwen3_next").to(torch.bfloat16).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, torch.bfloat16)
    planned = {each.name: each for each in open_checkpoint(tmp_path).plan_weights("bfloat16")}
    for name in ("in_proj_qkvz", "in_proj_ba"):
        assert planned[f"layers.0.self_attn.{name}.weight"].mapped
    net = decoder.layers[0].self_attn
    (layers, _), held = net.prepared(torch.bfloat16), net.in_proj_qkvz.weight
    spans = range(held.data_ptr(), held.data_ptr() + held.nbytes)
    pieces = [row for row in layers.held._tensors if row is not None]
    assert sum(each.data_ptr() in spans for each in pieces) == 2 * 4


def needed(model_type: str, **changes: Any) -> dict[str, Any]:
    return {**TINY, **FAMILY[model_type], "model_type": model_type, **changes}


def test_the_published_sizes() -> None:
    """Those that the classes have by default: Qwen3-Next-80B-A3B's and Qwen3.5-35B-A3B's."""
    for kind, layers in (("qwen3_next", 48), ("qwen3_5_moe_text", 40)):
        config = model_config({"model_type": kind})
        assert config.num_layers == layers and config.norm == "zero-centred"
        delta, full = config.layers[0].mixer, config.layers[3].mixer
        assert isinstance(delta, GatedDelta) and delta.sizes == DeltaSizes(16, 32, 128, 128)
        assert isinstance(full, GQA) and full.gated == "queries" and full.rope is not None
        assert full.rope.size(full.head_dim) == 64
        caches = config.caches(torch.bfloat16)
        assert caches[0].bytes_per_state == 32 * 128 * 128 * 4 + 3 * 8192 * 2
        assert sum(spec.bytes_per_token for spec in caches) == layers // 4 * 2 * 2 * 256 * 2


def state_bytes(config: ModelConfig) -> int:
    return sum(spec.bytes_per_state for spec in config.caches(torch.bfloat16))


def test_states_of_published_sizes() -> None:
    """LFM2-8B-A1B's, Granite 4.0 H Tiny's, Nemotron 3 Nano's and Kimi Linear's: their convolutions'
    inputs of 16 bits, and their heads' states."""
    kinds = ["conv", "conv", FULL, "conv"] * 6
    lfm = {"model_type": "lfm2_moe", "num_hidden_layers": 24, "layer_types": kinds}
    assert state_bytes(model_config(lfm)) == 18 * 2 * 2048 * 2
    granite = {"model_type": "granitemoehybrid", "num_hidden_layers": 40, "hidden_size": 1536}
    granite |= {"mamba_n_heads": 48, "mamba_d_state": 128, "num_attention_heads": 12}
    granite["layer_types"] = (["mamba"] * 9 + ["attention"]) * 4
    inputs = 3 * (3072 + 2 * 128) * 2
    assert state_bytes(model_config(granite)) == 36 * (48 * 64 * 128 * 4 + inputs)
    nemotron = {"model_type": "nemotron_h", "hidden_size": 2688, "mamba_num_heads": 64}
    nemotron["hybrid_override_pattern"] = "ME" * 20 + "M*" * 3 + "E*" * 3
    config = model_config(nemotron)
    assert [config.num_layers, len(config.experts)] == [52, 23]
    assert state_bytes(config) == 23 * (64 * 64 * 128 * 4 + 3 * (4096 + 2 * 8 * 128) * 2)
    full = [4, 8, 12, 16, 20, 24, 27]
    lists = {"full_attn_layers": full, "kda_layers": [i for i in range(1, 28) if i not in full]}
    kimi = model_config({"model_type": "kimi_linear", "linear_attn_config": lists})
    assert state_bytes(kimi) == 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2)
    tokens = [spec.bytes_per_token for spec in kimi.caches(torch.bfloat16)]
    assert sum(tokens) == 7 * (512 + 64) * 2 and tokens[3] and not tokens[0]


def test_time_steps_are_not_bounded(tmp_path: Path) -> None:
    """transformers bounds Nemotron-H's from below in prompts and not in answers: here as in the
    latter, and as in llama.cpp."""
    model = saved_tiny(tmp_path, "nemotron_h", time_step_min=3.0, time_step_max=4.0)
    server = Server(load_decoder(tmp_path, torch.float32), block_size=4, num_blocks=8)
    server.step([(0, IDS)])
    with torch.inference_mode():
        bounded = model(torch.tensor([IDS]), use_cache=False).logits[0]
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    assert_same(server.all_logits(0), recurrent(model, IDS))
    assert (server.all_logits(0) - bounded).abs().max() > 1e-3, "nothing was bounded"


def test_layers_of_nemotron_are_named_by_a_word_or_a_list() -> None:
    listed = needed("nemotron_h")
    del listed["num_hidden_layers"]
    word = {**listed, "hybrid_override_pattern": "ME*E"}
    del word["layers_block_type"]
    older = {**listed, "layers_block_type": ["mamba", "moe", "attention", "moe"]}
    assert model_config(listed) == model_config(word) == model_config(older)


def test_a_configuration_of_transformers_4_says_the_same() -> None:
    """Positions beside, not in, an object; which layers recur by how many, or by an old name."""
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}
    new = needed("qwen3_next", layer_types=[LINEAR, FULL], rope_parameters=rope)
    old = needed("qwen3_next", rope_scaling=None, rope_theta=1e7, partial_rotary_factor=0.5)
    named = {**old, "layer_types": ["mamba", "attention"]}
    assert model_config(new) == model_config(old) == model_config(named)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_next", {"layer_types": [FULL, "sliding_attention"]}, "layer_types must name one of"),
        ("qwen3_next", {"layer_types": [FULL]}, "layer_types must name one of"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; gated delta nets"),
        ("qwen3_next", {"linear_num_value_heads": 5}, "5 value heads .* cannot share 2 key heads"),
        ("qwen3_5_text", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; it must be"),
        ("qwen3_5_text", {"linear_key_head_dim": 0}, "linear_key_head_dim is 0"),
        ("qwen3_5_text", {"head_dim": 12}, "12 times partial_rotary_factor = 0.25 is 3"),
        ("qwen3_5_moe_text", {"full_attention_interval": 0}, "full_attention_interval is 0"),
        ("qwen3_5_moe_text", {"num_experts": 0}, "num_experts is 0"),
        ("qwen3_5_moe", {"text_config": None}, "text_config is None; it must be an object"),
        ("qwen3_5_moe", {"text_config": {"model_type": "qwen3_5_text"}},
         r"text_config\.model_type is 'qwen3_5_text'; it must be 'qwen3_5_moe_text'"),
        ("qwen3_5", {"text_config": {**TINY, "hidden_size": "many"}},
         "config.json: text_config: hidden_size is 'many'"),
        ("lfm2", {"layer_types": ["conv", LINEAR]}, "layer_types must name one of conv, full_attention"),
        ("lfm2", {"conv_L_cache": 1}, "conv_L_cache is 1; a convolution"),
        ("lfm2_moe", {"layer_types": None}, "layer_types is missing"),
        ("granitemoehybrid", {"mamba_n_heads": 5}, "mamba_n_heads = 5 of mamba_d_head = 9 are not"),
        ("granitemoehybrid", {"mamba_n_groups": 3}, "4 heads of a Mamba layer are no 3 groups"),
        ("granitemoehybrid", {"time_step_limit": [0.01, 1.0]}, "bounds of time steps"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "rope and nope are supported"),
        ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M*X"}, "'M\\*X'; it must be made of"),
        ("nemotron_h", {"layers_block_type": ["conv"]}, "layers_block_type must name one of"),
        ("nemotron_h", {"num_hidden_layers": 3}, "num_hidden_layers is 3, but 4 layers are named"),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias is true; it is not supported beside experts"),
        ("nemotron_h", {"mlp_hidden_act": "softsign"}, "mlp_hidden_act is 'softsign'"),
        ("kimi_linear", {"layer_types": None, "linear_attn_config": {"full_attn_layers": [1], "kda_layers": [0, 2]}},
         "full_attn_layers and kda_layers must name each of 2 layers, from 1, once"),
        ("kimi_linear", {"linear_attn_config": "none"}, "linear_attn_config is 'none'; it must be an object"),
        ("kimi_linear", {"linear_conv_kernel_dim": 1}, "convolves 1 inputs; a convolution"),
        ("bailing_hybrid", {"kda_lower_bound": 0.5}, "0.5"),
        ("bailing_hybrid", {"layer_group_size": 0}, "layer_group_size is 0"),
    ],
)  # fmt: skip
def test_bad_configurations_are_a_line(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    raw = {"model_type": model_type, **changes}
    if model_type in FAMILY:
        raw = needed(model_type, **changes)
    with pytest.raises(ConfigError, match=message) as raised:
        read_config(raw)
    assert "\n" not in str(raised.value)


def test_experts_in_two_layouts_at_once_are_refused(tmp_path: Path) -> None:
    multimodal(tmp_path, "qwen3_5_moe", fused=False)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.1.mlp.experts.0.up_proj.weight"
    up = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"tensor '{name}' is missing$"):
        open_checkpoint(tmp_path)
    fused = name.replace("0.up_proj.weight", "gate_up_proj")
    save_file({**tensors, name: up, fused: up.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"tensor '{fused}' is left over"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("full_attention_interval", 0, "full_attention_interval is 0; it must be a positive"),
        ("attention.recurrent_layers", [True], "recurrent_layers must be true or false for each"),
        ("attention.recurrent_layers", [1, 0], "recurrent_layers must be true or false for each"),
        ("ssm.inner_size", 25, "ssm.inner_size is 25; it must be a multiple of 4 heads"),
        ("ssm.conv_kernel", 1, "linear_conv_kernel_dim is 1"),
        ("ssm.dt_b_c_rms", True, "ssm.dt_b_c_rms = True is not supported"),
    ],
)
def test_bad_keys_of_files_are_a_line(tmp_path: Path, key: str, value: Any, message: str) -> None:
    save_tiny(tmp_path, "qwen3_5_text")

    def change(writer: gguf.GGUFWriter) -> None:
        name = f"qwen35.{key}"
        for keys in writer.kv_data:
            keys.pop(name, None)
        kind = gguf.GGUFValueType.get_type(value)
        sub = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
        writer.add_key_value(name, value, kind, sub_type=sub)

    converter(tmp_path).save(tmp_path / "tiny.gguf", change)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(tmp_path / "tiny.gguf")


def test_files_without_a_list_of_layers_have_attention_in_every_fourth(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_5_text", num_hidden_layers=4, full_attention_interval=4)

    def change(writer: gguf.GGUFWriter) -> None:
        for keys in writer.kv_data:
            keys.pop("qwen35.attention.recurrent_layers", None)
            keys.pop("qwen35.full_attention_interval", None)

    converter(tmp_path).save(tmp_path / "tiny.gguf", change)
    mixers = open_checkpoint(tmp_path / "tiny.gguf").config.mixers
    assert [isinstance(mixer, GQA) for mixer in mixers] == [False, False, False, True]


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_a_multimodal_model_becomes_a_file(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 320, "linear_num_value_heads": 6}
    model = multimodal(tmp_path / "model", kind, fused=True, **sizes)
    write_tokenizer(tmp_path / "model")
    write_model(tmp_path / "model", tmp_path / "out.gguf", "f32")
    server = Server(load_decoder(tmp_path / "out.gguf", torch.float32), block_size=4, num_blocks=8)
    server.step([(0, IDS)])
    assert_same(server.all_logits(0), recurrent(model, IDS))


def test_what_predicts_further_tokens_is_left_out_of_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A block behind the model's own, which block_count counts."""
    model = saved_tiny(tmp_path, "qwen3_5_moe_text")

    def change(writer: gguf.GGUFWriter) -> None:
        for keys in writer.kv_data:
            keys.pop("qwen35moe.block_count", None)
            keys.pop("qwen35moe.attention.recurrent_layers", None)
        writer.add_block_count(3)
        writer.add_nextn_predict_layers(1)
        writer.add_array("qwen35moe.attention.recurrent_layers", [True, False, False])
        for name in ("nextn.eh_proj", "attn_q", "ffn_gate_inp"):
            writer.add_tensor(f"blk.2.{name}.weight", np.zeros((5, 24), dtype=np.float32))

    converter(tmp_path).save(tmp_path / "tiny.gguf", change)
    caplog.set_level(logging.INFO)
    server = Server(load_decoder(tmp_path / "tiny.gguf", torch.float32), 4, 8)
    assert "3 tensors are left out" in caplog.text and "blk.2.*" in caplog.text
    server.step([(0, IDS)])
    assert_same(server.all_logits(0), recurrent(model, IDS))


BLOCKS_OF_32 = {
    "vocab_size": 320,
    "hidden_size": 64,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def test_a_quantised_checkpoint_computes_what_a_file_of_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of single rows, in groups or not: the same bits. The file has norms with their 1 and
    decays as such, the checkpoint's own tensors do not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    save_tiny(model, "qwen3_next", **BLOCKS_OF_32)
    write_tokenizer(model)
    write_model(model, tmp_path / "out.gguf", "q8_0")
    made = Quantized.of(open_checkpoint(model), "q8_0")
    made.make()
    logits = []
    for checkpoint in (made.checkpoint, open_checkpoint(tmp_path / "out.gguf")):
        assert checkpoint.formats["q8_0"] > 60_000
        server = Server(load_decoder(checkpoint, torch.bfloat16), block_size=4, num_blocks=8)
        server.step([(0, IDS[:13])])
        server.step([(0, IDS[13:])])
        logits.append(server.all_logits(0))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "kind",
    chosen(
        ["fp8-block", "fp8-ue8m0", "pack-4-zeros", "gptq-ordered", "awq"],
        lambda name: name in ("fp8-block", "gptq-ordered"),
    ),
)
def test_rows_in_groups_are_taken_out_of_quantised_matrices(tmp_path: Path, kind: str) -> None:
    """Also where blocks of rows with one scale lie across groups."""
    save_tiny(tmp_path, "qwen3_next", **BLOCKS_OF_32)
    meant = write_quantised(tmp_path, KINDS[kind])
    decoder = load_decoder(tmp_path, torch.float32, ops=ReferenceOps())
    server = Server(decoder, block_size=4, num_blocks=8)
    server.step([(0, IDS)])
    theirs = load_theirs(plain_copy(tmp_path, meant))
    assert_same(server.all_logits(0), recurrent(theirs, IDS))
    in_kernels = Server(load_decoder(tmp_path, torch.float32), block_size=4, num_blocks=8)
    in_kernels.step([(0, IDS)])
    assert_close(in_kernels.all_logits(0), server.all_logits(0), 1e-3)
