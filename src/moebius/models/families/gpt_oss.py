"""gpt-oss (arXiv 2508.10925): attention with sinks, every other layer in a window; experts with
biases and a clamped nonlinearity, in MXFP4 or in bfloat16."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, Key, expert_keys, layouts
from moebius.models.layout import Layout, transposed
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention,
    decoder,
    layer_types,
    layers,
    rope,
    rope_of,
    sliding_window,
)
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.rope import RopeConfig
from moebius.ops.config import ClampedSwiGLU, RouterConfig

# What a configuration without any means.
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}


def slides(layer: int) -> bool:
    """Whether a layer has the window, where the configuration does not say so."""
    return layer % 2 == 0


def windows(reader: ConfigReader) -> list[int | None]:
    usual = [SLIDING if slides(i) else FULL for i in range(reader.num_layers)]
    types = layer_types(reader) or usual
    window = sliding_window(reader)
    if window is None and SLIDING in types:
        raise reader.error(f"sliding_window is null, but there are layers of {SLIDING}")
    return [window if kind == SLIDING else None for kind in types]


def turned(reader: ConfigReader) -> RopeConfig:
    given = reader.get("rope_scaling") or reader.get("rope_parameters")
    return rope(reader) if given else rope_of(reader, "rope_parameters", YARN | {"truncate": False})


def read(reader: ConfigReader) -> ModelConfig:
    count = reader.integer("num_local_experts")
    chosen = reader.integer("num_experts_per_tok")
    router = RouterConfig(count, chosen, score="logits", weight="softmax", logit_bias=True)
    clamped = ClampedSwiGLU(reader.number("swiglu_alpha"), reader.number("swiglu_limit"))
    part = FeedForwardConfig(reader.integer("intermediate_size"), router, clamped, bias=True)
    mixer = attention(reader, biases=True, sinks=True, rope=turned(reader))
    return decoder(reader, layers(reader, mixer, part, windows(reader)), norm="float32")


NAMES = {
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
    **transposed("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}
GGUF = GgufArchitecture(
    "gpt-oss",
    (
        *USUAL_KEYS,
        *expert_keys("num_local_experts", "intermediate_size"),
        Key("sliding_window", "attention.sliding_window"),
    ),
    sparse=True,
    fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    present={"attention_bias": "blk.0.attn_q.bias"},
    layouts=layouts({"post_attention_layernorm.weight": "post_attention_norm.weight"}),
    slides=slides,
    truncates=False,
)
FAMILY = Family(read, (Layout(NAMES),), gguf=(GGUF,))
