"""T5 (arXiv 1910.10683), its version 1.1 and Flan-T5: dense, gated from 1.1 on."""

from moebius.models import gguf_t5
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.parts import ACTIVATIONS, activation
from moebius.models.reading import ConfigReader
from moebius.models.t5_parts import UNUSED, Stack, StackLayout, encoder_decoder
from moebius.moe.config import FeedForwardConfig


def dense(reader: ConfigReader) -> FeedForwardConfig:
    """By feed_forward_proj; what transformers makes of it stands in files, too, and counts."""
    named = str(reader.get("feed_forward_proj"))
    first, _, last = named.rpartition("-")
    # In 1.1 "gelu" is its approximation.
    act = ACTIVATIONS.get("gelu_new" if named == "gated-gelu" else last)
    if first not in ("", "gated") or act is None:
        known = ", ".join(f"{name} and gated-{name}" for name in ACTIVATIONS)
        raise reader.error(f"feed_forward_proj is {named!r}; supported are {known}")
    if reader.get("dense_act_fn") is not None:
        act = activation(reader, "dense_act_fn")
    gated = reader.flag("is_gated_act", first == "gated")
    return FeedForwardConfig(reader.integer("d_ff"), activation=act, gated=gated)


def read(reader: ConfigReader) -> ModelConfig:
    part = dense(reader)

    def everywhere(stack: Stack, block: int) -> FeedForwardConfig:
        return part

    # 1.1 says that head and embedding are two, and means that nothing is divided; which tensors
    # there are is for the files to say.
    key = "tie_word_embeddings"
    reader.computed.add(key)
    said = reader.raw.get(key) is None or reader.flag(key)
    return encoder_decoder(reader, everywhere, scaled=reader.flag("scale_decoder_outputs", said))


FAMILY = Family(read, (StackLayout(part="DenseReluDense"),), unused=UNUSED, gguf=(gguf_t5.T5,))
