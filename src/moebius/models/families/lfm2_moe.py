"""LFM2 with experts: sigmoid scores with a selection bias; dense first layers."""

from moebius.models import gguf_hybrid, layout
from moebius.models.config import ModelConfig
from moebius.models.families import lfm2
from moebius.models.family import Family
from moebius.models.layout import Layout, Names, stacked
from moebius.models.reading import ConfigReader
from moebius.models.short_parts import mixers, model
from moebius.moe.config import FeedForwardConfig
from moebius.ops.config import RouterConfig


def read(reader: ConfigReader) -> ModelConfig:
    router = RouterConfig(
        reader.integer("num_experts"),
        reader.integer("num_experts_per_tok"),
        score="sigmoid",
        weight="renorm" if reader.flag("norm_topk_prob") else "raw",
        selection_bias=reader.flag("use_expert_bias"),
        renorm_eps=1e-6,
        scale=reader.number("routed_scaling_factor"),
    )
    sparse = FeedForwardConfig(reader.integer("moe_intermediate_size"), router)
    dense = FeedForwardConfig(reader.integer("intermediate_size"))
    first = reader.integer("num_dense_layers", low=0)
    parts = [dense if i < first else sparse for i in range(reader.num_layers)]
    return model(reader, mixers(reader), parts)


NAMES: Names = {
    **lfm2.NAMES,
    "mlp.router.weight": "feed_forward.gate.weight",
    "mlp.router.selection_bias": "feed_forward.expert_bias",
    **layout.experts("feed_forward.experts.{e}.{p}", projections=lfm2.W),
}
FUSED = stacked("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
FAMILY = Family(
    read,
    tuple(Layout(names, norm=lfm2.FINAL) for names in (NAMES, {**NAMES, **FUSED})),
    gguf=(gguf_hybrid.LFM2_MOE,),
)
