"""Granite 4: Mamba 2 layers and attention, mostly without positions; the experts of Granite 3 with
a shared one, or that alone."""

from dataclasses import replace

from moebius.models import gguf_mamba, mamba_parts
from moebius.models.config import ModelConfig
from moebius.models.families import granitemoe, granitemoeshared
from moebius.models.family import Family
from moebius.models.layout import Layout, Names, joined
from moebius.models.parts import FULL, LINEAR, ROPES, activation, layer_types
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.mamba2 import Mamba2
from moebius.ops.config import ScanSizes

_POSITIONS = (None, "nope", "rope")


def mamba(reader: ConfigReader) -> Mamba2:
    heads = reader.integer("mamba_n_heads")
    inner = reader.integer("mamba_expand") * reader.integer("hidden_size")
    told = reader.get("mamba_d_head") != "auto"
    size = reader.integer("mamba_d_head") if told else inner // heads
    if heads * size != inner:
        raise reader.error(
            f"mamba_n_heads = {heads} of mamba_d_head = {size} are not mamba_expand * hidden_size "
            f"= {inner}"
        )
    mamba_parts.check_unbounded(reader, "time_step_limit")
    reader.computed.add("mamba_chunk_size")
    return Mamba2(
        ScanSizes(heads, size, reader.integer("mamba_d_state"), reader.integer("mamba_n_groups")),
        taps=reader.integer("mamba_d_conv"),
        conv_bias=reader.flag("mamba_conv_bias"),
        bias=reader.flag("mamba_proj_bias"),
    )


def full_attention(reader: ConfigReader) -> GQA:
    positions = reader.get("position_embedding_type")
    if positions not in _POSITIONS:
        raise reader.error(f"position_embedding_type is {positions!r}; rope and nope are supported")
    if positions == "rope":
        return granitemoe.scaled_attention(reader)
    reader.computed |= ROPES
    return granitemoe.scaled_attention(reader, rope=None)


def part(reader: ConfigReader) -> FeedForwardConfig:
    shared = reader.integer("shared_intermediate_size")
    if reader.integer("num_local_experts", low=0):
        return replace(granitemoe.sparse(reader), shared_width=shared)
    reader.computed.update(("num_experts_per_tok", "intermediate_size"))
    return FeedForwardConfig(shared, activation=activation(reader))


def read(reader: ConfigReader) -> ModelConfig:
    types = layer_types(reader, (FULL, LINEAR)) or [LINEAR] * reader.num_layers
    kinds: dict[str, Mixer] = {FULL: full_attention(reader), LINEAR: mamba(reader)}
    return granitemoe.model(reader, part(reader), [kinds[kind] for kind in types])


AT = "shared_mlp."
NAMES: Names = {
    **{f"self_attn.{role}": f"mamba.{role}" for role in mamba_parts.ROLES},
    **granitemoeshared.SHARED,
    **joined(f"{AT}input_linear.weight", "mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": f"{AT}output_linear.weight",
}
FAMILY = Family(
    read,
    tuple(Layout({**NAMES, **names}) for names in (granitemoe.PUBLISHED, granitemoe.CONVERTED)),
    gguf=(gguf_mamba.GRANITE,),
)
