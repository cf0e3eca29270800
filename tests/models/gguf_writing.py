"""Tiny models as GGUF files, by the rules of llama.cpp's converter and with gguf-py's names,
writer and quantisers.

What is quantised there is widened again by gguf-py and put back into the Hugging Face directory, so
that both hold the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.gguf_families import OWN_KEYS, full_heads

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen2_moe": "QWEN2MOE",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "olmoe": "OLMOE",
    "dots1": "DOTS1",
    "granite": "GRANITE",
    "granitemoe": "GRANITE_MOE",
    "gpt_oss": "GPT_OSS",
    "granitemoeshared": "GRANITE_MOE",
    "glm4_moe": "GLM4_MOE",
    "minimax_m2": "MINIMAXM2",
    "ernie4_5_moe": "ERNIE4_5_MOE",
    "exaone_moe": "EXAONE_MOE",
    "solar_open": "GLM4_MOE",
    "hunyuan_v1_moe": "HUNYUAN_MOE",
    "afmoe": "AFMOE",
    "phi3": "PHI3",
    "gemma3_text": "GEMMA3",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "glm4_moe_lite": "DEEPSEEK2",
    "mistral4": "MISTRAL4",
    "gemma4_text": "GEMMA4",
    "gemma4_unified_text": "GEMMA4",
    # Which gguf-py does not know yet: tensors are called as in these.
    "mellum": "QWEN3MOE",
    "laguna": "DOTS1",
    "hy_v3": "DOTS1",
    "cohere2_moe": "DOTS1",
}
CENTRED = {"gemma3_text"}
LAGUNA = {
    "self_attn.g_proj.weight": "attn_gate.weight",
    "mlp.experts.e_score_correction_bias": "exp_probs_b.bias",
}
GEMMA4 = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
UNKNOWN = {
    **{kind: kind for kind in ("mellum", "hy_v3", "laguna")},
    "cohere2_moe": "cohere2moe",
}
PERMUTED = {"llama", "mistral", "mixtral", "granite", "granitemoe", "granitemoeshared"}
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SUFFIXES = (".weight", ".bias")
# Types that gguf-py widens and does not make: where a block has its scales, and of what size.
RANDOM: dict[Type, tuple[tuple[int, ...], float]] = {
    Type.Q2_K: ((80, 82), 0.005),
    Type.Q3_K: ((108,), 0.002),
    Type.Q4_K: ((0, 2), 1e-4),
    Type.Q5_K: ((0, 2), 1e-4),
    Type.Q6_K: ((208,), 2e-5),
    Type.IQ4_NL: ((0,), 0.002),
    Type.IQ4_XS: ((0,), 1e-4),
}

TypeOf = Callable[[str], Type]


def plain(_: str) -> Type:
    return Type.F32


def stored(weight: Tensor, kind: Type, seed: int) -> NDArray[Any]:
    """A weight's bytes as the file has them; of RANDOM's types, random ones of about its size."""
    array = weight.float().contiguous().numpy()
    if kind not in RANDOM:
        return gguf.quants.quantize(array, kind)
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (array.size // elements, nbytes), dtype=np.uint8)
    places, size = RANDOM[kind]
    for place in places:
        scales = (size * random.standard_normal(len(blocks))).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*array.shape[:-1], -1)


def permuted(weight: Tensor, heads: int) -> Tensor:
    """A head's halves side by side in pairs."""
    rows = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return rows.transpose(1, 2).reshape(weight.shape)


