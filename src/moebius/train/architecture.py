"""A recipe's model table is a config.json, less what training fills in.

Its model_type says what the layers are. What no published type expresses has the type `moebius`:
its layers take the recipe's `layers`, feed-forwards as FeedForwardConfig has them, in turn; qk_norm
and qkv_bias say how it attends. It trains, and is not served, for the reason that `unpublished` may
give.
"""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import cycle, islice
from typing import Any

from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.encoder_decoder import require_decoder_alone
from moebius.models.family import read_config
from moebius.moe.config import FeedForwardConfig
from moebius.moe.training import TrainingRouting
from moebius.nn.attention import GQA
from moebius.ops.config import RouterConfig
from moebius.train.tables import FinetuneRecipe, TrainingRecipe

Layers = tuple[FeedForwardConfig, ...]

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


def config_json(table: Mapping[str, Any], layers: Layers, vocab_size: int) -> dict[str, Any]:
    """The whole config.json of a recipe's model table and layers."""
    kind = str(table.get("model_type")).replace("granitemoe", "granite_moe")
    name = f"{kind.title().replace('_', '')}ForCausalLM"
    whole = {**_DEFAULTS, "architectures": [name]}
    if "num_attention_heads" in table:
        whole["num_key_value_heads"] = table["num_attention_heads"]
    whole |= {**table, "vocab_size": vocab_size}
    count = table.get("num_hidden_layers")
    if layers and isinstance(count, int):
        whole["feed_forward"] = [asdict(part) for part in islice(cycle(layers), count)]
    return whole


def check_written(whole: dict[str, Any]) -> None:
    """ConfigError for what is a fault in a recipe, though none in a published config.json.

    Somebody wrote the recipe for this model: they did not mean to leave a size to the class's
    default, nor to write a key that changes nothing.
    """
    config, ignored, assumed, quantization = read_config(whole)
    if quantization is not None:
        raise ConfigError("model: what is trained is not quantised; leave quantization_config out")
    dense = any(part.router is None for part in config.feed_forward)
    one_width = "moe_intermediate_size" not in {*whole, *assumed}
    sizes = [*_SIZES, *_WIDTHS]
    if dense or one_width:
        sizes.append("intermediate_size")
    missing = [key for key in sizes if key in assumed]
    if missing:
        raise ConfigError(f"model: {', '.join(missing)} is missing")
    if ignored:
        raise ConfigError(
            f"model: models of type {config.model_type} know no {', '.join(ignored)}; correct it "
            "or leave it out"
        )


def dense_twin(table: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Any], Layers]:
    """Model table and layers of the dense model that a token meets as many parameters of.

    `config` is the architecture that `table` describes. Layers that are dense already stay as they
    are. ConfigError where all of them are.
    """
    if not any(part.router for part in config.feed_forward):
        raise ConfigError("the recipe's model is dense already")
    parts = tuple(
        FeedForwardConfig(active_width(part), activation=part.activation, gated=part.gated)
        for part in config.feed_forward
    )
    attention = config.attention
    if not all(isinstance(mixer, GQA) for mixer in config.mixers):
        raise ConfigError("a dense twin has attention in all layers, which this model has not")
    common = {key: table[key] for key in _KEPT if key in table} | {"head_dim": attention.head_dim}
    published = {("head", False): "qwen3", ("none", True): "qwen2"}
    kind = published.get((attention.qk_norm, attention.qkv_bias))
    first = parts[0]
    if kind and first.gated and len(set(parts)) == 1:
        activation = "gelu_pytorch_tanh" if first.activation == "gelu_tanh" else first.activation
        model = {"model_type": kind, "intermediate_size": first.width, "hidden_act": activation}
        return common | model, ()
    lacks = config.unpublished or "this attention, or layers of these widths, in a dense model"
    model = {
        "model_type": "moebius",
        "unpublished": lacks,
        "qk_norm": attention.qk_norm,
        "qkv_bias": attention.qkv_bias,
    }
    return common | model, parts


def active_width(part: FeedForwardConfig) -> int:
    """The width of a dense layer with as many parameters as a token uses in this one.

    Router and gate count too. It is a multiple of 8.
    """
    if part.router is None:
        return part.width
    beside = (part.router.num_experts + part.shared_gate) / (3 if part.gated else 2)
    return 8 * round((part.router.top_k * part.width + part.shared_width + beside) / 8)


def check_trainable(
    config: ModelConfig,
    training: TrainingRecipe,
    routing: TrainingRouting,
    finetune: FinetuneRecipe | None,
) -> None:
    """ConfigError for a model, new or to be fine-tuned, that this recipe cannot train."""
    require_decoder_alone(config)
    if training.row_length > config.context:
        raise ConfigError(
            f"training.row_length = {training.row_length} exceeds the model's context of "
            f"{config.context} tokens"
        )
    routers = {part.router for part in config.feed_forward if part.router is not None}
    if len(routers) > 1:
        raise ConfigError(
            "the model's layers have different routers, which training does not support"
        )
    if config.logits_softcap is not None:
        raise ConfigError(
            f"the model's logits are capped at {config.logits_softcap}, which training does not "
            "compute; its loss would be another model's"
        )
    if not routers and finetune is not None and finetune.train == "experts":
        raise ConfigError('finetune.train is "experts", but no layer of the model has any')
    for router in routers:
        _check_router(router, training, routing)


def _check_router(router: RouterConfig, training: TrainingRecipe, routing: TrainingRouting) -> None:
    if router.capacity is not None:
        raise ConfigError(
            f"a router's capacity is {router.capacity}; it is an encoder's, and training's is "
            "routing.capacity_factor"
        )
    if router.top_k == 1 and router.weight in ("renorm", "softmax"):
        raise ConfigError(
            "a renormalised top-1 router's weight is always 1, so that the language model's loss "
            "gives its router no gradient; use raw weights (norm_topk_prob = false), or more "
            "experts a token"
        )
    if router.top_k == 1 and routing.second_policy != "all":
        raise ConfigError(
            "routing.second_policy needs 2 experts a token or more; a single choice has no second"
        )
    if training.bias_rate and not router.selection_bias:
        raise ConfigError(
            f"training.bias_rate is {training.bias_rate}, but the model's router has no selection "
            "bias"
        )


def check_model_table(table: Mapping[str, Any], layers: Layers, config: ModelConfig) -> None:
    """ConfigError for a model table that says what training would not do."""
    for key, place in _SAID_ELSEWHERE.items():
        if table.get(key):
            raise ConfigError(f"model.{key} changes nothing in a recipe; what it means is {place}")
    if len(layers) > config.num_layers:
        raise ConfigError(
            f"{len(layers)} layers are described, but model.num_hidden_layers is "
            f"{config.num_layers}"
        )
    routed = any(part.router for part in config.feed_forward)
    if not routed and any("experts" in key for key in table):
        raise ConfigError(
            "model: no layer has experts; lower decoder_sparse_step or first_k_dense_replace"
        )
    std = table.get("initializer_range", 1)
    if type(std) not in (int, float) or not std > 0:
        raise ConfigError(f"model.initializer_range is {std!r}; it must be positive")
    widths = {config.hidden_size, *(part.width for part in config.feed_forward)}
    if any(width % 8 for width in widths):
        raise ConfigError(
            f"model: widths {sorted(widths)} must be multiples of 8, which grouped products need"
        )
