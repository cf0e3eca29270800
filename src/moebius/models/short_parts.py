"""What LFM2's families, with experts and without, spell alike in config.json: as
moebius.models.parts, for them alone."""

from moebius.models.config import ModelConfig
from moebius.models.parts import CONV, FULL, attention, decoder, layer_types, layers
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.short_conv import ShortConv


def mixers(reader: ConfigReader, usual: list[str] | None = None) -> list[Mixer]:
    """Each layer's, as layer_types says, or `usual`."""
    types = layer_types(reader, (CONV, FULL)) or usual
    if types is None:
        raise reader.error("layer_types is missing; it must name each layer's kind")
    size = reader.integer("hidden_size")
    short = ShortConv(size, reader.integer("conv_L_cache"), reader.flag("conv_bias"))
    full = attention(reader, qk_norm="head")
    return [short if kind == CONV else full for kind in types]


def model(
    reader: ConfigReader, each: list[Mixer], parts: FeedForwardConfig | list[FeedForwardConfig]
) -> ModelConfig:
    tied = reader.flag("tie_word_embeddings")
    return decoder(
        reader,
        layers(reader, each, parts),
        norm_eps=reader.number("norm_eps"),
        # Its older name counts more.
        tie_word_embeddings=reader.flag("tie_embedding", tied),
    )


def width(reader: ConfigReader) -> int:
    """Of feed-forwards: what config.json says, or two thirds of it and so much that it fits."""
    said = reader.integer("block_ff_dim", reader.integer("intermediate_size"))
    multiplier = reader.optional_number("block_ffn_dim_multiplier")
    multiple = reader.integer("block_multiple_of")
    if not reader.flag("block_auto_adjust_ff_dim"):
        return said
    said = int(2 * said / 3)
    if multiplier is None:
        return said
    return -(-int(multiplier * said) // multiple) * multiple
