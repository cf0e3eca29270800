"""Cohere's North: attention and experts read one normed stream, whose norm is a layer norm; layers
with a window turn, others only where they stand before the experts."""

from collections.abc import Sequence
from dataclasses import replace

from moebius.models import layout
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_cohere import GGUF
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    DENSE,
    SLIDING,
    SPARSE,
    attention,
    decoder,
    every_nth_full,
    experts,
    feed_forward,
    layer_types,
    rope,
)
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA


def sparse(reader: ConfigReader) -> FeedForwardConfig:
    chosen = reader.word("expert_selection_fn", ("softmax", "sigmoid"))
    width = reader.integer("intermediate_size") * reader.integer("num_shared_experts", low=0)
    if chosen == "softmax":
        reader.computed.add("norm_topk_prob")  # those of the chosen sum to 1
        plain = experts(
            reader, "num_experts", "intermediate_size", score="logits", weight="softmax"
        )
    else:
        plain = experts(reader, "num_experts", "intermediate_size", score="sigmoid")
    return replace(plain, shared_width=width)


def attentions(reader: ConfigReader, kinds: Sequence[str]) -> list[GQA]:
    first = kinds.index(SPARSE) if SPARSE in kinds else len(kinds)
    before = reader.integer("prefix_dense_sliding_window_pattern")
    period = reader.integer("sliding_window_pattern")
    usual = every_nth_full(first, before) + every_nth_full(len(kinds) - first, period)
    still = attention(reader, rope=None, biases=True)
    turning = replace(still, rope=replace(rope(reader), interleaved=True))
    slides = replace(turning, window=reader.integer("sliding_window"))
    return [
        slides if kind == SLIDING else turning if part == DENSE and before == 1 else still
        for kind, part in zip(layer_types(reader) or usual, kinds, strict=True)
    ]


def read(reader: ConfigReader) -> ModelConfig:
    given = layer_types(reader, (DENSE, SPARSE), "mlp_layer_types")
    first = reader.integer("first_k_dense_replace", 0, low=0)
    kinds = given or [DENSE if i < first else SPARSE for i in range(reader.num_layers)]
    routed = sparse(reader)
    width = reader.integer("prefix_dense_intermediate_size", reader.integer("intermediate_size"))
    parts = {SPARSE: routed, DENSE: replace(feed_forward(reader), width=width)}
    how = reader.word("shared_expert_combination_strategy", ("average", "sum"))
    halves = 0.5 if routed.shared_width and how == "average" else 1.0
    specs = [
        LayerSpec(mixer, parts[kind], "parallel", halves if kind == SPARSE else 1.0)
        for mixer, kind in zip(attentions(reader, kinds), kinds, strict=True)
    ]
    scale = reader.number("logit_scale")
    if not scale > 0:
        raise reader.error(f"logit_scale is {scale}; logits are multiplied by it")
    eps = reader.number("layer_norm_eps")
    rms = reader.optional_number("rms_norm_eps")
    norm = {"norm": "less-mean", "norm_eps": eps} if rms is None else {"norm_eps": rms}
    return decoder(reader, specs, logits_divisor=1 / scale, **norm)


SHARED = layout.shared("mlp.shared_experts.{p}")
FAMILY = Family(read, (Layout(SHARED), Layout({**SHARED, **FUSED})), gguf=(GGUF,))
