"""MiniMax-M2: sigmoid scores with a selection bias, norms over all of queries and keys, and a part
of each head turns."""

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, expert_keys
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, biased_experts, decoder, layers, rope
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    part = biased_experts(reader, "num_local_experts", "intermediate_size")
    # How published files say how much of a head turns, where nothing else does.
    turning = reader.optional_number("rotary_dim")
    partial = 1.0 if turning is None else turning / reader.integer("head_dim")
    mixer = attention(reader, rope=rope(reader, partial=partial), qk_norm="full")
    return decoder(reader, layers(reader, mixer, part))


PUBLISHED = {
    "mlp.router.weight": "block_sparse_moe.gate.weight",
    "mlp.router.selection_bias": "block_sparse_moe.e_score_correction_bias",
    **layout.experts("block_sparse_moe.experts.{e}.{p}", projections=("w1", "w3", "w2")),
}
CONVERTED = {"mlp.router.selection_bias": "mlp.e_score_correction_bias", **FUSED}
GGUF = GgufArchitecture(
    "minimax-m2",
    (*USUAL_KEYS, *expert_keys("num_local_experts", "intermediate_size")),
    sparse=True,
    fixed={"hidden_act": "silu"},
    values={"expert_gating_func": 2},
    partial=True,
)
FAMILY = Family(read, (Layout(PUBLISHED), Layout(CONVERTED)), gguf=(GGUF,))
