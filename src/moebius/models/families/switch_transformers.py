"""Switch Transformers (arXiv 2101.03961): T5 with experts in every n-th block, of which a token has
one; an encoder's experts take so many of a prompt's tokens each."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.parts import activation
from moebius.models.reading import ConfigReader
from moebius.models.t5_parts import UNUSED, Stack, StackLayout, encoder_decoder
from moebius.moe.config import FeedForwardConfig
from moebius.ops.config import RouterConfig

GATED = "gated-gelu"


def sparse(reader: ConfigReader, stack: Stack, block: int) -> bool:
    """Whether a block has experts: the second of so many. Where none is said to have some, the
    second of all has: so it is in what transformers makes of the keys."""
    layers = reader.integer("num_layers")
    if stack == "decoder":
        layers = reader.integer("num_decoder_layers", layers)
    wanted = reader.integer(f"num_sparse_{stack}_layers", low=0)
    step = layers // wanted if wanted else layers
    if reader.get(f"{stack}_sparse_step") is not None:
        step = reader.integer(f"{stack}_sparse_step", low=0)
    return step == 1 or (step > 1 and block % step == 1)


def read(reader: ConfigReader) -> ModelConfig:
    reader.word("router_dtype", ("float32",))
    reader.computed.add("router_ignore_padding_tokens")  # no prompt is padded
    gated = reader.get("dense_act_fn") == GATED
    act = "gelu_tanh" if gated else activation(reader, "dense_act_fn")
    dense = FeedForwardConfig(reader.integer("d_ff"), activation=act, gated=gated)
    router = RouterConfig(reader.integer("num_experts"), 1, logit_bias=reader.flag("router_bias"))
    capacity = reader.integer("expert_capacity")

    def part(stack: Stack, block: int) -> FeedForwardConfig:
        if not sparse(reader, stack, block):
            return dense
        # A decoder draws token by token: each is alone, and there is room for it.
        limit = capacity if stack == "encoder" else None
        return replace(dense, router=replace(router, capacity=limit))

    return encoder_decoder(reader, part)


FAMILY = Family(read, (StackLayout(),), unused=UNUSED)
