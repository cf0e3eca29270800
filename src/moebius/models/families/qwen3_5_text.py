"""Qwen3.5, dense: the language model of qwen3_5, whose files name it so, or without what is of
images."""

from collections.abc import Sequence

from moebius.models.config import ModelConfig
from moebius.models.families.qwen3_next import linear_attention, mixers
from moebius.models.family import Family
from moebius.models.layout import Layout, Names
from moebius.models.parts import decoder, feed_forward, layers
from moebius.models.reading import ConfigReader

PROJECTIONS = tuple(f"in_proj_{name}.weight" for name in ("qkv", "z", "b", "a"))
UNUSED = ("mtp.*", "model.visual.*")
"""What predicts further tokens, and what sees images."""


def layouts(*names: Names) -> Sequence[Layout]:
    """Of files with images, then of language models saved alone; each with the names given."""
    ours = linear_attention(*PROJECTIONS)
    found = []
    for before in ("model.language_model.", "model."):
        for more in names:
            layout = Layout(
                {**ours, **more},
                layer=before + "layers.{i}.",
                embedding=before + "embed_tokens.weight",
                norm=before + "norm.weight",
            )
            found.append(layout)
    return found


def read(reader: ConfigReader) -> ModelConfig:
    each = layers(reader, mixers(reader), feed_forward(reader))
    return decoder(reader, each, norm="zero-centred")


FAMILY = Family(read, tuple(layouts({})), UNUSED)
