"""Reading a config.json: what is used is read, what is known to be harmless may stay, anything else is an error.

Configurations of transformers 4 and 5 are both read. A key that is absent has the default of transformers'
configuration class, because checkpoints were saved without keys that equal it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moebius.config import Activation, RopeConfig
from moebius.errors import ConfigError

_HARMLESS = frozenset(
    [
        "model_type",
        "architectures",
        "auto_map",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "pretraining_tp",
        "attention_dropout",
        "router_aux_loss_coef",
        "output_router_logits",
        "router_jitter_noise",
        "max_length",
        "min_length",
        "temperature",
        "top_k",
        "top_p",
        "do_sample",
        "num_beams",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "task_specific_params",
        "id2label",
        "label2id",
        "problem_type",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "bos_token",
        "eos_token",
        "pad_token",
        "tokenizer_class",
        "finetuning_task",
        "num_return_sequences",
        "early_stopping",
        "diversity_penalty",
        "num_beam_groups",
        "typical_p",
        "exponential_decay_length_penalty",
        "transformers_version",
        "attn_implementation",
        "rope_interleaved",
        "residual_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
    ]
)
# A value that switches nothing on: a key we do not know that carries it changes nothing.
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROPE_KEYS = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "partial_rotary_factor",
    ]
)


class ConfigReader:
    """The keys of one config.json, remembering which were read."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value, or the default where it is absent or null."""
        self._read.add(key)
        value = self._raw.get(key)
        return default if value is None else value

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, which some configurations tell from absent."""
        return key in self._raw and self._raw[key] is None

    def _checked(self, key: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"config.json: {key} is missing; it must be {wanted}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"config.json: {key} is {value!r}; it must be {wanted}")
        return value

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        wanted = f"an integer of at least {low}"
        value: int = self._checked(key, default, (int,), wanted)
        if value < low:
            raise ConfigError(f"config.json: {key} is {value}; it must be {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._checked(key, default, (int, float), "a number"))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._checked(key, default, (bool,), "true or false"))

    def indices(self, key: str) -> tuple[int, ...]:
        value = self._checked(key, [], (list,), "a list of layer numbers")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            raise ConfigError(f"config.json: {key} is {value!r}; it must be a list of layer numbers")
        return tuple(value)

    def num_experts(self) -> int:
        """Checkpoints of one architecture say num_experts or num_local_experts, by transformers' version."""
        key = "num_experts" if self.get("num_local_experts") is None else "num_local_experts"
        return self.integer(key)

    def default(self, key: str, value: Any) -> None:
        """Give an absent (not a null) key the value that this architecture's class has."""
        if key not in self._raw:
            self._raw = {**self._raw, key: value}

    def activation(self) -> Activation:
        name = self.get("hidden_act", "silu")
        if name not in _ACTIVATIONS:
            raise ConfigError(f"config.json: hidden_act is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def layer_types(self, num_layers: int) -> Sequence[str] | None:
        """One of full_attention and sliding_attention a layer, None where the key is absent."""
        value = self.get("layer_types")
        if value is None:
            return None
        known = ("full_attention", "sliding_attention")
        if not isinstance(value, list) or len(value) != num_layers or any(v not in known for v in value):
            raise ConfigError(f"config.json: layer_types must name one of {', '.join(known)} for each layer")
        return value

    def finish(self) -> None:
        """Raises ConfigError naming a key that nobody read and that may matter."""
        for key, value in self._raw.items():
            known = key in self._read or key in _HARMLESS or key.startswith("_") or key.endswith("_version")
            if not known and value not in _OFF:
                raise ConfigError(
                    f"config.json: {key} = {value!r} is not supported for model_type {self._raw.get('model_type')!r}; "
                    "the model would not compute what it was trained for"
                )

    def rope(self, default_theta: float, max_position: int) -> RopeConfig:
        """rope_theta and rope_scaling (transformers 4) or rope_parameters (5); rope_scaling wins as it does there."""
        theta = self.number("rope_theta", default_theta)
        old, new = self.get("rope_scaling"), self.get("rope_parameters")
        name, rope = ("rope_scaling", old) if old else ("rope_parameters", new or {})
        if not isinstance(rope, dict):
            raise ConfigError(f"config.json: {name} is {rope!r}; it must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind in ("dynamic", "longrope", "su"):
            raise ConfigError(
                f"config.json: rope type {kind!r} is not supported: its frequencies depend on the longest sequence in "
                "the batch, so a request's answer would depend on its neighbours; linear, llama3 and yarn are supported"
            )
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ConfigError(
                f"config.json: rope type {kind!r} is unknown; default, linear, llama3, yarn are supported"
            )
        for key, value in rope.items():
            if key not in _ROPE_KEYS and value not in _OFF:
                raise ConfigError(f"config.json: {name}.{key} = {value!r} is not supported")
        if float(rope.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ConfigError("config.json: partial_rotary_factor is not 1, which this model_type does not know")
        return _rope_config(kind, name, rope, theta, self._original(rope, max_position), max_position)

    def _original(self, rope: Mapping[str, Any], max_position: int) -> int:
        return int(
            self.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or max_position
        )


def _rope_config(
    kind: str, name: str, rope: Mapping[str, Any], theta: float, original: int, max_position: int
) -> RopeConfig:
    def number(key: str, default: float | None) -> float | None:
        value = rope.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"config.json: {name}.{key} is {value!r}; it must be a number")
        return float(value)

    def needed(key: str) -> float:
        value = number(key, None)
        if value is None:
            raise ConfigError(f"config.json: {name} of type {kind} lacks {key}")
        return value

    theta = number("rope_theta", theta) or theta
    if kind == "linear":
        return RopeConfig(theta, "linear", needed("factor"))
    if kind == "llama3":
        low, high = needed("low_freq_factor"), needed("high_freq_factor")
        if not low < high:
            raise ConfigError(
                f"config.json: {name}.low_freq_factor = {low} must be less than high_freq_factor = {high}"
            )
        return RopeConfig(theta, "llama3", needed("factor"), original, low, high)
    if kind == "yarn":
        return RopeConfig(
            theta,
            "yarn",
            number("factor", None) or max_position / original,
            original,
            beta_fast=number("beta_fast", None) or 32.0,
            beta_slow=number("beta_slow", None) or 1.0,
            attention_factor=number("attention_factor", None),
            mscale=number("mscale", None),
            mscale_all_dim=number("mscale_all_dim", None),
            truncate=bool(rope.get("truncate", True)),
        )
    return RopeConfig(theta)


def sliding_windows(reader: ConfigReader, num_layers: int, default_types: Sequence[str]) -> tuple[int | None, ...]:
    """Windows of the Qwen family: on with use_sliding_window, in the layers that layer_types (or its default) name."""
    used = reader.flag("use_sliding_window", False) and not reader.is_null("sliding_window")
    types = reader.layer_types(num_layers) or default_types
    if not used:
        reader.get("sliding_window")
        if "sliding_attention" in types:
            raise ConfigError("config.json: layer_types has sliding_attention, but use_sliding_window is off")
        return (None,) * num_layers
    window = reader.integer("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def upper_layers_slide(reader: ConfigReader, num_layers: int) -> list[str]:
    """layer_types of the dense Qwen models where it is absent: layers from max_window_layers on have a window."""
    full = reader.integer("max_window_layers", 28, low=0)
    used = reader.flag("use_sliding_window", False) and not reader.is_null("sliding_window")
    return ["sliding_attention" if used and i >= full else "full_attention" for i in range(num_layers)]


def decoder_fields(reader: ConfigReader, *, theta: float, eps: float) -> dict[str, Any]:
    """What every supported architecture spells alike, as arguments of ModelConfig. Defaults differ, so they come in."""
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    if reader.get("head_dim") is None and hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; give head_dim"
        )
    max_position = reader.integer("max_position_embeddings")
    quantization = reader.get("quantization_config")
    if quantization:
        raise ConfigError(
            f"config.json: quantization_config of method {dict(quantization).get('quant_method')!r} is not supported; "
            "use the checkpoint in bfloat16, float16 or float32"
        )
    return {
        "model_type": reader.get("model_type"),
        "hidden_size": hidden,
        "num_layers": reader.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": reader.integer("head_dim", hidden // heads),
        "vocab_size": reader.integer("vocab_size"),
        "max_position_embeddings": max_position,
        "rope": reader.rope(theta, max_position),
        "norm_eps": reader.number("rms_norm_eps", eps),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
    }


def sparse_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    """Which layers have experts in the Qwen family: every decoder_sparse_step-th, but for mlp_only_layers."""
    step, dense = reader.integer("decoder_sparse_step", 1), reader.indices("mlp_only_layers")
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers))