def restored(weight: Tensor, heads: int) -> Tensor:
    rows = weight.reshape(heads, len(weight) // heads // 2, 2, -1)
    return rows.transpose(1, 2).reshape(weight.shape)


class Converter:
    """One Hugging Face directory into one file."""

    def __init__(self, directory: Path, type_of: TypeOf = plain) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.tensors = load_file(directory / "model.safetensors")
        self.directory = directory
        self.type_of = type_of
        self.model_type: str = self.config["model_type"]
        self.architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[self.model_type])
        self.layers = self.depth
        self.names = gguf.get_tensor_name_map(self.architecture, self.layers)
        self.seed = 0

    @property
    def depth(self) -> int:
        found: int | None = self.config.get("num_hidden_layers")
        return found or len(self.config["layers_block_type"])

    @property
    def rope(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config.get("rope_scaling") or self.config["rope_parameters"]
        return found.get("full_attention", found)

    @property
    def head_size(self) -> int:
        size: int = self.config["hidden_size"] // self.config["num_attention_heads"]
        return self.config.get("head_dim") or size

    def save(self, path: Path, change: Callable[[gguf.GGUFWriter], None] | None = None) -> None:
        """change: adds keys that the converter would not write."""
        arch = gguf.MODEL_ARCH_NAMES[self.architecture]
        arch = UNKNOWN.get(self.model_type, arch)
        writer = gguf.GGUFWriter(path, arch)
        self.keys(writer)
        if change:
            change(writer)
        for name, tensor in self.stacked().items():
            again = [self.add(writer, part, place) for part, place in self.parts(name, tensor)]
            self.put_back(name, self.joined(name, again))
        self.rope_freqs(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        save_file(self.tensors, self.directory / "model.safetensors", metadata={"format": "pt"})

    def keys(self, w: gguf.GGUFWriter) -> None:
        c = self.config
        w.add_block_count(c["num_hidden_layers"])
        w.add_context_length(c["max_position_embeddings"])
        w.add_embedding_length(c["hidden_size"])
        if "intermediate_size" in c:
            dense = c.get("prefix_dense_intermediate_size")
            w.add_feed_forward_length(dense or c["intermediate_size"])
        w.add_head_count(c["num_attention_heads"])
        latent = "kv_lora_rank" in c
        w.add_head_count_kv(1 if latent else c["num_key_value_heads"])
        if c["rms_norm_eps"] is not None:
            w.add_layer_norm_rms_eps(c["rms_norm_eps"])
        rope = self.rope
        w.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            w.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if "attention_factor" in rope:
                w.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
            if "beta_fast" in rope:
                w.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
                w.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if c.get("head_dim") and not latent:
            w.add_key_length(c["head_dim"])
            w.add_value_length(c["head_dim"])
        experts = [c.get(key) for key in COUNTS]
        if any(experts):
            w.add_expert_count(next(filter(None, experts)))
            w.add_expert_used_count(c.get("num_experts_per_tok", 1))
        self.own_keys(w)

    def own_keys(self, w: gguf.GGUFWriter) -> None:
        c = self.config
        if self.model_type in PERMUTED:
            w.add_vocab_size(c["vocab_size"])
            w.add_rope_dimension_count(self.head_size)
        if c.get("moe_intermediate_size"):
            w.add_expert_feed_forward_length(c["moe_intermediate_size"])
        if self.model_type == "qwen2_moe":
            w.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
        if self.model_type in OWN_KEYS:
            OWN_KEYS[self.model_type](w, c)
        if self.model_type == "gpt_oss":
            w.add_sliding_window(c["sliding_window"])
            w.add_expert_feed_forward_length(c["intermediate_size"])

    def stacked(self) -> dict[str, Tensor]:
        """The tensors, with those of all experts of a layer in one."""
        found: dict[str, Tensor] = {}
        experts: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            before, _, rest = name.partition(".experts.")
            expert, _, projection = rest.partition(".")
            if expert.isdecimal():
                experts.setdefault(f"{before}.experts.{projection}", []).append(name)
            else:
                found[name] = tensor
        for merged, names in experts.items():
            names.sort(key=lambda name: int(name.partition(".experts.")[2].partition(".")[0]))
            found[merged] = torch.stack([self.tensors[name] for name in names])
        return found

    def put_back(self, name: str, numbers: Tensor) -> None:
        if name in self.tensors:
            self.tensors[name] = numbers.contiguous()
            return
        for expert, each in enumerate(numbers):
            own = name.replace(".experts.", f".experts.{expert}.")
            assert own in self.tensors
            self.tensors[own] = each.contiguous()

    def parts(self, name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        """What becomes of a tensor, and gguf-py's name for it."""
        if name.endswith("block_sparse_moe.input_linear.weight"):
            layer = name.split(".")[2]
            parts = zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True)
            return [(part, f"blk.{layer}.ffn_{kind}_exps.weight") for kind, part in parts]
        if self.model_type == "gpt_oss" and ".experts." in name:
            return self.gpt_oss_experts(name, tensor)
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            before = f"blk.{name.split('.')[2]}.ffn_"
            kinds = ("gate", "up") if "gate_up" in name else ("down",)
            matrices = tensor.chunk(len(kinds), dim=1)
            named = zip(matrices, kinds, strict=True)
            return [(part, f"{before}{kind}_exps.weight") for part, kind in named]
        if name.endswith("kv_b_proj.weight"):
            before = f"blk.{name.split('.')[2]}.attn_"
            heads = tensor.view(self.config["num_attention_heads"], -1, tensor.shape[1])
            keys, values = heads.tensor_split((self.config["qk_nope_head_dim"],), dim=1)
            return [(keys.transpose(1, 2), f"{before}k_b.weight"), (values, f"{before}v_b.weight")]
        if name.endswith("shared_mlp.input_linear.weight"):
            layer = name.split(".")[2]
            halves = zip(("gate", "up"), tensor.chunk(2), strict=True)
            return [(half, f"blk.{layer}.ffn_{kind}_shexp.weight") for kind, half in halves]
        if self.model_type == "laguna" and name.endswith(tuple(LAGUNA)):
            _, _, layer, rest = name.split(".", 3)
            return [(tensor, f"blk.{layer}.{LAGUNA[rest]}")]
        if name.endswith(tuple(GEMMA4)):
            _, _, layer, rest = name.split(".", 3)
            return [(tensor, f"blk.{layer}.{GEMMA4[rest]}")]
        known = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if self.model_type.startswith("gemma4"):
            known = known.removesuffix(".weight") + ".weight"
        known += ".weight" if known.endswith("sinks") else ""
        if self.model_type == "afmoe":
            known = known.replace(".expert_bias", ".expert_bias.bias")
        if self.model_type == "mixtral" and ".experts." in name:
            known = name.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
        place = self.names.get_name(known, SUFFIXES)
        assert place is not None, name
        return [(tensor, place)]

    @staticmethod
    def gpt_oss_experts(name: str, tensor: Tensor) -> list[tuple[Tensor, str]]:
        """Rows out of columns, and what takes turns apart."""
        layer = name.split(".")[2]
        part = "bias" if name.endswith("_bias") else "weight"
        rows = tensor if part == "bias" else tensor.transpose(1, 2)
        if "down_proj" in name:
            return [(rows, f"blk.{layer}.ffn_down_exps.{part}")]
        return [
            (rows[:, first::2], f"blk.{layer}.ffn_{which}_exps.{part}")
            for first, which in enumerate(("gate", "up"))
        ]

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """The way back of `parts`."""
        if name.endswith("kv_b_proj.weight"):
            keys, values = parts
            return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
        if self.model_type == "gpt_oss" and ".experts." in name:
            rows = torch.stack(parts, dim=2).flatten(1, 2) if len(parts) > 1 else parts[0]
            return rows if name.endswith("_bias") else rows.transpose(1, 2)
        return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]

    def add(self, writer: gguf.GGUFWriter, tensor: Tensor, place: str) -> Tensor:
        """The numbers that the file then holds, in the tensor's own order."""
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        kind = place.split(".")[2] if place.startswith("blk.") else ""
        count = self.config[heads[kind]] if self.model_type in PERMUTED and kind in heads else None
        shift = self.model_type in CENTRED and place.endswith("_norm.weight")
        written = tensor if count is None else permuted(tensor, count)
        written = written + 1 if shift else written
        if "gate_inp_shexp" in place or "exp_probs_b" in place:
            written = written.squeeze(0)
        always = tensor.ndim == 1 or "_norm" in place or "ffn_gate_inp" in place
        always = always or place.endswith(".bias")
        type_ = Type.F32 if always else self.type_of(place)
        self.seed += 1
        content = stored(written, type_, self.seed)
        dense = type_ in (Type.F32, Type.F16)
        writer.add_tensor(place, content, raw_dtype=None if dense else type_)
        numbers = gguf.quants.dequantize(content, type_)
        again = torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(tensor.shape)
        if shift:
            again = again - 1
        return again if count is None else restored(again, count)

    def rope_freqs(self, writer: gguf.GGUFWriter) -> None:
        """Llama 3's frequencies, as divisors."""
        rope = self.rope
        if rope["rope_type"] == "proportional":
            size = full_heads(self.config)["head_dim"]
            turning = int(size * rope["partial_rotary_factor"] / 2)
            values = [1.0] * turning + [1e30] * (size // 2 - turning)
            writer.add_tensor("rope_freqs.weight", np.array(values, dtype=np.float32))
        if rope["rope_type"] == "longrope":
            for which in ("long", "short"):
                values = np.array(rope[f"{which}_factor"], dtype=np.float32)
                writer.add_tensor(f"rope_factors_{which}.weight", values)
        if rope["rope_type"] != "llama3":
            return
        size = int(self.head_size * rope.get("partial_rotary_factor", 1.0))
        context = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        divisors = []
        for i in range(size // 2):
            length = 2 * math.pi * rope["rope_theta"] ** (2 * i / size)
            smooth = (context / length - low) / (high - low)
            blend = 1 / ((1 - smooth) / rope["factor"] + smooth)
            slow = rope["factor"] if length > context / low else blend
            divisors.append(1.0 if length < context / high else slow)
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))


def tokenizer_keys(directory: Path) -> Callable[[gguf.GGUFWriter], None]:
    """The keys of a directory's byte-level tokenizer, whose words are cut as GPT-2's."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {**{i: token for token, i in tokenizer["model"]["vocab"].items()}, **special}
    merges = [
        each if isinstance(each, str) else " ".join(each) for each in tokenizer["model"]["merges"]
    ]
    ids = {token: i for i, token in special.items()}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([tokens[i] for i in range(len(tokens))])
        kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in tokens]
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
        writer.add_eos_token_id(ids[config["eos_token"]])
        writer.add_eot_token_id(ids["<|im_end|>"])
        writer.add_chat_template(config["chat_template"])

    return add
