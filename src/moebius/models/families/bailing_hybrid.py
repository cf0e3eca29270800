"""Ling 3: Kimi delta attention with bounded decays, and every few layers latent attention whose
heads have gates; experts of DeepSeek-V3's kind in groups."""

from dataclasses import replace

from moebius.models import gguf_kimi, layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.latent_parts import latent_attention
from moebius.models.layout import FUSED, KEYS_OF_LATENTS, VALUES_OF_LATENTS, Layout, Names, OfHeads
from moebius.models.parts import (
    FULL,
    LINEAR,
    decoder,
    dense_or_sparse,
    grouped_experts,
    layer_types,
    layers,
    rope,
)
from moebius.models.reading import ConfigReader
from moebius.nn.mixers.kimi_delta import KimiDelta
from moebius.ops.config import ChannelDecay

# Of what predicts further tokens, which is left out, and what transformers writes of other keys.
_BESIDE = {"num_mtp_layers", "mtp_loss_scaling_factor"}
_BESIDE |= {"linear_num_heads", "linear_conv_kernel_dim"}


def read(reader: ConfigReader) -> ModelConfig:
    reader.computed |= _BESIDE
    period = reader.integer("layer_group_size")
    usual = [LINEAR if (i + 1) % period else FULL for i in range(reader.num_layers)]
    bound = reader.number("kda_lower_bound")
    safe = reader.flag("kda_safe_gate")
    delta = KimiDelta(
        reader.integer("num_attention_heads"),
        # What transformers writes as head_dim is another size.
        reader.integer("linear_head_dim", reader.integer("head_dim")),
        ChannelDecay(bound if safe else None, rounded=True),
        low_rank=False,
        taps=reader.integer("short_conv_kernel_size"),
    )
    turning = replace(rope(reader), interleaved=True)
    full = latent_attention(reader, rope=turning, gated=True)
    types = layer_types(reader, (FULL, LINEAR)) or usual
    mixers = [full if kind == FULL else delta for kind in types]
    first = reader.integer("first_k_dense_replace", low=0)
    parts = dense_or_sparse(reader, grouped_experts(reader, "num_local_experts"), first)
    return decoder(reader, layers(reader, mixers, parts))


AT = "attention."
KV = f"{AT}kv_b_proj.weight"
ROLES = (
    *(f"{x}_proj.weight" for x in "qkvfgb"),
    *(f"{x}_conv1d.weight" for x in "qkv"),
    *(f"{name}.weight" for name in ("o_norm", "kv_a_layernorm", "kv_a_proj_with_mqa")),
    "kv_a_proj_with_mqa.bias",
    "A_log",
    "dt_bias",
)
NAMES: Names = {
    **{f"self_attn.{role}": f"{AT}{role}" for role in ROLES},
    "self_attn.gate_proj.weight": f"{AT}g_proj.weight",
    "self_attn.o_proj.weight": f"{AT}dense.weight",
    "self_attn.o_proj.bias": f"{AT}dense.bias",
    KEYS_OF_LATENTS: OfHeads(KV, keys=True),
    VALUES_OF_LATENTS: OfHeads(KV),
    "mlp.router.selection_bias": "mlp.gate.expert_bias",
    **layout.shared("mlp.shared_experts.{p}"),
}
FAMILY = Family(
    read,
    tuple(
        Layout({**NAMES, **names}, embedding="model.word_embeddings.weight")
        for names in ({}, FUSED)
    ),
    gguf=(gguf_kimi.BAILING,),
)
