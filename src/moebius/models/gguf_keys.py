"""A config.json as the keys of a GGUF file: the way back of moebius.models.gguf_config."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.family import config_reader, family, model_config
from moebius.models.gguf_architecture import GgufArchitecture, Key
from moebius.models.gguf_config import yarn_attention
from moebius.models.reading import ConfigReader
from moebius.nn.attention import GQA
from moebius.nn.rope import RopeConfig, frequencies

_WINDOWS = ("sliding_window", "use_sliding_window")
_ADVICE = "load the model with --quantization instead"


class GgufKeys(NamedTuple):
    """What a GGUF file says of a model.

    keys           values by their whole names; of type int uint32, float float32, bool or str, and
                   lists of these
    rope_divisors  the values of rope_freqs.weight, where the file needs one
    """

    architecture: GgufArchitecture
    keys: Mapping[str, Value]
    rope_divisors: tuple[float, ...] | None


def gguf_keys(config_json: Mapping[str, Any]) -> GgufKeys:
    """Raises ConfigError for a model that GGUF files cannot hold, naming what is in the way."""
    config = model_config(config_json)
    architecture = family(config.model_type).gguf
    if architecture is None:
        raise ConfigError(f"GGUF files hold no {config.model_type} models; {_ADVICE}")
    reader = config_reader(config_json)
    _check_windows(architecture, config)
    _check_fixed(architecture, reader)
    attention = config.attention
    rope = _rope(config)
    keys: dict[str, Value] = {
        key.gguf: _value(key, reader, config)
        for key in architecture.keys
        if not (key.optional and reader.get(key.config) is None)
    }
    keys |= architecture.values
    keys |= architecture.write(reader, config)
    keys["rope.dimension_count"] = rope.size(attention.head_dim)
    keys["attention.value_length"] = attention.head_dim
    keys["vocab_size"] = config.vocab_size
    keys |= _rope_keys(rope, architecture)
    named = {f"{architecture.name}.{key}": value for key, value in keys.items()}
    named = {"general.architecture": architecture.name, **named}
    return GgufKeys(architecture, named, _divisors(rope, attention.head_dim))


def _value(key: Key, reader: ConfigReader, config: ModelConfig) -> int | float | bool:
    if key.config == "head_dim":
        return config.attention.head_dim
    if key.config == "num_key_value_heads":
        return config.attention.num_kv_heads
    if key.config == "rope_theta":
        return _rope(config).theta
    if key.kind == "integer":
        return reader.integer(key.config, low=0)
    return reader.number(key.config) if key.kind == "number" else reader.flag(key.config)


def _rope(config: ModelConfig) -> RopeConfig:
    """That of all layers."""
    ropes = {mixer.rope for mixer in config.mixers if isinstance(mixer, GQA)}
    rope = ropes.pop() if ropes else None
    if rope is None or ropes:
        raise ConfigError(
            f"GGUF files hold no {config.model_type} models whose layers have different rotary "
            f"embeddings; {_ADVICE}"
        )
    return rope


def _check_windows(architecture: GgufArchitecture, config: ModelConfig) -> None:
    """Raises ConfigError where llama.cpp has none in a layer, or one where there is none."""
    for number, mixer in enumerate(config.mixers):
        if not isinstance(mixer, GQA):
            continue
        slides = architecture.slides(number)
        # One as long as the context cuts nothing off.
        cuts = mixer.window is not None and mixer.window < config.context
        if cuts and not slides:
            raise ConfigError(
                f"this model has a sliding window in layer {number}, but llama.cpp has none there "
                f"for {architecture.name}; {_ADVICE}"
            )
        if slides and mixer.window is None:
            raise ConfigError(
                f"this model has no sliding window in layer {number}, but llama.cpp has one there "
                f"for {architecture.name}; {_ADVICE}"
            )


def _check_fixed(architecture: GgufArchitecture, reader: ConfigReader) -> None:
    """Raises ConfigError where llama.cpp takes for granted what is not so."""
    for key, wanted in architecture.fixed.items():
        value = reader.get(key)
        if key not in _WINDOWS and (value or None) != (wanted or None):
            raise ConfigError(
                f"{key} is {value!r}, but llama.cpp takes {wanted!r} for granted of "
                f"{architecture.name}; {_ADVICE}"
            )


def _rope_keys(rope: RopeConfig, architecture: GgufArchitecture) -> dict[str, int | float | str]:
    """Of what scales positions; llama3's frequencies are a tensor."""
    if rope.scaling not in ("linear", "yarn"):
        return {}
    keys: dict[str, int | float | str] = {
        "rope.scaling.type": rope.scaling,
        "rope.scaling.factor": rope.factor,
    }
    if rope.scaling == "yarn":
        if rope.truncate != architecture.truncates:
            told = str(rope.truncate).lower()
            raise ConfigError(
                f"rope truncate is {told}, which files of {architecture.name} cannot say; {_ADVICE}"
            )
        _, attention = frequencies(rope, 2)
        keys |= {
            "rope.scaling.original_context_length": rope.original_max_position,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
            "rope.scaling.attn_factor": attention / yarn_attention(rope.factor),
        }
    return keys


def _divisors(rope: RopeConfig, head_dim: int) -> tuple[float, ...] | None:
    if rope.scaling != "llama3":
        return rope.divisors
    plain, _ = frequencies(RopeConfig(rope.theta), head_dim)
    scaled, _ = frequencies(rope, head_dim)
    return tuple((plain / scaled).tolist())
