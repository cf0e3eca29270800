"""Reading a config.json: what decides is what transformers' class for the model_type makes of it.

A key that its model reads is either computed here as well, or has to have the value that leaves the
model as it is; any other value is an error, for the model would not compute what it was trained
for. A key that its model does not read changes nothing. One that is absent has the default of its
configuration class, because checkpoints were saved without keys that equal it. Which is which
stands in config_keys.json, made from transformers' sources. Configurations of transformers 4 and 5
are both read.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius.config import Activation, FeedForwardConfig, ModelConfig, RopeConfig
from moebius.errors import require
from moebius.files import package_table, read_json

_TABLE = package_table("models/keys.toml")
_HARMLESS = frozenset(_TABLE["harmless"])
_ACTIVATIONS: dict[str, Activation] = _TABLE["activations"]
_READ_BY_TRANSFORMERS = read_json(Path(__file__).with_name("config_keys.json"))
_LAYER_TYPES = {"attention": "full_attention"}
"""What transformers 4 called them."""


@dataclass(frozen=True)
class Keys:
    """What the keys of one kind of object mean.

    read        each key that counts, with what its absence means
    never_null  keys for which null is no value; elsewhere it is one of its own, which None stands
                for
    aliases     other names of keys
    closed      no other key is known, and an unknown one may count
    """

    read: Mapping[str, Any]
    never_null: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    closed: bool = False

    @classmethod
    def of_transformers(cls, model_type: str) -> "Keys":
        """Those of a model_type that transformers knows."""
        entry = _READ_BY_TRANSFORMERS["model_types"][model_type]
        return cls(entry["read"], frozenset(entry["never_null"]), entry["aliases"])


@dataclass
class ConfigReader:
    """The keys of one config.json, or of an object in it, remembering which were computed.

    `where` begins every error. `ignored` collects what changes nothing and is worth a line.
    """

    raw: Mapping[str, Any]
    keys: Keys
    where: str = "config.json: "
    computed: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        raw: dict[str, Any] = {}
        for key, value in self.raw.items():
            name = self.keys.aliases.get(key, key)
            same = raw.get(name) is None or value is None or raw[name] == value
            require(
                same,
                f"{self.where}{name} is {raw.get(name)!r} and, by its other name, {value!r}; keep "
                "one",
            )
            raw[name] = raw.get(name) if value is None else value
        self.raw = raw

    def get(self, key: str) -> Any:
        """The key's value; where it is absent, what its absence means."""
        self.computed.add(key)
        if key not in self.raw:
            return self.keys.read.get(key)
        value = self.raw[key]
        meant = self.keys.read.get(key)
        null = value is None and key in self.keys.never_null
        require(
            not null,
            f"{self.where}{key} is null; leave it out for its default of {meant!r}, or give a "
            "value",
        )
        return value

    def _checked(self, key: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.get(key)
        value = default if value is None else value
        how = "null" if key in self.raw else "missing"
        require(value is not None, f"{self.where}{key} is {how}; it must be {wanted}")
        good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        require(good, f"{self.where}{key} is {value!r}; it must be {wanted}")
        return value

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        """`default` is what null means, or what absence does where the class leaves it open."""
        wanted = f"an integer of at least {low}"
        value: int = self._checked(key, default, (int,), wanted)
        require(value >= low, f"{self.where}{key} is {value}; it must be {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._checked(key, default, (int, float), "a number")
        # An integer may be too long for any float.
        finite = abs(value) <= sys.float_info.max
        require(finite, f"{self.where}{key} is {value}; it must be a finite number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self._checked(key, default, (bool,), "true or false"))

    def indices(self, key: str) -> tuple[int, ...]:
        wanted = "a list of layer numbers"
        value = self._checked(key, [], (list,), wanted)
        require(
            all(type(i) is int for i in value),
            f"{self.where}{key} is {value!r}; it must be {wanted}",
        )
        return tuple(value)

    @property
    def num_layers(self) -> int:
        return self.integer("num_hidden_layers")

    def activation(self) -> Activation:
        name = self.get("hidden_act")
        known = isinstance(name, str) and name in _ACTIVATIONS
        require(
            known, f"config.json: hidden_act is {name!r}; supported are {', '.join(_ACTIVATIONS)}"
        )
        return _ACTIVATIONS[name]

    def layer_types(self) -> Sequence[str] | None:
        """One of full_attention and sliding_attention a layer, None where the key is absent."""
        value = self.get("layer_types")
        if value is None:
            return None
        known = ("full_attention", "sliding_attention")
        types = (
            [_LAYER_TYPES.get(v, v) if isinstance(v, str) else v for v in value]
            if isinstance(value, list)
            else []
        )
        good = len(types) == self.num_layers and all(v in known for v in types)
        require(
            good, f"config.json: layer_types must name one of {', '.join(known)} for each layer"
        )
        return types

    def finish(self) -> None:
        """Sort out the keys that were not computed. Raises ConfigError naming one that counts."""
        model = f" for model_type {self.raw['model_type']!r}" if "model_type" in self.raw else ""
        for key, value in self.raw.items():
            default = self.keys.read.get(key)
            if key in self.computed or key in _HARMLESS or (value is None and default is None):
                continue
            counts = self.keys.closed or key in self.keys.read
            neutral = value in ([], {}) or value == default
            require(
                not counts or neutral,
                f"{self.where}{key} = {value!r} is not supported{model}; the model would not "
                "compute what it was trained for",
            )
            if not counts and not key.startswith("_"):
                self.ignored.append(key)

    def rope(self, max_position: int) -> RopeConfig:
        """rope_theta and rope_scaling (transformers 4) or rope_parameters (5); rope_scaling wins as
        it does there."""
        old, new = self.get("rope_scaling"), self.get("rope_parameters")
        name, given = ("rope_scaling", old) if old else ("rope_parameters", new or {})
        require(isinstance(given, dict), f"config.json: {name} is {given!r}; it must be an object")
        kind = given.get("rope_type", given.get("type", "default"))
        require(
            kind not in ("dynamic", "longrope", "su"),
            f"config.json: rope type {kind!r} is not supported: its frequencies depend on the "
            "longest sequence in the batch, so a request's answer would depend on its neighbours; "
            "linear, llama3 and yarn are supported",
        )
        read = _READ_BY_TRANSFORMERS["rope"]
        known = isinstance(kind, str) and kind in read
        require(
            known, f"config.json: rope type {kind!r} is unknown; {', '.join(read)} are supported"
        )
        rope = ConfigReader(
            given, Keys(dict.fromkeys(read[kind])), f"config.json: {name} of type {kind}: "
        )
        rope.computed |= {"rope_type", "type"}
        nested = [key for key, value in given.items() if isinstance(value, Mapping)]
        require(
            not nested,
            f"{rope.where}{nested} are objects; all layers of this type have the same frequencies",
        )
        self._check_partial(rope)
        key = "original_max_position_embeddings"
        original = self.integer(key, rope.integer(key, max_position))
        theta = rope.number("rope_theta", self.number("rope_theta"))
        config = _rope_config(kind, rope, theta, original, max_position)
        rope.finish()
        self.ignored += [f"{name}.{ignored}" for ignored in rope.ignored]
        return config

    def _check_partial(self, rope: "ConfigReader") -> None:
        """Heads are turned as a whole; not every type of frequencies reads which part of them is to
        be."""
        key = "partial_rotary_factor"
        everywhere = self.number(key, 1.0)
        if key in rope.keys.read:
            partial = rope.number(key, everywhere)
            require(partial == 1.0, f"{rope.where}{key} is {partial}; only 1 is supported")
        elif everywhere != 1.0:
            self.ignored.append(key)


def _rope_config(
    kind: str, rope: ConfigReader, theta: float, original: int, max_position: int
) -> RopeConfig:
    if kind == "linear":
        return RopeConfig(theta, "linear", rope.number("factor"), original)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        require(
            low < high,
            f"config.json: rope low_freq_factor = {low} must be less than high_freq_factor = "
            f"{high}",
        )
        return RopeConfig(theta, "llama3", rope.number("factor"), original, low, high)
    if kind == "yarn":
        return RopeConfig(
            theta,
            "yarn",
            rope.number("factor", max_position / original),
            original,
            beta_fast=rope.number("beta_fast", 32.0) or 32.0,
            beta_slow=rope.number("beta_slow", 1.0) or 1.0,
            attention_factor=rope.optional_number("attention_factor"),
            mscale=rope.optional_number("mscale"),
            mscale_all_dim=rope.optional_number("mscale_all_dim"),
            # Null is false here.
            truncate=rope.flag("truncate", "truncate" not in rope.raw),
        )
    return RopeConfig(theta)


def sliding_windows(reader: ConfigReader, default_types: Sequence[str]) -> tuple[int | None, ...]:
    """Windows of the Qwen family: on with use_sliding_window, in the layers that layer_types (or
    its default) name."""
    types = reader.layer_types() or default_types
    if not slides(reader):
        off = "sliding_attention" not in types
        require(
            off, "config.json: layer_types has sliding_attention, but use_sliding_window is off"
        )
        return (None,) * len(types)
    window = reader.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def slides(reader: ConfigReader) -> bool:
    """Whether the Qwen family's sliding window is on."""
    window, used = reader.get("sliding_window"), reader.flag("use_sliding_window")
    return used and window is not None


def upper_layers_slide(reader: ConfigReader) -> list[str]:
    """layer_types of the dense Qwen models where it is absent: layers from max_window_layers on
    have a window."""
    full, used = reader.integer("max_window_layers", low=0), slides(reader)
    return [
        "sliding_attention" if used and i >= full else "full_attention"
        for i in range(reader.num_layers)
    ]


def sparse_layers(reader: ConfigReader) -> list[bool]:
    """Which layers have experts in the Qwen family: every decoder_sparse_step-th, but for
    mlp_only_layers."""
    step, dense = reader.integer("decoder_sparse_step"), reader.indices("mlp_only_layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(reader.num_layers)]


def decoder(
    reader: ConfigReader,
    feed_forward: FeedForwardConfig | Sequence[FeedForwardConfig],
    *,
    windows: int | Sequence[int | None] | None = None,
    **different: Any,
) -> ModelConfig:
    """What every supported architecture spells alike, and what is different about this one.

    feed_forward and windows are one for all layers, or one each.
    """
    heads, hidden, layers = (
        reader.integer("num_attention_heads"),
        reader.integer("hidden_size"),
        reader.num_layers,
    )
    require(
        reader.get("head_dim") is not None or hidden % heads == 0,
        f"config.json: hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; "
        "give head_dim",
    )
    max_position = reader.integer("max_position_embeddings")
    quantized = reader.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    require(
        not quantized,
        f"config.json: quantization_config of method {method!r} is not supported; use the "
        "checkpoint in bfloat16, float16 or float32",
    )
    every = tuple(windows) if isinstance(windows, Sequence) else (windows,) * layers
    types = reader.layer_types() or [
        "full_attention" if window is None else "sliding_attention" for window in every
    ]
    for i, (kind, window) in enumerate(zip(types, every, strict=True)):
        has = "no sliding window" if window is None else f"a sliding window of {window}"
        agree = (kind == "sliding_attention") == (window is not None)
        require(
            agree,
            f"config.json: layer_types[{i}] is {kind}, but the other keys give the layer {has}",
        )
    return ModelConfig(
        model_type=reader.get("model_type"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads),
        head_dim=reader.integer("head_dim", hidden // heads),
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=max_position,
        rope=reader.rope(max_position),
        norm_eps=reader.number("rms_norm_eps"),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        feed_forward=tuple(feed_forward)
        if isinstance(feed_forward, Sequence)
        else (feed_forward,) * layers,
        windows=every,
        **different,
    )
