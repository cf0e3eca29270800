"""A config.json as the keys of a GGUF file: the way back of moebius.models.gguf_config."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.family import config_reader, family, model_config
from moebius.models.gguf_architecture import (
    SHARED_WIDTH,
    SLIDING_LAYERS,
    SLIDING_SIZE,
    GgufArchitecture,
    Key,
    told_by_routers,
)
from moebius.models.gguf_config import STILL, yarn_attention
from moebius.models.reading import ConfigReader
from moebius.nn.attention import GQA
from moebius.nn.mixers.latent import MLA
from moebius.nn.rope import RopeConfig, frequencies

_WINDOWS = ("sliding_window", "use_sliding_window")
_ADVICE = "load the model with --quantization instead"
# In place of a rotary embedding where there is none.
_NO_ROPE = RopeConfig(10_000.0)
_NO_ATTENTION = f"no layer has attention, and GGUF files hold no such models; {_ADVICE}"
_SEVERAL_SIZES = f"GGUF files hold no models of several sizes of heads; {_ADVICE}"


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
    architecture = _architecture(config)
    reader = config_reader(config_json)
    _check_windows(architecture, config)
    _check_fixed(architecture, reader)
    if architecture.ropes == "none":
        keys = _own_keys(architecture, reader, config, _NO_ROPE)
        keys |= architecture.write(reader, config)
        divisors = None
    else:
        keys, divisors = _turning_keys(architecture, reader, config)
    keys["vocab_size"] = config.vocab_size
    _check_sparse(architecture, config, keys)
    named = {f"{architecture.name}.{key}": value for key, value in keys.items()}
    named = {"general.architecture": architecture.name, **named}
    return GgufKeys(architecture, named, divisors)


def _architecture(config: ModelConfig) -> GgufArchitecture:
    """The first of the ways in which files have such models that knows experts, or none, as this
    one does. Raises ConfigError where there is no way at all."""
    ways = family(config.model_type).gguf
    if not ways:
        raise ConfigError(f"GGUF files hold no {config.model_type} models; {_ADVICE}")
    sparse = bool(config.experts)
    return next((each for each in ways if each.sparse in (None, sparse)), ways[0])


def _own_keys(
    architecture: GgufArchitecture, reader: ConfigReader, config: ModelConfig, rope: RopeConfig
) -> dict[str, Value]:
    """Those that config.json has one by one, and those that are the same for all models."""
    keys: dict[str, Value] = {
        key.gguf: _value(key, reader, config, rope)
        for key in architecture.keys
        if not (key.optional and reader.get(key.config) is None)
    }
    return {**keys, **architecture.values}


def _turning_keys(
    architecture: GgufArchitecture, reader: ConfigReader, config: ModelConfig
) -> tuple[dict[str, Value], tuple[float, ...] | None]:
    """The keys of a model with rotary embeddings, and the divisors of their frequencies."""
    rope, turning, size = _turning(config, architecture)
    keys = _own_keys(architecture, reader, config, rope)
    if architecture.ropes == "each":
        keys |= _sliding_rope_keys(config, rope)
    keys |= architecture.write(reader, config)
    if not architecture.latent:
        keys["rope.dimension_count"] = turning
        keys["attention.value_length"] = size
    keys |= _rope_keys(rope, architecture)
    return keys, _still(rope, size) if architecture.proportional else _divisors(rope, size)


def _turning(config: ModelConfig, architecture: GgufArchitecture) -> tuple[RopeConfig, int, int]:
    """The rotary embedding, how many values turn, and of heads of which size."""
    if not any(isinstance(mixer, GQA | MLA) for mixer in config.mixers):
        raise ConfigError(_NO_ATTENTION)
    if architecture.latent:
        found = {(each.rope, each.rope_dim) for each in config.mixers if isinstance(each, MLA)}
        ((rope, size),) = found
        if rope is None and architecture.ropes == "any":
            return _NO_ROPE, size, size
        if rope is None:
            raise ConfigError(f"GGUF files hold no latent attention without positions; {_ADVICE}")
        return rope, size, size
    _check_sizes(architecture, config)
    rope = _rope(config, architecture)
    size = _attention(config).head_dim
    return rope, rope.size(size), size


def _value(key: Key, reader: ConfigReader, config: ModelConfig, rope: RopeConfig) -> Value:
    told = _TOLD.get(key.gguf)
    # Files count the blocks of an encoder and of a decoder, where `config` has layers of both.
    if told is not None and not config.encoder_layers:
        return told(config)
    if key.config == "rope_theta":
        return rope.theta
    if key.kind == "sliding":
        return [mixer.window is not None for mixer in _gqas(config)]
    if key.kind == "integer":
        return reader.integer(key.config, low=0)
    return reader.number(key.config) if key.kind == "number" else reader.flag(key.config)


def _dense_first(config: ModelConfig) -> int:
    """How many layers stand before the first that has experts."""
    routed = [part.router is not None for part in config.feed_forward]
    return routed.index(True) if True in routed else len(routed)


def _check_sparse(
    architecture: GgufArchitecture, config: ModelConfig, keys: Mapping[str, Any]
) -> None:
    """Raises ConfigError where other layers have experts than the file would say."""
    if architecture.told is told_by_routers or architecture.sparse is None:
        return
    first = keys.get("leading_dense_block_count", 0)
    step = keys.get("interleave_moe_layer_step", 1)
    sparse = bool(config.experts) if architecture.sparse is None else architecture.sparse
    for number, layer in enumerate(config.layers):
        part = layer.feed_forward
        if part is None:
            continue
        expected = sparse and number >= first and (number + 1) % step == 0
        if expected != (part.router is not None):
            has = "no experts" if part.router is None else "experts"
            raise ConfigError(
                f"layer {number} has {has}, which files of {architecture.name} cannot say; "
                f"{_ADVICE}"
            )


def _gqas(config: ModelConfig) -> list[GQA]:
    return [mixer for mixer in config.mixers if isinstance(mixer, GQA)]


def _attention(config: ModelConfig, *, sliding: bool = False) -> GQA:
    """One layer's, of those without a window or with one, if there are such. All of these have its
    sizes, but for the number of heads."""
    every = _gqas(config)
    if not every:
        raise ConfigError(_NO_ATTENTION)
    found = [mixer for mixer in every if (mixer.window is not None) == sliding] or every
    if len({_sizes(mixer) for mixer in found}) != 1:
        raise ConfigError(_SEVERAL_SIZES)
    return found[0]


def _sizes(mixer: GQA) -> tuple[int, int]:
    return mixer.num_kv_heads, mixer.head_dim


def _check_sizes(architecture: GgufArchitecture, config: ModelConfig) -> None:
    """Raises ConfigError where windows have other heads, and the file cannot say it."""
    apart = any(key.gguf == SLIDING_SIZE for key in architecture.keys)
    if not apart and _sizes(_attention(config)) != _sizes(_attention(config, sliding=True)):
        raise ConfigError(_SEVERAL_SIZES)


def _window(config: ModelConfig) -> int:
    """That of all layers with one; 0 where no layer has."""
    windows = {mixer.window for mixer in _gqas(config) if mixer.window is not None}
    if len(windows) > 1:
        raise ConfigError(f"windows of {sorted(windows)}, and GGUF files have one; {_ADVICE}")
    return max(windows, default=0)


def _rope(config: ModelConfig, architecture: GgufArchitecture) -> RopeConfig:
    """That of all layers, or of those of one kind: see GgufArchitecture.ropes."""
    turning = any(mixer.rope is not None for mixer in _gqas(config))
    if architecture.ropes == "any" and not turning:
        return _NO_ROPE
    kept = {
        "any": _gqas(config),
        "one": _gqas(config),
        "sliding": [mixer for mixer in _gqas(config) if mixer.window is not None],
        "some": [mixer for mixer in _gqas(config) if mixer.rope is not None],
        "each": [mixer for mixer in _gqas(config) if mixer.window is None],
    }[architecture.ropes]
    still = {mixer for mixer in _gqas(config) if mixer.rope is None}
    ropes = {mixer.rope for mixer in kept or _gqas(config)}
    rope = ropes.pop() if ropes else None
    apart = architecture.ropes in ("sliding", "some")
    expected = set(_gqas(config)) - set(kept) if apart else set()
    if rope is None or ropes or still != expected:
        raise ConfigError(
            f"GGUF files hold no {config.model_type} models whose layers have such different "
            f"rotary embeddings; {_ADVICE}"
        )
    return rope


def _check_windows(architecture: GgufArchitecture, config: ModelConfig) -> None:
    """Raises ConfigError where llama.cpp has none in a layer, or one where there is none."""
    if any(key.gguf == SLIDING_LAYERS for key in architecture.keys):
        return
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


def _sliding_rope_keys(config: ModelConfig, rope: RopeConfig) -> dict[str, int | float]:
    """Of layers with a window that have an embedding of their own."""
    ropes = {mixer.rope for mixer in _gqas(config) if mixer.window is not None} or {rope}
    own = ropes.pop()
    if ropes or own is None or own.scaling != "none" or rope.scaling == "llama3":
        raise ConfigError(
            f"GGUF files hold no such scaling of positions in layers with a window; {_ADVICE}"
        )
    return {
        "rope.freq_base_swa": own.theta,
        "rope.dimension_count_swa": own.size(_attention(config, sliding=True).head_dim),
    }


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
        keys |= {
            "rope.scaling.original_context_length": rope.original_max_position,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
        # Latent attention's is in what its scores are multiplied by.
        if not (architecture.latent and rope.mscale_all_dim):
            _, attention = frequencies(replace(rope, partial=1.0), 2)
            keys["rope.scaling.attn_factor"] = attention / yarn_attention(rope.factor)
    return keys


def _still(rope: RopeConfig, head_dim: int) -> tuple[float, ...]:
    """Those of a proportional embedding. Raises ConfigError for one that is scaled."""
    found = rope.divisors or (1.0,) * (head_dim // 2)
    if rope.scaling != "none" or set(found) - {1.0, math.inf}:
        raise ConfigError(f"positions are scaled, which files of this kind cannot say; {_ADVICE}")
    return tuple(min(each, STILL) for each in found)


def _divisors(rope: RopeConfig, head_dim: int) -> tuple[float, ...] | None:
    if rope.scaling != "llama3":
        return rope.divisors
    plain, _ = frequencies(RopeConfig(rope.theta, partial=rope.partial), head_dim)
    scaled, _ = frequencies(rope, head_dim)
    return tuple((plain / scaled).tolist())


# What is read of the model that a config.json describes, however it says it.
_TOLD: Mapping[str, Callable[[ModelConfig], int | float]] = {
    "block_count": lambda config: config.num_layers,
    "attention.key_length": lambda config: _attention(config).head_dim,
    SLIDING_SIZE: lambda config: _attention(config, sliding=True).head_dim,
    "attention.head_count_kv": lambda config: _attention(config).num_kv_heads,
    "attention.sliding_window": _window,
    "leading_dense_block_count": _dense_first,
    SHARED_WIDTH.gguf: lambda config: max(part.shared_width for part in config.feed_forward),
}
