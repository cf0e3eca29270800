"""Phi-3 and Phi-4, dense: Llama's layers, with one matrix for queries, keys and values, and one for
gate and up."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import SLIDING_WINDOW, USUAL_KEYS, GgufArchitecture, layouts
from moebius.models.layout import Layout, Names, joined
from moebius.models.parts import attention, decoder, feed_forward, layers, rope, sliding_window
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    mixer = attention(reader, rope=rope(reader, partial=1.0))
    return decoder(reader, layers(reader, mixer, feed_forward(reader), sliding_window(reader)))


QKV = [f"self_attn.{x}_proj.weight" for x in "qkv"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
NAMES: Names = {
    **joined("self_attn.qkv_proj.weight", *QKV),
    **joined("mlp.gate_up_proj.weight", *GATE_UP),
}
IN_FILES: Names = {**joined("attn_qkv.weight", *QKV), **joined("ffn_up.weight", *GATE_UP)}
GGUF = GgufArchitecture(
    "phi3",
    (*USUAL_KEYS, SLIDING_WINDOW),
    fixed={"hidden_act": "silu"},
    layouts=layouts(IN_FILES)[:1],
    partial=True,
)
FAMILY = Family(read, (Layout(NAMES),), gguf=GGUF)
