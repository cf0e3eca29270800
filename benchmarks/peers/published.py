"""Published models of which only the sizes are used: their configurations, and what these cost.

Configurations are the published ones' as far as sizes and kinds of layers go; what no size depends
on is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # drivers of other engines run where there is no Moebius
    from moebius.models.config import ModelConfig
    from moebius.models.layout import Source
    from moebius.ops.cache_spec import CacheSpec

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
QWEN3_5_35B = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 248_320,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201_088,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "attention_bias": True,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}


GLM_4_7_FLASH = {
    "model_type": "glm4_moe_lite",
    "hidden_size": 2048,
    "intermediate_size": 10_240,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1536,
    "mlp_layer_types": ["dense", *["sparse"] * 46],
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "vocab_size": 154_880,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}


class Published:
    """A configuration, and what `roofline.py` counts of it (see `sizes.Sizes`)."""

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        self.config_json = config_json
        self.layers: int = config_json["num_hidden_layers"]
        self.vocab: int = config_json["vocab_size"]

    @cached_property
    def model(self) -> ModelConfig:
        from moebius.models.family import model_config

        return model_config(self.config_json)

    @cached_property
    def tensors(self) -> list[Source]:
        """All parameters, as a GGUF file has them."""
        from moebius.models.gguf_keys import gguf_keys
        from moebius.models.layout import sources

        architecture = gguf_keys(self.config_json).architecture
        return list(sources(architecture.held_config(self.model), architecture.layouts[0]))

    @cached_property
    def experts(self) -> int:
        return max(self.model.experts.values())

    @cached_property
    def top_k(self) -> int:
        return max(part.router.top_k for part in self.model.feed_forward if part.router is not None)

    @cached_property
    def attention(self) -> float:
        return self._numbers(lambda each: each.expert is None and ".router." not in each.parameter)

    @cached_property
    def router(self) -> float:
        return self._numbers(lambda each: ".router." in each.parameter)

    @cached_property
    def expert(self) -> float:
        return self._numbers(lambda each: each.expert is not None) / self.experts

    @property
    def head(self) -> int:
        return self.model.hidden_size * self.vocab

    @property
    def parameters(self) -> float:
        layer = self.attention + self.router + self.experts * self.expert
        return self.layers * layer + 2 * self.head

    def cached(self, context: float) -> float:
        return sum(_seen(spec, context) * spec.bytes_per_token / 2 for spec in self._caches)

    @cached_property
    def state(self) -> int:
        return sum(spec.bytes_per_state for spec in self._caches)

    def scores(self, context: float) -> float:
        from moebius.ops.cache_spec import key_value_planes

        total = 0.0
        for mixer, spec in zip(self.model.mixers, self._caches, strict=True):
            if spec.token:
                keys, values = key_value_planes(spec)
                each = 2 * (keys.shape[1] + values.shape[1])
                total += _seen(spec, context) * mixer.scores * each
        return total

    @cached_property
    def _caches(self) -> list[CacheSpec]:
        import torch

        return [mixer.cache(torch.bfloat16) for mixer in self.model.mixers]

    def _numbers(self, wanted: Callable[[Source], bool]) -> float:
        """Parameters of a layer that are wanted: a mean over the layers."""
        inside = (each for each in self.tensors if each.parameter.startswith("layers."))
        return sum(prod(each.shape) for each in inside if wanted(each)) / self.layers


def _seen(spec: CacheSpec, context: float) -> float:
    """How many of so many tokens a row of a layer sees."""
    return context if spec.window is None else min(context, spec.window)


PUBLISHED: Mapping[str, Published] = {
    "qwen3-30b": Published(QWEN3_30B),  # arXiv 2505.09388
    "qwen3.5-35b": Published(QWEN3_5_35B),
    # As many of its layers as fit into 24 GB of memory.
    "qwen3.5-35b-28": Published({**QWEN3_5_35B, "num_hidden_layers": 28}),
    "glm-4.7-flash": Published(GLM_4_7_FLASH),
    "gpt-oss-20b": Published(GPT_OSS_20B),  # arXiv 2508.10925
}
