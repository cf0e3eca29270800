"""What T5 and Switch Transformers share: blocks of an encoder and a decoder, and their names.

A block of the decoder is two layers here: attention to its own rows, and attention to what the
encoder gave with the feed-forward part behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.layout import Layout, Stored, dense, experts
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixers.relative import Buckets, CrossAttention, Heads, RelativeAttention

CONTEXT = 4096
"""Tokens of prompt and answer that are planned for: distances have no end, but memory has."""

Stack = Literal["encoder", "decoder"]
Part = Callable[[Stack, int], FeedForwardConfig]
"""The feed-forward part of a stack's block."""

# What only training reads.
TRAINING = {"dropout_rate", "initializer_factor", "router_z_loss_coef"}
# A bias that T5's first releases have and nothing reads.
UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def encoder_decoder(reader: ConfigReader, part: Part, *, scaled: bool = True) -> ModelConfig:
    """Both stacks, of one embedding, which is the head, too. scaled: what the head reads is divided
    by the root of its size."""
    reader.computed |= TRAINING & reader.raw.keys()
    encoder = reader.integer("num_layers")
    decoder = reader.integer("num_decoder_layers", encoder)
    width = reader.integer("d_model")
    heads = Heads(reader.integer("num_heads"), reader.integer("d_kv"))
    buckets = Buckets(
        reader.integer("relative_attention_num_buckets"),
        reader.integer("relative_attention_max_distance"),
    )
    specs: list[LayerSpec] = []
    for i in range(encoder):
        mixer = RelativeAttention(heads, buckets, encoder=True, biases=i == 0)
        specs.append(LayerSpec(mixer, part("encoder", i)))
    for i in range(decoder):
        specs.append(LayerSpec(RelativeAttention(heads, buckets, biases=i == 0)))
        specs.append(LayerSpec(CrossAttention(heads), part("decoder", i)))
    return ModelConfig(
        model_type=str(reader.get("model_type")),
        hidden_size=width,
        vocab_size=reader.integer("vocab_size"),
        context=CONTEXT,
        layers=tuple(specs),
        norm_eps=reader.number("layer_norm_epsilon"),
        tie_word_embeddings=True,
        logits_divisor=width**0.5 if scaled else 1.0,
        encoder_layers=encoder,
        start_id=_start_id(reader),
    )


def _start_id(reader: ConfigReader) -> int:
    """What a decoder begins with: the padding token, unless another is named."""
    named = "decoder_start_token_id"
    key = named if reader.raw.get(named) is not None else "pad_token_id"
    found = reader.integer(key, 0, low=0)
    if found >= reader.integer("vocab_size"):
        raise reader.error(f"{key} is {found}; the vocabulary has no such token")
    return found


def _attention(sublayer: int, name: str) -> dict[str, Stored]:
    at = f"layer.{sublayer}."
    projections = {f"self_attn.{p}_proj.weight": f"{at}{name}.{p}.weight" for p in "qkvo"}
    bias = "self_attn.relative_attention_bias.weight"
    return {
        **projections,
        "input_layernorm.weight": f"{at}layer_norm.weight",
        bias: f"{at}{name}.relative_attention_bias.weight",
    }


def _feed_forward(sublayer: int, name: str, *, gated: bool) -> dict[str, Stored]:
    at = f"layer.{sublayer}."
    projections = ("wi_0", "wi_1", "wo") if gated else ("wi", "wi_1", "wo")
    return {
        **dense(f"{at}{name}.{{p}}", projections),
        **experts(f"{at}{name}.experts.expert_{{e}}.{{p}}", projections=projections),
        "mlp.router.weight": f"{at}{name}.router.classifier.weight",
        "mlp.router.bias": f"{at}{name}.router.classifier.bias",
        "post_attention_layernorm.weight": f"{at}layer_norm.weight",
    }


class Block(NamedTuple):
    """What a layer is of its stack's blocks.

    crosses   its attention is to what the encoder gave
    feeds     it has the block's feed-forward part
    """

    stack: Stack
    number: int
    crosses: bool
    feeds: bool


def block_of(config: ModelConfig, layer: int) -> Block:
    """An encoder's block is one layer, a decoder's two."""
    behind = layer - config.encoder_layers
    if behind < 0:
        return Block("encoder", layer, crosses=False, feeds=True)
    second = behind % 2 == 1
    return Block("decoder", behind // 2, crosses=second, feeds=second)


@dataclass(frozen=True, slots=True)
class StackLayout(Layout):
    """The names of both stacks. `part` is what a feed-forward part is called."""

    embedding: str = "shared.weight"
    norm: str = "decoder.final_layer_norm.weight"
    encoder_norm: str = "encoder.final_layer_norm.weight"
    copies: tuple[str, ...] = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    layer: str = "decoder.block.{i}."
    part: str = "mlp"

    @property
    def prefix(self) -> str:
        """Nothing stands before the names: a stack's own does."""
        return "decoder."

    def of_layer(self, config: ModelConfig, number: int) -> Layout:
        """See Layout: an encoder's block is one layer, a decoder's two."""
        gated = any(part.gated for part in config.feed_forward)
        block = block_of(config, number)
        sublayer = 1 if block.crosses else 0
        names = _attention(sublayer, "EncDecAttention" if block.crosses else "SelfAttention")
        if block.feeds:
            names |= _feed_forward(sublayer + 1, self.part, gated=gated)
        return Layout(names, f"{block.stack}.block.{block.number}.")
