"""What Nemotron-H's config.json says of its layers: as moebius.models.parts, for it alone."""

from collections.abc import Sequence

from moebius.models.parts import FULL, LINEAR, activation, layer_types
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixers.mamba2 import Mamba2
from moebius.ops.config import RouterConfig, ScanSizes

MOE = "moe"
MLP = "mlp"
PATTERN = {"M": LINEAR, "*": FULL, "E": MOE, "-": MLP}
USUAL = [LINEAR, MOE, FULL, MLP]
# What changes no answer: how weights began, what predicts further tokens, and bounds of time steps
# that transformers has for prompts and not for answers, and llama.cpp for neither.
WITHOUT_EFFECT = {
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "num_nextn_predict_layers",
    "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
    "num_logits_to_keep",
    "use_mamba_kernels",
    "chunk_size",
    "mamba_chunk_size",
    "time_step_min",
    "time_step_max",
    "time_step_limit",
    "time_step_floor",
    "mamba_dt_min",
    "mamba_dt_max",
    "mamba_dt_limit",
    "mamba_dt_init_floor",
    "expand",
    "mamba_expand",
    "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap",
    "n_shared_experts",
}


def kinds(reader: ConfigReader) -> Sequence[str]:
    """What each layer is."""
    pattern = reader.get("hybrid_override_pattern")
    types = layer_types(reader, tuple(PATTERN.values()), "layers_block_type", counted=False)
    if types is None and pattern is not None:
        good = isinstance(pattern, str) and pattern and not set(pattern) - set(PATTERN)
        if not good:
            raise reader.error(
                f"hybrid_override_pattern is {pattern!r}; it must be made of {', '.join(PATTERN)}"
            )
        types = [PATTERN[letter] for letter in pattern]
    found = types or USUAL
    said = reader.get("num_hidden_layers")
    if said not in (None, len(found)):
        raise reader.error(f"num_hidden_layers is {said}, but {len(found)} layers are named")
    return found


def mamba(reader: ConfigReader) -> Mamba2:
    if reader.get("mamba_hidden_act") != "silu":
        raise reader.error(f"mamba_hidden_act is {reader.get('mamba_hidden_act')!r}, not silu")

    def number(key: str, older: str) -> int:
        return reader.integer(older, reader.integer(key))

    bias = reader.flag("use_conv_bias")
    return Mamba2(
        ScanSizes(
            reader.integer("mamba_num_heads"),
            reader.integer("mamba_head_dim"),
            reader.integer("ssm_state_size"),
            number("n_groups", "mamba_n_groups"),
        ),
        taps=number("conv_kernel", "mamba_d_conv"),
        conv_bias=reader.flag("mamba_conv_bias", bias),
        bias=reader.flag("use_bias"),
    )


def experts(reader: ConfigReader) -> FeedForwardConfig:
    router = RouterConfig(
        reader.integer("n_routed_experts"),
        reader.integer("num_experts_per_tok"),
        score="sigmoid",
        weight="renorm" if reader.flag("norm_topk_prob") else "raw",
        selection_bias=True,
        num_groups=reader.integer("n_group"),
        groups_kept=reader.integer("topk_group"),
        group_score="top2",
        group_fill="never",
        renorm_eps=1e-20,
        scale=reader.number("routed_scaling_factor"),
    )
    latent = reader.get("moe_latent_size")
    return FeedForwardConfig(
        reader.integer("moe_intermediate_size"),
        router,
        activation(reader, "mlp_hidden_act"),
        shared_width=reader.integer("moe_shared_expert_intermediate_size"),
        gated=False,
        latent=None if latent is None else reader.integer("moe_latent_size"),
    )
