"""The supported architectures: a function a model_type, holding what differs, and how its checkpoints name experts."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig, Score, Weight
from moebius.errors import ConfigError
from moebius.models.layout import FUSED, Layout
from moebius.models.reading import ConfigReader, decoder, sliding_windows, sparse_layers, upper_layers_slide


def _dense(reader: ConfigReader, width: int | None = None, **more: Any) -> FeedForwardConfig:
    return FeedForwardConfig(reader.integer("intermediate_size", width), activation=reader.activation(), **more)


def _experts(
    reader: ConfigReader, width: str, top_k: int, *, weight: Weight | None = None, score: Score = "softmax"
) -> FeedForwardConfig:
    """Experts as wide as the key `width` says; weight None is what norm_topk_prob says, top_k a default."""
    weight = weight or ("renorm" if reader.flag("norm_topk_prob", False) else "raw")
    chosen = reader.integer("num_experts_per_tok", top_k)
    router = RouterConfig(reader.num_experts(), chosen, score=score, weight=weight)
    return FeedForwardConfig(reader.integer(width), router, reader.activation())


def _biases(reader: ConfigReader) -> dict[str, bool]:
    return dict.fromkeys(("qkv_bias", "output_bias"), reader.flag("attention_bias", False))


def _llama(reader: ConfigReader) -> ModelConfig:
    """Llama 2 and 3: dense."""
    return decoder(reader, _dense(reader, bias=reader.flag("mlp_bias", False)), **_biases(reader))


def _mistral(reader: ConfigReader) -> ModelConfig:
    """Llama with a sliding window in all layers."""
    window = None if reader.is_null("sliding_window") else reader.integer("sliding_window", 4096)
    return decoder(reader, _dense(reader), windows=window)


def _mixtral(reader: ConfigReader) -> ModelConfig:
    """arXiv 2401.04088: softmax over the experts, the top k renormalised; w1, w3, w2 are gate, up, down."""
    window = None if reader.get("sliding_window") is None else reader.integer("sliding_window")
    experts = _experts(reader, "intermediate_size", 2, weight="renorm")
    return decoder(reader, experts, theta=1_000_000.0, eps=1e-5, windows=window)


def _qwen2(reader: ConfigReader) -> ModelConfig:
    """Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; windows, where used, in the upper layers."""
    return decoder(reader, _dense(reader), windows=sliding_windows(reader, upper_layers_slide(reader)), qkv_bias=True)


def _qwen3(reader: ConfigReader) -> ModelConfig:
    """Dense: Llama with a norm over each head of queries and keys; windows as in Qwen2."""
    reader.default("head_dim", 128)
    windows = sliding_windows(reader, upper_layers_slide(reader))
    return decoder(reader, _dense(reader), windows=windows, qk_norm="head", **_biases(reader))


def _qwen2_moe(reader: ConfigReader) -> ModelConfig:
    """Qwen1.5-MoE too: fine-grained experts, raw softmax weights, and a shared expert behind a sigmoid gate."""
    experts = _experts(reader, "moe_intermediate_size", 4)
    shared = replace(experts, shared_width=reader.integer("shared_expert_intermediate_size"), shared_gate=True)
    dense = _dense(reader)
    parts = [shared if sparse else dense for sparse in sparse_layers(reader)]
    # transformers alternates windows below max_window_layers here, unlike in the dense models.
    lower, slides = reader.integer("max_window_layers", 28, low=0), reader.flag("use_sliding_window", False)
    layers = range(reader.num_layers)
    types = ["sliding_attention" if slides and i % 2 == 0 and i < lower else "full_attention" for i in layers]
    return decoder(reader, parts, windows=sliding_windows(reader, types), qkv_bias=reader.flag("qkv_bias", True))


def _qwen3_moe(reader: ConfigReader) -> ModelConfig:
    """Qwen3's attention over fine-grained experts without a shared one. Our own models are of this type."""
    experts, dense = _experts(reader, "moe_intermediate_size", 8), _dense(reader, 6144)
    # All layers slide, or none: published configurations carry max_window_layers, transformers does not read it.
    reader.get("max_window_layers")
    kind = "sliding_attention" if reader.flag("use_sliding_window", False) else "full_attention"
    windows = sliding_windows(reader, [kind] * reader.num_layers)
    parts = [experts if sparse else dense for sparse in sparse_layers(reader)]
    return decoder(reader, parts, windows=windows, qk_norm="head", **_biases(reader))


def _olmoe(reader: ConfigReader) -> ModelConfig:
    """OLMoE (arXiv 2409.02060): norms over all of queries and keys, which may be clipped; raw softmax weights."""
    clip, experts = reader.optional_number("clip_qkv"), _experts(reader, "intermediate_size", 8)
    return decoder(reader, experts, eps=1e-5, qk_norm="full", clip_qkv=clip, **_biases(reader))


