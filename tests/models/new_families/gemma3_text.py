"""Gemma 3 as a family would be written: as Gemma 2, with a rotary embedding for each kind of
layer."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families import gemma2
from moebius.models.family import Family
from moebius.models.parts import FULL, SLIDING, attention, decoder, layer_types, layers, rope_of
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    scale = reader.number("query_pre_attn_scalar") ** -0.5
    given = reader.get("rope_parameters")
    full, sliding = (
        attention(
            reader,
            rope=rope_of(reader, f"rope_parameters.{kind}", given[kind]),
            scale=scale,
            qk_norm="head",
            biases=True,
        )
        for kind in (FULL, SLIDING)
    )
    sliding = replace(sliding, window=reader.integer("sliding_window"))
    types = layer_types(reader)
    assert types is not None
    mixers = [sliding if kind == SLIDING else full for kind in types]
    return decoder(
        reader,
        layers(reader, mixers, gemma2.feed_forward(reader), norms="sandwich"),
        embedding_multiplier=reader.integer("hidden_size") ** 0.5,
    )


FAMILY = Family(read, gemma2.FAMILY.layouts, unused=("model.vision_tower.*", "mtp.*"))
