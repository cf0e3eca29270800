"""Mixtral (arXiv 2401.04088): softmax over the experts, the top k renormalised."""

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, expert_keys
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, decoder, experts, layers, sliding_window
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    part = experts(reader, "num_local_experts", "intermediate_size", weight="renorm")
    return decoder(reader, layers(reader, attention(reader), part, sliding_window(reader)))


PUBLISHED = {
    "mlp.router.weight": "block_sparse_moe.gate.weight",
    **layout.experts("block_sparse_moe.experts.{e}.{p}", projections=("w1", "w3", "w2")),
}
GGUF = GgufArchitecture(
    "llama",
    (*USUAL_KEYS, *expert_keys("num_local_experts")),
    sparse=True,
    fixed={"hidden_act": "silu", "sliding_window": None},
    values={"expert_gating_func": 1},
    permuted=True,
)
FAMILY = Family(read, (Layout(PUBLISHED), Layout(FUSED)), gguf=(GGUF,))
