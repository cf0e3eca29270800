"""Granite 3 MoE with a shared expert, whose gate and up stand in one matrix."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families import granitemoe
from moebius.models.family import Family
from moebius.models.gguf_architecture import Key
from moebius.models.layout import Layout, Names, joined
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    width = reader.integer("shared_intermediate_size", low=0)
    return granitemoe.model(reader, replace(granitemoe.sparse(reader), shared_width=width))


AT = "mlp.shared."
SHARED: Names = {
    **joined("shared_mlp.input_linear.weight", f"{AT}gate_proj", f"{AT}up_proj"),
    f"{AT}down_proj": "shared_mlp.output_linear.weight",
}
GGUF = replace(
    granitemoe.GGUF,
    keys=(
        *granitemoe.GGUF.keys,
        Key("shared_intermediate_size", "expert_shared_feed_forward_length"),
    ),
    marked="expert_shared_feed_forward_length",
)
FAMILY = Family(
    read,
    (Layout({**granitemoe.PUBLISHED, **SHARED}), Layout({**granitemoe.CONVERTED, **SHARED})),
    gguf=(GGUF,),
)