def _granitemoe(reader: ConfigReader) -> ModelConfig:
    """Granite 3 MoE: stacked experts, softmax over the chosen logits, multipliers on four places of the network."""
    return decoder(
        reader,
        _experts(reader, "intermediate_size", 2, score="logits", weight="softmax"),
        **_biases(reader),
        attention_scale=reader.number("attention_multiplier", 1.0),
        embedding_multiplier=reader.number("embedding_multiplier", 1.0),
        residual_multiplier=reader.number("residual_multiplier", 1.0),
        logits_divisor=reader.number("logits_scaling", 1.0),
    )


def _dots1(reader: ConfigReader) -> ModelConfig:
    """dots.llm1: sigmoid scores with a selection bias; dense first layers; shared experts without a gate."""
    plain = _experts(reader, "moe_intermediate_size", 1, score="sigmoid")
    assert plain.router is not None
    router = replace(
        plain.router,
        selection_bias=True,
        num_groups=reader.integer("n_group", 1),
        groups_kept=reader.integer("topk_group", 1),
        group_score="top2",
        group_fill=float("-inf"),
        renorm_eps=1e-20,
        scale=reader.number("routed_scaling_factor", 1.0),
    )
    experts = replace(plain, router=router, shared_width=plain.width * reader.integer("n_shared_experts"))
    first, dense, layers = reader.integer("first_k_dense_replace", 0, low=0), _dense(reader, 10944), reader.num_layers
    window = None if reader.is_null("sliding_window") else reader.integer("sliding_window", 4096)
    upper = reader.integer("max_window_layers", 62, low=0)
    default = ["sliding_attention" if window and i >= upper else "full_attention" for i in range(layers)]
    windows = [window if kind == "sliding_attention" else None for kind in reader.layer_types() or default]
    parts = [dense if i < first else experts for i in range(layers)]
    return decoder(reader, parts, windows=windows, qk_norm="head", **_biases(reader))


def _moebius(reader: ConfigReader) -> ModelConfig:
    """What this project trains and no published architecture expresses: each feed-forward as our own record."""
    try:
        parts = [
            FeedForwardConfig(**{**part, "router": part["router"] and RouterConfig(**part["router"])})
            for part in reader.get("feed_forward")
        ]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"config.json: feed_forward: {error}") from None
    norm, bias = reader.get("qk_norm", "none"), reader.flag("qkv_bias", False)
    return decoder(reader, parts, qk_norm=norm, qkv_bias=bias, unpublished=reader.get("unpublished", "its layers"))


_SPARSE = "block_sparse_moe."
_MIXTRAL = Layout(_SPARSE + "gate.weight", _SPARSE + "experts.{e}.{p}.weight", projections=("w1", "w3", "w2"))
_GRANITE = (
    Layout(_SPARSE + "router.layer.weight", None, _SPARSE + "input_linear.weight", _SPARSE + "output_linear.weight"),
    Layout(_SPARSE + "router.weight", None, _SPARSE + "experts.gate_up_proj", _SPARSE + "experts.down_proj"),
)
MODEL_TYPES: Mapping[str, tuple[Callable[[ConfigReader], ModelConfig], tuple[Layout, ...]]] = {
    "dots1": (_dots1, tuple(replace(layout, shared="mlp.shared_experts.{p}") for layout in (Layout(), FUSED))),
    "granitemoe": (_granitemoe, _GRANITE),
    "llama": (_llama, (Layout(),)),
    "mistral": (_mistral, (Layout(),)),
    "mixtral": (_mixtral, (_MIXTRAL, FUSED)),
    "moebius": (_moebius, (Layout(),)),
    "olmoe": (_olmoe, (Layout(), FUSED)),
    "qwen2": (_qwen2, (Layout(),)),
    "qwen2_moe": (_qwen2_moe, (Layout(), FUSED)),
    "qwen3": (_qwen3, (Layout(),)),
    "qwen3_moe": (_qwen3_moe, (Layout(), FUSED)),
}
"""By config.json's model_type: how it is read, and the layouts of its checkpoints, the published one first."""


def model_config(config_json: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes. Raises ConfigError naming the key that is wrong or unknown."""
    kind = config_json.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ConfigError(f"config.json: model_type {kind!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    reader = ConfigReader(config_json)
    config = MODEL_TYPES[kind][0](reader)
    reader.finish()
    return config


def checkpoint_layouts(model_type: str) -> tuple[Layout, ...]:
    """The ways in which checkpoints of this type name their feed-forward tensors, the published one first."""
    return MODEL_TYPES[model_type][1]
