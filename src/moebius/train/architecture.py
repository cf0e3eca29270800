"""Which model a recipe trains, and as which published type it is saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from moebius.config import Activation, FeedForwardConfig, ModelConfig, RouterConfig, require
from moebius.models import model_config
from moebius.train.fields import Count, Natural, Positive, Weight, Width, check

_EXPERTS: dict[str, tuple[Activation, bool]] = {
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "relu": ("relu", False),
}
_CLASSES = {
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_ATTENTION = {"olmoe": "full_norm", "qwen2_moe": "qkv_bias", "qwen2": "qkv_bias"}


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """A decoder with tied embeddings; what its routers do decides as which published type it is saved.

    num_experts      0 for a dense model, whose feed-forwards are dense_width wide
    score, weight    of RouterConfig: softmax or sigmoid; raw (Switch, OLMoE) or renorm (Mixtral, Qwen3, DeepSeek-V3)
    selection_bias   DeepSeek's balance without a loss (training.bias_rate); `scale` multiplies the weights
    shared_width     width of the expert that is always on, behind a sigmoid gate with shared_gate
    sparse_every     every n-th layer has experts, beginning with the n-th; the first dense_first ones have none
    dense_width      width of layers without experts; 0 for as many parameters as a token uses in the others
    expert           swiglu, geglu, or relu with two matrices
    attention        head_norm (Qwen3), full_norm (OLMoE) or qkv_bias (Qwen2); by default that of the published type
    init_std         matrices are normal of this width, cut off at 3, narrower into the residual stream; or, where
    init_scale       is given, of sqrt(init_scale / inputs), cut off at 2 (Switch section 2.4: 0.1 in place of 1)
    router_init      multiplies the routers' initial weights
    """

    hidden_size: Width
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    max_position_embeddings: Count
    num_experts: Natural
    experts_per_token: Count = 1
    expert_width: Width = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    weight: Literal["raw", "renorm"] = "renorm"
    selection_bias: bool = False
    scale: Positive = 1.0
    shared_width: Width = 0
    shared_gate: bool = False
    sparse_every: Count = 1
    dense_first: Natural = 0
    dense_width: Width = 0
    expert: Literal["swiglu", "geglu", "relu"] = "swiglu"
    attention: Literal["", "head_norm", "full_norm", "qkv_bias"] = ""
    rope_theta: Positive = 10_000.0
    init_std: Positive = 0.02
    init_scale: Weight = 0.0
    router_init: Positive = 1.0

    def __post_init__(self) -> None:
        check("model", self)
        for name in ("hidden_size", "expert_width" if self.num_experts else "dense_width"):
            require(getattr(self, name) > 0, f"model.{name} is 0; it must be positive")
        require(not self.num_experts or any(self.sparse), "model: no layer has experts; lower sparse_every")

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Which layers have experts."""
        step, first = self.sparse_every, self.dense_first if self.num_experts else self.num_layers
        return tuple(i >= first and (i + 1) % step == 0 for i in range(self.num_layers))

    @property
    def active_width(self) -> int:
        """The width of a dense layer with as many parameters as a token uses in one with experts, to a multiple of 8.

        Router and gate count: their parameters are used by every token.
        """
        matrices = 3 if _EXPERTS[self.expert][1] else 2
        beside = (self.num_experts + self.shared_gate) / matrices
        return 8 * round((self.experts_per_token * self.expert_width + self.shared_width + beside) / 8)

    def dense_twin(self) -> ModelRecipe:
        """The dense model that a token meets as many parameters of; layers that were dense stay as they are."""
        require(self.num_experts > 0, "the recipe's model is dense already")
        attention = self.attention or _ATTENTION.get(self.published()[0], "head_norm")
        dense = self.dense_width or self.active_width
        same = all(self.sparse) or dense == self.active_width
        require(same, "a dense twin needs model.dense_width left out, so that all layers are alike")
        return replace(self, num_experts=0, selection_bias=False, dense_width=self.active_width, attention=attention)  # type: ignore[arg-type]

    def published(self) -> tuple[str, str]:
        """The model_type that says all of this model, and ""; or `moebius`, and what no published one has."""
        sparse, shared = self.sparse, self.shared_width
        first = next((i for i, has in enumerate(sparse) if has), self.num_layers)
        lacks = ""
        if not _EXPERTS[self.expert][1]:
            lacks = "feed-forwards of two matrices"
        elif not self.num_experts:
            kind = {"full_norm": "", "qkv_bias": "qwen2"}.get(self.attention, "qwen3")
            lacks = "" if kind else "OLMoE's attention in a dense model"
        elif self.score == "sigmoid":
            kind = "dots1"
            if not shared or shared % self.expert_width or self.shared_gate:
                lacks = "sigmoid scores without ungated shared experts, each as wide as the others"
            elif not all(sparse[first:]):
                lacks = "sigmoid scores with a dense layer after one with experts"
        elif self.selection_bias:
            lacks = "softmax scores with a selection bias"
        elif self.scale != 1.0:
            lacks = "softmax weights with a scale"
        elif shared:
            kind, lacks = "qwen2_moe", "" if self.shared_gate else "softmax scores with an ungated shared expert"
        else:
            kind = "olmoe" if self.weight == "raw" and all(sparse) else "qwen3_moe"
        if not lacks and self.attention not in ("", _ATTENTION.get(kind, "head_norm")):
            lacks = f"{self.attention} attention in a {kind}"
        return ("moebius", lacks) if lacks else (kind, "")

    def config(self, vocab_size: int) -> ModelConfig:
        """The decoder, by way of its config.json."""
        return model_config(self.config_json(vocab_size))

    def config_json(self, vocab_size: int) -> dict[str, Any]:
        """The config.json, as transformers' class of the published type reads it."""
        kind, lacks = self.published()
        dense = self.dense_width or self.active_width
        common = {
            "model_type": kind,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "initializer_range": self.init_std,
        }
        if lacks:
            return common | {"unpublished": lacks} | self._own_json(dense)
        common["architectures"] = [_CLASSES[kind]]
        common["hidden_act"] = _EXPERTS[self.expert][0]
        if kind != "qwen2_moe" and kind != "qwen2":
            common["attention_bias"] = False
        return common | self._published_json(kind, dense)

    def _published_json(self, kind: str, dense: int) -> dict[str, Any]:
        window = (
            {} if kind == "olmoe" else {"sliding_window": None} if kind == "dots1" else {"use_sliding_window": False}
        )
        if not self.num_experts:
            return {"intermediate_size": dense, **window}
        routed = {"num_experts_per_tok": self.experts_per_token, "norm_topk_prob": self.weight == "renorm", **window}
        if kind == "olmoe":
            return routed | {"num_experts": self.num_experts, "intermediate_size": self.expert_width}
        routed |= {"moe_intermediate_size": self.expert_width, "intermediate_size": dense}
        if kind == "dots1":
            return routed | {
                "n_routed_experts": self.num_experts,
                "n_shared_experts": self.shared_width // self.expert_width,
                "first_k_dense_replace": self.sparse.index(True),
                "routed_scaling_factor": self.scale,
                "n_group": 1,
                "topk_group": 1,
            }
        every = {"decoder_sparse_step": self.sparse_every, "mlp_only_layers": list(range(self.dense_first))}
        shared = {"shared_expert_intermediate_size": self.shared_width} if kind == "qwen2_moe" else {}
        return routed | {"num_experts": self.num_experts} | every | shared

    def _own_json(self, dense: int) -> dict[str, Any]:
        activation, gated = _EXPERTS[self.expert]
        plain = FeedForwardConfig(dense, None, activation, gated=gated)
        experts = plain
        if self.num_experts:
            router = RouterConfig(
                self.num_experts,
                self.experts_per_token,
                self.score,
                self.weight,
                self.selection_bias,
                scale=self.scale,
            )
            shared, gate = self.shared_width, self.shared_gate
            experts = replace(plain, width=self.expert_width, router=router, shared_width=shared, shared_gate=gate)
        norms = {"full_norm": "full", "qkv_bias": "none"}
        return {
            "qk_norm": norms.get(self.attention, "head"),
            "qkv_bias": self.attention == "qkv_bias",
            "feed_forward": [asdict(experts if has else plain) for has in self.sparse],
        }


def check_trainable(config: ModelConfig) -> None:
    """ConfigError for a router that no gradient of the language model's loss reaches."""
    for part in config.feed_forward:
        r = part.router
        require(
            r is None or r.top_k > 1 or r.weight not in ("renorm", "softmax"),
            "a renormalised top-1 router's weight is always 1, so that the language model's loss gives its router no "
            "gradient; use weight = 'raw', or more experts a token",
        )
