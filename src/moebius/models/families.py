"""The supported architectures: a function a model_type, holding what differs, and how its
checkpoints name experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig, Score, Weight
from moebius.errors import ConfigError
from moebius.models.layout import FUSED, Layout
from moebius.models.reading import (
    ConfigReader,
    Keys,
    decoder,
    slides,
    sliding_windows,
    sparse_layers,
    upper_layers_slide,
)


def _dense(reader: ConfigReader, **more: Any) -> FeedForwardConfig:
    return FeedForwardConfig(
        reader.integer("intermediate_size"), activation=reader.activation(), **more
    )


def _experts(
    reader: ConfigReader,
    count: str,
    width: str,
    *,
    weight: Weight | None = None,
    score: Score = "softmax",
) -> FeedForwardConfig:
    """As many experts, and as wide, as the keys `count` and `width` say; weight None is what
    norm_topk_prob says."""
    weight = weight or ("renorm" if reader.flag("norm_topk_prob") else "raw")
    router = RouterConfig(
        reader.integer(count), reader.integer("num_experts_per_tok"), score=score, weight=weight
    )
    return FeedForwardConfig(reader.integer(width), router, reader.activation())


def _biases(reader: ConfigReader) -> dict[str, bool]:
    return dict.fromkeys(("qkv_bias", "output_bias"), reader.flag("attention_bias"))


def _window(reader: ConfigReader) -> int | None:
    """The sliding window of all layers, where it is not null."""
    return None if reader.get("sliding_window") is None else reader.integer("sliding_window")


def _llama(reader: ConfigReader) -> ModelConfig:
    """Llama 1, 2 and 3: dense."""
    return decoder(reader, _dense(reader, bias=reader.flag("mlp_bias")), **_biases(reader))


def _mistral(reader: ConfigReader) -> ModelConfig:
    """Llama with a sliding window in all layers."""
    return decoder(reader, _dense(reader), windows=_window(reader))


def _mixtral(reader: ConfigReader) -> ModelConfig:
    """arXiv 2401.04088: softmax over the experts, the top k renormalised; w1, w3, w2 are gate, up,
    down."""
    experts = _experts(reader, "num_local_experts", "intermediate_size", weight="renorm")
    return decoder(reader, experts, windows=_window(reader))


def _qwen2(reader: ConfigReader) -> ModelConfig:
    """Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; windows, where used, in the
    upper layers."""
    return decoder(
        reader,
        _dense(reader),
        windows=sliding_windows(reader, upper_layers_slide(reader)),
        qkv_bias=True,
    )


def _qwen3(reader: ConfigReader) -> ModelConfig:
    """Dense: Llama with a norm over each head of queries and keys; windows as in Qwen2."""
    windows = sliding_windows(reader, upper_layers_slide(reader))
    return decoder(reader, _dense(reader), windows=windows, qk_norm="head", **_biases(reader))


def _qwen2_moe(reader: ConfigReader) -> ModelConfig:
    """Qwen1.5-MoE too: fine-grained experts, raw softmax weights, and a shared expert behind a
    sigmoid gate."""
    experts = _experts(reader, "num_experts", "moe_intermediate_size")
    shared = replace(
        experts, shared_width=reader.integer("shared_expert_intermediate_size"), shared_gate=True
    )
    dense = _dense(reader)
    parts = [shared if sparse else dense for sparse in sparse_layers(reader)]
    # transformers alternates windows below max_window_layers here, unlike in the dense models.
    lower, used, layers = (
        reader.integer("max_window_layers", low=0),
        slides(reader),
        range(reader.num_layers),
    )
    types = [
        "sliding_attention" if used and i % 2 == 0 and i < lower else "full_attention"
        for i in layers
    ]
    return decoder(
        reader, parts, windows=sliding_windows(reader, types), qkv_bias=reader.flag("qkv_bias")
    )


def _qwen3_moe(reader: ConfigReader) -> ModelConfig:
    """Qwen3's attention over fine-grained experts without a shared one. Our own models are of this
    type."""
    experts, dense = _experts(reader, "num_experts", "moe_intermediate_size"), _dense(reader)
    # All layers slide, or none: published configurations carry max_window_layers, transformers does
    # not read it.
    windows = reader.integer("sliding_window") if slides(reader) else None
    parts = [experts if sparse else dense for sparse in sparse_layers(reader)]
    return decoder(reader, parts, windows=windows, qk_norm="head", **_biases(reader))


def _olmoe(reader: ConfigReader) -> ModelConfig:
    """OLMoE (arXiv 2409.02060): norms over all of queries and keys, which may be clipped; raw
    softmax weights."""
    clip, experts = (
        reader.optional_number("clip_qkv"),
        _experts(reader, "num_experts", "intermediate_size"),
    )
    return decoder(reader, experts, qk_norm="full", clip_qkv=clip, **_biases(reader))


def _granitemoe(reader: ConfigReader) -> ModelConfig:
    """Granite 3 MoE: stacked experts, softmax over the chosen logits, multipliers on four places of
    the network."""
    return decoder(
        reader,
        _experts(
            reader, "num_local_experts", "intermediate_size", score="logits", weight="softmax"
        ),
        **_biases(reader),
        attention_scale=reader.number("attention_multiplier"),
        embedding_multiplier=reader.number("embedding_multiplier"),
        residual_multiplier=reader.number("residual_multiplier"),
        logits_divisor=reader.number("logits_scaling"),
    )


def _dots1(reader: ConfigReader) -> ModelConfig:
    """dots.llm1: sigmoid scores with a selection bias; dense first layers; shared experts without a
    gate."""
    plain = _experts(reader, "n_routed_experts", "moe_intermediate_size", score="sigmoid")
    assert plain.router is not None
    router = replace(
        plain.router,
        selection_bias=True,
        num_groups=reader.integer("n_group"),
        groups_kept=reader.integer("topk_group"),
        group_score="top2",
        group_fill="never",
        renorm_eps=1e-20,
        scale=reader.number("routed_scaling_factor"),
    )
    experts = replace(
        plain, router=router, shared_width=plain.width * reader.integer("n_shared_experts")
    )
    first, dense, layers = (
        reader.integer("first_k_dense_replace", low=0),
        _dense(reader),
        reader.num_layers,
    )
    window, upper = _window(reader), reader.integer("max_window_layers", layers, low=0)
    default = [
        "sliding_attention" if window and i >= upper else "full_attention" for i in range(layers)
    ]
    windows = [
        window if kind == "sliding_attention" else None for kind in reader.layer_types() or default
    ]
    parts = [dense if i < first else experts for i in range(layers)]
    return decoder(reader, parts, windows=windows, qk_norm="head", **_biases(reader))


def _moebius(reader: ConfigReader) -> ModelConfig:
    """What this project trains and no published architecture expresses: each feed-forward as our
    own record."""
    try:
        parts = [
            FeedForwardConfig(
                **{**part, "router": part["router"] and RouterConfig(**part["router"])}
            )
            for part in reader.get("feed_forward")
        ]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"config.json: feed_forward: {error}") from None
    norm, bias = reader.get("qk_norm"), reader.flag("qkv_bias")
    return decoder(
        reader, parts, qk_norm=norm, qkv_bias=bias, unpublished=reader.get("unpublished")
    )


_OWN_KEYS = Keys(
    {"qk_norm": "none", "unpublished": "its layers", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    closed=True,
)
_SPARSE = "block_sparse_moe."
_MIXTRAL = Layout(
    _SPARSE + "gate.weight", _SPARSE + "experts.{e}.{p}.weight", projections=("w1", "w3", "w2")
)
_GRANITE = (
    Layout(
        _SPARSE + "router.layer.weight",
        None,
        _SPARSE + "input_linear.weight",
        _SPARSE + "output_linear.weight",
    ),
    Layout(
        _SPARSE + "router.weight",
        None,
        _SPARSE + "experts.gate_up_proj",
        _SPARSE + "experts.down_proj",
    ),
)
MODEL_TYPES: Mapping[str, tuple[Callable[[ConfigReader], ModelConfig], tuple[Layout, ...]]] = {
    "dots1": (
        _dots1,
        tuple(replace(layout, shared="mlp.shared_experts.{p}") for layout in (Layout(), FUSED)),
    ),
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
"""By config.json's model_type: how it is read, and the layouts of its checkpoints, the published
one first."""


class ConfigReading(NamedTuple):
    """What a config.json says.

    ignored   keys that no model of this type reads, so that they change nothing
    assumed   keys that count and are absent, so that they have the default of transformers' class
    """

    config: ModelConfig
    ignored: Sequence[str]
    assumed: Sequence[str]


def read_config(config_json: Mapping[str, Any]) -> ConfigReading:
    """Raises ConfigError naming the key that is wrong, or that counts and has a value which is not
    supported."""
    kind = config_json.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type {kind!r} is not supported; supported are "
            f"{', '.join(MODEL_TYPES)}"
        )
    reader = ConfigReader(
        config_json, _OWN_KEYS if kind == "moebius" else Keys.of_transformers(kind)
    )
    config = MODEL_TYPES[kind][0](reader)
    reader.finish()
    return ConfigReading(config, reader.ignored, sorted(reader.computed - reader.raw.keys()))


def model_config(config_json: Mapping[str, Any]) -> ModelConfig:
    """The architecture alone. Raises ConfigError as read_config."""
    return read_config(config_json).config


def checkpoint_layouts(model_type: str) -> tuple[Layout, ...]:
    """The ways in which checkpoints of this type name their feed-forward tensors, the published one
    first."""
    return MODEL_TYPES[model_type][1]
