"""A recipe's model table is a config.json, less what training fills in: its model_type says what
the layers are.

What no published type expresses has the type `moebius`: its layers take the recipe's `layers`,
feed-forwards as FeedForwardConfig has them, in turn; qk_norm and qkv_bias say how it attends. It
trains, and is not served, for the reason that `unpublished` may give.
"""

from dataclasses import asdict, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from moebius.errors import ConfigError, require
from moebius.models.config import ModelConfig
from moebius.models.family import model_config, read_config
from moebius.moe.config import FeedForwardConfig

if TYPE_CHECKING:
    from moebius.train.recipe import Recipe

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_WIDTHS = (
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_experts",
    "num_local_experts",
)
_KEPT = (*_DEFAULTS, *_SIZES, "rope_scaling", "rope_parameters")
# Keys of config.json that say nothing of what a model computes, or what training finds out by
# itself, and where a recipe says it.
_SAID_ELSEWHERE = {
    "vocab_size": "tokenizer.vocab_size",
    "eos_token_id": "tokenizer.end_of_text",
    "pad_token_id": "tokenizer.end_of_text",
    "torch_dtype": "training.dtype",
    "dtype": "training.dtype",
    "router_aux_loss_coef": "training.load_balance",
    "router_jitter_noise": "routing.jitter",
    **dict.fromkeys(
        ("attention_dropout", "residual_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
        "finetune.dropout, which is for fine-tuning alone",
    ),
}


def config_json(recipe: "Recipe", vocab_size: int) -> dict[str, Any]:
    """The whole config.json of the recipe's model table."""
    table = recipe.model or {}
    kind, layers = (
        str(table.get("model_type")).replace("granitemoe", "granite_moe"),
        table.get("num_hidden_layers"),
    )
    name = f"{kind.title().replace('_', '')}ForCausalLM"
    heads = (
        {"num_key_value_heads": table["num_attention_heads"]}
        if "num_attention_heads" in table
        else {}
    )
    whole = {**_DEFAULTS, "architectures": [name], **heads, **table, "vocab_size": vocab_size}
    if recipe.layers and isinstance(layers, int):
        whole["feed_forward"] = [asdict(part) for part in islice(cycle(recipe.layers), layers)]
    return whole


def check_written(whole: dict[str, Any]) -> None:
    """ConfigError for what is no fault in a published config.json, but is one in a recipe, which
    somebody wrote for this model: a size that is left to the class's default, and a key that
    changes nothing."""
    config, ignored, assumed = read_config(whole)
    dense = any(part.router is None for part in config.feed_forward)
    one_width = "moe_intermediate_size" not in {*whole, *assumed}
    sizes = (*_SIZES, *_WIDTHS, *(["intermediate_size"] if dense or one_width else []))
    missing = [key for key in sizes if key in assumed]
    require(not missing, f"model: {', '.join(missing)} is missing")
    unread, kind = ", ".join(ignored), config.model_type
    require(
        not unread, f"model: models of type {kind} know no {unread}; correct it or leave it out"
    )


def dense_twin(recipe: "Recipe") -> "Recipe":
    """The same run with a dense model that a token meets as many parameters of; dense layers stay
    as they are."""
    require(recipe.model is not None, "--dense-twin needs a recipe with a model table")
    table, config = (
        recipe.model or {},
        model_config(config_json(recipe, recipe.tokenizer.vocab_size)),
    )
    require(any(part.router for part in config.feed_forward), "the recipe's model is dense already")
    attention = config.attention
    parts = tuple(
        FeedForwardConfig(active_width(part), activation=part.activation, gated=part.gated)
        for part in config.feed_forward
    )
    common = {key: table[key] for key in _KEPT if key in table} | {"head_dim": attention.head_dim}
    kind = {("head", False): "qwen3", ("none", True): "qwen2"}.get(
        (attention.qk_norm, attention.qkv_bias)
    )
    if kind and parts[0].gated and len(set(parts)) == 1:
        activation = (
            "gelu_pytorch_tanh" if parts[0].activation == "gelu_tanh" else parts[0].activation
        )
        model = {"model_type": kind, "intermediate_size": parts[0].width, "hidden_act": activation}
        parts = ()
    else:
        lacks = config.unpublished or "this attention, or layers of these widths, in a dense model"
        model = {
            "model_type": "moebius",
            "unpublished": lacks,
            "qk_norm": attention.qk_norm,
            "qkv_bias": attention.qkv_bias,
        }
    return replace(recipe, name=f"{recipe.name}-dense", model=common | model, layers=parts)


def active_width(part: FeedForwardConfig) -> int:
    """Of a dense layer with as many parameters as a token uses in this one, router and gate too; a
    multiple of 8."""
    if part.router is None:
        return part.width
    beside = (part.router.num_experts + part.shared_gate) / (3 if part.gated else 2)
    return 8 * round((part.router.top_k * part.width + part.shared_width + beside) / 8)


def check_trainable(config: ModelConfig, recipe: "Recipe") -> None:
    """ConfigError for a model, new or to be fine-tuned, that this recipe cannot train."""
    training, routers = (
        recipe.training,
        {part.router for part in config.feed_forward if part.router is not None},
    )
    length, longest = training.row_length, config.context
    require(
        length <= longest,
        f"training.row_length = {length} exceeds the model's context of {longest} tokens",
    )
    require(
        len(routers) <= 1,
        "the model's layers have different routers, which training does not support",
    )
    if config.logits_softcap is not None:
        raise ConfigError(
            f"the model's logits are capped at {config.logits_softcap}, which training does not "
            "compute; its loss would be another model's"
        )
    part = recipe.finetune.train if recipe.finetune else "all"
    require(
        bool(routers) or part != "experts",
        'finetune.train is "experts", but no layer of the model has any',
    )
    for router in routers:
        require(
            router.top_k > 1 or router.weight not in ("renorm", "softmax"),
            "a renormalised top-1 router's weight is always 1, so that the language model's loss "
            "gives its router no gradient; use raw weights (norm_topk_prob = false), or more "
            "experts a token",
        )
        several = recipe.routing.second_policy == "all" or router.top_k > 1
        require(
            several,
            "routing.second_policy needs 2 experts a token or more; a single choice has no second",
        )
        biased = not training.bias_rate or router.selection_bias
        require(
            biased,
            f"training.bias_rate is {training.bias_rate}, but the model's router has no selection "
            "bias",
        )
    if recipe.model is not None:
        _check_table(recipe.model, recipe, config)


def _check_table(table: dict[str, Any], recipe: "Recipe", config: ModelConfig) -> None:
    """ConfigError for a model table that says what training would not do."""
    for key, place in _SAID_ELSEWHERE.items():
        require(
            not table.get(key), f"model.{key} changes nothing in a recipe; what it means is {place}"
        )
    unused = (
        f"{len(recipe.layers)} layers are described, but model.num_hidden_layers is "
        f"{config.num_layers}"
    )
    require(len(recipe.layers) <= config.num_layers, unused)
    meant = any(part.router for part in config.feed_forward) or not any(
        "experts" in key for key in table
    )
    require(
        meant, "model: no layer has experts; lower decoder_sparse_step or first_k_dense_replace"
    )
    std = table.get("initializer_range", 1)
    require(
        type(std) in (int, float) and std > 0,
        f"model.initializer_range is {std!r}; it must be positive",
    )
    widths = {config.hidden_size, *(part.width for part in config.feed_forward)}
    good = all(width % 8 == 0 for width in widths)
    require(
        good, f"model: widths {sorted(widths)} must be multiples of 8, which grouped products need"
    )
