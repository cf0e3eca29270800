"""Qwen3.5, dense: the language model of qwen3_5."""

from moebius.models import gguf_delta
from moebius.models.config import ModelConfig
from moebius.models.delta_parts import linear_attention, mixers
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, layouts
from moebius.models.layout import Layout, Names
from moebius.models.parts import decoder, feed_forward, layers
from moebius.models.reading import ConfigReader

UNUSED = ("mtp.*", "model.visual.*")
"""What predicts further tokens, and what sees images."""


def layouts_of(*names: Names) -> tuple[Layout, ...]:
    """Of language models saved alone, then of files with images; each with the names given."""
    ours = linear_attention("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    return tuple(
        Layout(
            {**ours, **more},
            layer=before + "layers.{i}.",
            embedding=before + "embed_tokens.weight",
            norm=before + "norm.weight",
        )
        for before in ("model.", "model.language_model.")
        for more in names
    )


def read(reader: ConfigReader) -> ModelConfig:
    each = layers(reader, mixers(reader), feed_forward(reader))
    return decoder(reader, each, norm="zero-centred")


GGUF = GgufArchitecture(
    "qwen35",
    (*USUAL_KEYS, *gguf_delta.KEYS),
    fixed={"hidden_act": "silu", "attention_bias": False},
    layouts=layouts(gguf_delta.NAMES),
    partial=True,
    read=gguf_delta.read,
    write=gguf_delta.write_sectioned,
    held=gguf_delta.held("apart", tiled=True),
    moved=gguf_delta.moved,
)
FAMILY = Family(read, layouts_of({}), UNUSED, gguf=(GGUF,))
