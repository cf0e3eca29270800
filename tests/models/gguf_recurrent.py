"""The same of models with short convolutions, Mamba 2 layers and Kimi delta attention, and which
converter is a model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from torch import Tensor

from models.gguf_families import SIGMOID, Config, granitemoe, latent
from models.gguf_hybrids import HYBRIDS, HybridConverter
from models.gguf_writing import (
    ARCHITECTURES,
    PERMUTED,
    SUFFIXES,
    UNKNOWN,
    Converter,
    TypeOf,
    plain,
)

FULL = "full_attention"


def usual(w: gguf.GGUFWriter, c: Config, kinds: list[str]) -> None:
    w.add_block_count(len(kinds))
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv([c["num_key_value_heads"] if kind == FULL else 0 for kind in kinds])
    w.add_vocab_size(c["vocab_size"])


def experts(w: gguf.GGUFWriter, c: Config, count: str) -> None:
    w.add_expert_count(c[count])
    w.add_expert_used_count(c["num_experts_per_tok"])


def lfm2(w: gguf.GGUFWriter, c: Config) -> None:
    usual(w, c, c["layer_types"])
    w.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    w.add_layer_norm_rms_eps(c["norm_eps"])
    w.add_shortconv_l_cache(c["conv_L_cache"])
    width = c["intermediate_size"]
    if c.get("block_auto_adjust_ff_dim"):
        multiple = c["block_multiple_of"]
        width = int(c["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = multiple * ((width + multiple - 1) // multiple)
    w.add_feed_forward_length(width)


def lfm2_moe(w: gguf.GGUFWriter, c: Config) -> None:
    lfm2(w, c)
    experts(w, c, "num_experts")
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    w.add_leading_dense_block_count(c["num_dense_layers"])
    w.add_expert_gating_func(SIGMOID)


def granitemoehybrid(w: gguf.GGUFWriter, c: Config) -> None:
    usual(w, c, c["layer_types"])
    experts(w, c, "num_local_experts")
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    w.add_rope_dimension_count(c["hidden_size"] // c["num_attention_heads"])
    granitemoe(w, c)
    w.add_ssm_conv_kernel(c["mamba_d_conv"])
    w.add_ssm_state_size(c["mamba_d_state"])
    w.add_ssm_group_count(c["mamba_n_groups"])
    w.add_ssm_inner_size(c["mamba_expand"] * c["hidden_size"])
    w.add_ssm_time_step_rank(c["mamba_n_heads"])
    w.add_rope_scaling_finetuned(c["position_embedding_type"] == "rope")


def nemotron_h(w: gguf.GGUFWriter, c: Config) -> None:
    kinds = c["layers_block_type"]
    sparse = "moe" in kinds
    usual(w, c, kinds)
    width = c["moe_intermediate_size" if sparse else "intermediate_size"]
    w.add_feed_forward_length([width if kind in ("moe", "mlp") else 0 for kind in kinds])
    if sparse:
        nemotron_experts(w, c)
    # It has no positions, and the converter writes of them what it does for Granite.
    w.add_rope_dimension_count(c["hidden_size"] // c["num_attention_heads"])
    w.add_rope_freq_base(10_000.0)
    w.add_rope_scaling_finetuned(False)
    w.add_layer_norm_rms_eps(c["layer_norm_epsilon"])
    w.add_layer_norm_eps(c["layer_norm_epsilon"])
    w.add_key_length(c["head_dim"])
    w.add_value_length(c["head_dim"])
    w.add_ssm_conv_kernel(c["conv_kernel"])
    w.add_ssm_state_size(c["ssm_state_size"])
    w.add_ssm_group_count(c["n_groups"])
    w.add_ssm_inner_size(c["mamba_num_heads"] * c["mamba_head_dim"])
    w.add_ssm_time_step_rank(c["mamba_num_heads"])


def nemotron_experts(w: gguf.GGUFWriter, c: Config) -> None:
    experts(w, c, "n_routed_experts")
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    w.add_expert_shared_feed_forward_length(c["moe_shared_expert_intermediate_size"])
    w.add_expert_shared_count(c["n_shared_experts"])
    w.add_expert_weights_norm(c["norm_topk_prob"])
    w.add_expert_weights_scale(c["routed_scaling_factor"])
    w.add_expert_group_count(c["n_group"])
    w.add_expert_group_used_count(c["topk_group"])
    if c["moe_latent_size"] is not None:
        w.add_moe_latent_size(c["moe_latent_size"])


KEYS: dict[str, Callable[[gguf.GGUFWriter, Config], None]] = {
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    "granitemoehybrid": granitemoehybrid,
    "nemotron_h": nemotron_h,
}
ARCHITECTURES.update(
    lfm2="LFM2",
    lfm2_moe="LFM2MOE",
    granitemoehybrid="GRANITE_HYBRID",
    nemotron_h="NEMOTRON_H_MOE",
)
PERMUTED.add("granitemoehybrid")


class RecurrentConverter(Converter):
    """One Hugging Face directory of such a model into one file."""

    def __init__(self, directory: Path, type_of: TypeOf = plain) -> None:
        super().__init__(directory, type_of)
        kinds = self.config.get("layers_block_type")
        if kinds and "moe" not in kinds:
            self.architecture = gguf.MODEL_ARCH.NEMOTRON_H
            self.names = gguf.get_tensor_name_map(self.architecture, self.layers)

    def keys(self, w: gguf.GGUFWriter) -> None:
        KEYS[self.model_type](w, self.config)

    def rope_freqs(self, writer: gguf.GGUFWriter) -> None:
        """None of these is scaled so."""

    @property
    def groups(self) -> int:
        found: int = self.config.get("mamba_n_groups") or self.config["n_groups"]
        return found

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        layer = name.partition(".layers.")[2].partition(".")[0]
        if name.endswith("shared_mlp.input_linear.weight"):
            end = "_shexp" if self.config["num_local_experts"] else ""
            halves = zip(("gate", "up"), tensor.chunk(2), strict=True)
            return [(half, f"blk.{layer}.ffn_{kind}{end}.weight") for kind, half in halves]
        if (
            name.endswith("shared_mlp.output_linear.weight")
            and not self.config["num_local_experts"]
        ):
            return [(tensor, f"blk.{layer}.ffn_down.weight")]
        if name.endswith("block_sparse_moe.input_linear.weight"):
            return super().parts(name, tensor)
        known = name.replace("e_score_correction_bias", "e_score_correction.bias")
        known = known.replace(".expert_bias", ".expert_bias.bias")
        if ".experts." in name:
            known = known.replace("backbone.layers", "model.layers").replace("mixer", "mlp")
            known = known if self.model_type == "nemotron_h" else name.removeprefix("model.")
        if self.model_type == "nemotron_h":
            known = known.replace("mixer.dt_bias", "mixer.dt.bias")
        known = known.replace("dt_bias", "dt_proj.bias")
        place = self.names.get_name(known, SUFFIXES)
        assert place is not None, name
        return [(self.written(name, tensor), place)]

    def written(self, name: str, tensor: Tensor) -> Tensor:
        match name.rpartition(".layers.")[2].partition(".")[2].partition(".")[2]:
            case "conv.weight" | "conv1d.weight":
                return tensor.squeeze(1)
            case "A_log":
                return -tensor.exp().reshape(-1, 1)
            case "D":
                return tensor.reshape(-1, 1)
            case "norm.weight":
                return tensor.reshape(self.groups, -1)
        return tensor

    def joined(self, name: str, again: list[Tensor]) -> Tensor:
        if "input_linear" in name:
            return super().joined(name, again)
        (numbers,) = again
        original = self.tensors.get(name)
        if name.endswith("A_log"):
            numbers = torch.log(-numbers)
        return numbers if original is None else numbers.reshape(original.shape)


def delta(w: gguf.GGUFWriter, c: Config) -> None:
    """Of Kimi delta attention beside latent attention."""
    kinds = c["layer_types"]
    usual(w, {**c, "num_key_value_heads": 1}, kinds)
    experts(w, c, "num_local_experts")
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    rope = c.get("rope_parameters") or {"rope_theta": 10_000.0}
    latent(w, {"q_lora_rank": None, **c, "rope_parameters": rope})
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_expert_gating_func(SIGMOID)


def kimi_linear(w: gguf.GGUFWriter, c: Config) -> None:
    delta(w, c)
    w.add_ssm_conv_kernel(c["linear_conv_kernel_dim"])
    w.add_kda_head_dim(c["linear_head_dim"])


def bailing_hybrid(w: gguf.GGUFWriter, c: Config) -> None:
    delta(w, c)
    w.add_ssm_conv_kernel(c["short_conv_kernel_size"])
    w.add_kda_head_dim(c["head_dim"])
    w.add_bool("bailingmoe3.kda.safe_gate", c["kda_safe_gate"])
    w.add_float32("bailingmoe3.kda.gate_lower_bound", c["kda_lower_bound"])
    shared = c["moe_intermediate_size"] * c["n_shared_experts"]
    w.add_expert_shared_feed_forward_length(shared)


DELTAS: dict[str, Callable[[gguf.GGUFWriter, Config], None]] = {
    "kimi_linear": kimi_linear,
    "bailing_hybrid": bailing_hybrid,
}
# gguf-py has no names for Ling 3's yet: its tensors are called as Kimi Linear's.
ARCHITECTURES.update(dict.fromkeys(DELTAS, "KIMI_LINEAR"))
UNKNOWN["bailing_hybrid"] = "bailingmoe3"
# As transformers writes them, and what it reads as well.
ALIASES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
_EXPERTS = {"w1": "gate", "w2": "down", "w3": "up"}


class DeltaConverter(Converter):
    """One Hugging Face directory of Kimi Linear or Ling 3 into one file."""

    def keys(self, w: gguf.GGUFWriter) -> None:
        usual = {ALIASES.get(key, key): value for key, value in self.config.items()}
        DELTAS[self.model_type](w, usual)

    def rope_freqs(self, writer: gguf.GGUFWriter) -> None:
        """None of these is scaled so."""

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        layer = name.partition(".layers.")[2].partition(".")[0]
        projection = name.partition(".experts.")[2]
        if projection:
            kind = _EXPERTS.get(projection.partition(".")[0], projection.partition("_proj")[0])
            if kind in _EXPERTS.values():
                return [(tensor, f"blk.{layer}.ffn_{kind}_exps.weight")]
        if name.endswith("kv_b_proj.weight") or projection:
            return super().parts(name, tensor)
        kinds = self.config["layer_types"]
        whole = bool(layer) and kinds[int(layer)] == FULL
        known = name.replace(".attention.", ".self_attn.").replace(
            "self_attn.dense", "self_attn.o_proj"
        )
        if self.model_type == "bailing_hybrid" and known.endswith(
            (".f_proj.weight", ".g_proj.weight")
        ):
            role = "attn_gate" if whole else f"ssm_{known[-len('f_proj.weight')]}_a"
            return [(tensor, f"blk.{layer}.{role}.weight")]
        known = known.replace("correction_bias", "correction.bias").replace(
            "dt_bias", "dt_proj.bias"
        )
        known = known.replace(".expert_bias", ".expert_bias.bias")
        if known.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")):
            known = known.replace("block_sparse_moe.", "mlp.").replace(
                "mlp.shared", "block_sparse_moe.shared"
            )
        place = self.names.get_name(known, SUFFIXES)
        assert place is not None, name
        return [(self.written(name, tensor), place)]

    def written(self, name: str, tensor: Tensor) -> Tensor:
        if name.endswith("_conv1d.weight"):
            return tensor.reshape(1, len(tensor), 1, -1)
        if name.endswith("A_log") and self.model_type == "kimi_linear":
            return -tensor.exp().reshape(1, 1, -1, 1)
        return tensor.exp().reshape(-1, 1) if name.endswith("A_log") else tensor

    def joined(self, name: str, again: list[Tensor]) -> Tensor:
        if len(again) > 1:
            return super().joined(name, again)
        (numbers,) = again
        original = self.tensors.get(name)
        if name.endswith("A_log"):
            numbers = torch.log(numbers.abs())
        return numbers if original is None else numbers.reshape(original.shape)


def converter(directory: Path, type_of: TypeOf = plain) -> Converter:
    """The one for a directory's model."""
    model_type = json.loads((directory / "config.json").read_text())["model_type"]
    if model_type in KEYS:
        return RecurrentConverter(directory, type_of)
    if model_type in DELTAS:
        return DeltaConverter(directory, type_of)
    kind = HybridConverter if model_type in HYBRIDS else Converter
    return kind(directory, type_of)
