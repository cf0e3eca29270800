"""Kimi Linear: Kimi delta attention, and every few layers latent attention without positions; the
experts of DeepSeek-V3."""

from dataclasses import replace

from moebius.models import gguf_kimi, layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.latent_parts import latent_attention
from moebius.models.layout import Layout, Names
from moebius.models.parts import (
    FULL,
    LINEAR,
    ROPES,
    decoder,
    dense_or_sparse,
    grouped_experts,
    layer_types,
    layers,
)
from moebius.models.reading import ConfigReader, Keys
from moebius.nn.mixers.kimi_delta import KimiDelta

_LISTS = ("full_attn_layers", "kda_layers")


def of_linear(reader: ConfigReader) -> ConfigReader:
    """The object that published files have the sizes of Kimi delta attention in."""
    given = reader.get("linear_attn_config") or {}
    if not isinstance(given, dict):
        raise reader.error(f"linear_attn_config is {given!r}; it must be an object")
    names = ("head_dim", "num_heads", "short_conv_kernel_size", *_LISTS)
    return ConfigReader(given, Keys(dict.fromkeys(names)), f"{reader.where}linear_attn_config: ")


def kinds(reader: ConfigReader, linear: ConfigReader) -> list[str]:
    """Each layer's, by layer_types, or by lists that count layers from 1; or every fourth is full,
    but for the first."""
    count = reader.num_layers
    given = layer_types(reader, (FULL, LINEAR))
    lists = [set(linear.indices(name)) for name in _LISTS]
    if given is not None:
        return list(given)
    if not any(lists):
        return [FULL if i and i % 4 == 0 else LINEAR for i in range(count)]
    full, delta = lists
    if full & delta or full | delta != set(range(1, count + 1)):
        raise linear.error(f"{' and '.join(_LISTS)} must name each of {count} layers, from 1, once")
    return [FULL if i in full else LINEAR for i in range(1, count + 1)]


def read(reader: ConfigReader) -> ModelConfig:
    linear = of_linear(reader)
    delta = KimiDelta(
        linear.integer("num_heads", reader.integer("linear_num_heads")),
        linear.integer("head_dim", reader.integer("linear_head_dim")),
        taps=linear.integer("short_conv_kernel_size", reader.integer("linear_conv_kernel_dim")),
    )
    reader.computed |= ROPES
    full = replace(latent_attention(reader), rope=None, scale=None)
    mixers = [full if kind == FULL else delta for kind in kinds(reader, linear)]
    linear.finish()
    first = reader.integer("first_k_dense_replace", 1, low=0)
    parts = dense_or_sparse(reader, grouped_experts(reader, "num_local_experts"), first)
    return decoder(reader, layers(reader, mixers, parts))


AT = "block_sparse_moe."
NAMES: Names = {
    "mlp.router.weight": f"{AT}gate.weight",
    "mlp.router.selection_bias": f"{AT}gate.e_score_correction_bias",
    **layout.experts(f"{AT}experts.{{e}}.{{p}}", projections=("w1", "w3", "w2")),
    **layout.shared(f"{AT}shared_experts.{{p}}"),
}
# transformers gives a dense layer's tensors the names of experts.
SAVED = layout.dense(AT + "{p}")
FAMILY = Family(read, (Layout(NAMES), Layout({**NAMES, **SAVED})), gguf=(gguf_kimi.KIMI,))
