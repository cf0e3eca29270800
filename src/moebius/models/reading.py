"""Reading a config.json: what is used is read, what is known to be harmless may stay, anything else is an error.

Configurations of transformers 4 and 5 are both read. A key that is absent has the default of transformers'
configuration class, because checkpoints were saved without keys that equal it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moebius.config import Activation, FeedForwardConfig, ModelConfig, RopeConfig, package_table, require

_TABLE = package_table("models/keys.toml")
_HARMLESS, _ROPE_KEYS = frozenset(_TABLE["harmless"]), frozenset(_TABLE["rope"])
_ACTIVATIONS: dict[str, Activation] = _TABLE["activations"]
# A value that switches nothing on: a key we do not know that carries it changes nothing.
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


@dataclass
class ConfigReader:
    """The keys of one config.json, or of an object in it, remembering which were read.

    `where` begins every error; keys in `harmless` may stay unread.
    """

    raw: Mapping[str, Any]
    where: str = "config.json: "
    harmless: frozenset[str] = _HARMLESS
    read: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value, or the default where it is absent or null."""
        self.read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, which some configurations tell from absent."""
        return key in self.raw and self.raw[key] is None

    def _checked(self, key: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.get(key, default)
        require(value is not None, f"{self.where}{key} is missing; it must be {wanted}")
        good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        require(good, f"{self.where}{key} is {value!r}; it must be {wanted}")
        return value

    def integer(self, key: str, default: int | None = None, low: int = 1) -> int:
        wanted = f"an integer of at least {low}"
        value: int = self._checked(key, default, (int,), wanted)
        require(value >= low, f"{self.where}{key} is {value}; it must be {wanted}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._checked(key, default, (int, float), "a number"))

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._checked(key, default, (bool,), "true or false"))

    def indices(self, key: str) -> tuple[int, ...]:
        wanted = "a list of layer numbers"
        value = self._checked(key, [], (list,), wanted)
        require(all(type(i) is int for i in value), f"{self.where}{key} is {value!r}; it must be {wanted}")
        return tuple(value)

    @property
    def num_layers(self) -> int:
        return self.integer("num_hidden_layers")

    def num_experts(self) -> int:
        """Checkpoints of one architecture say num_experts or num_local_experts, by transformers' version."""
        keys = [key for key in ("num_local_experts", "n_routed_experts") if self.get(key) is not None]
        return self.integer(keys[0] if keys else "num_experts")

    def default(self, key: str, value: Any) -> None:
        """Give an absent (not a null) key the value that this architecture's class has."""
        if key not in self.raw:
            self.raw = {**self.raw, key: value}

    def activation(self) -> Activation:
        name = self.get("hidden_act", "silu")
        require(name in _ACTIVATIONS, f"config.json: hidden_act is {name!r}; supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def layer_types(self) -> Sequence[str] | None:
        """One of full_attention and sliding_attention a layer, None where the key is absent."""
        value: list[str] | None = self.get("layer_types")
        known = ("full_attention", "sliding_attention")
        if value is not None:
            good = isinstance(value, list) and len(value) == self.num_layers and all(v in known for v in value)
            require(good, f"config.json: layer_types must name one of {', '.join(known)} for each layer")
        return value

    def finish(self) -> None:
        """Raises ConfigError naming a key that nobody read and that may matter."""
        model = f" for model_type {self.raw['model_type']!r}" if "model_type" in self.raw else ""
        for key, value in self.raw.items():
            known = key in self.read or key in self.harmless or key.startswith("_") or key.endswith("_version")
            require(
                known or value in _OFF,
                f"{self.where}{key} = {value!r} is not supported{model}; "
                "the model would not compute what it was trained for",
            )

    def rope(self, default_theta: float, max_position: int) -> RopeConfig:
        """rope_theta and rope_scaling (transformers 4) or rope_parameters (5); rope_scaling wins as it does there."""
        theta = self.number("rope_theta", default_theta)
        old, new = self.get("rope_scaling"), self.get("rope_parameters")
        name, given = ("rope_scaling", old) if old else ("rope_parameters", new or {})
        require(isinstance(given, dict), f"config.json: {name} is {given!r}; it must be an object")
        kind = given.get("rope_type", given.get("type", "default"))
        require(
            kind not in ("dynamic", "longrope", "su"),
            f"config.json: rope type {kind!r} is not supported: its frequencies depend on the longest sequence in "
            "the batch, so a request's answer would depend on its neighbours; linear, llama3 and yarn are supported",
        )
        known = ("default", "linear", "llama3", "yarn")
        require(kind in known, f"config.json: rope type {kind!r} is unknown; {', '.join(known)} are supported")
        rope = ConfigReader(given, f"config.json: {name} of type {kind}: ", _ROPE_KEYS)
        rope.finish()
        partial = rope.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        require(partial == 1.0, "config.json: partial_rotary_factor is not 1, which this model_type does not know")
        key = "original_max_position_embeddings"
        original = self.integer(key, rope.integer(key, max_position))
        return _rope_config(kind, rope, rope.number("rope_theta", theta), original, max_position)


def _rope_config(kind: str, rope: ConfigReader, theta: float, original: int, max_position: int) -> RopeConfig:
    if kind == "linear":
        return RopeConfig(theta, "linear", rope.number("factor"), original)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        require(low < high, f"config.json: rope low_freq_factor = {low} must be less than high_freq_factor = {high}")
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
            truncate=rope.flag("truncate", True),
        )
    return RopeConfig(theta)


def sliding_windows(reader: ConfigReader, default_types: Sequence[str]) -> tuple[int | None, ...]:
    """Windows of the Qwen family: on with use_sliding_window, in the layers that layer_types (or its default) name."""
    types = reader.layer_types() or default_types
    if not _slides(reader):
        reader.get("sliding_window")
        off = "sliding_attention" not in types
        require(off, "config.json: layer_types has sliding_attention, but use_sliding_window is off")
        return (None,) * len(types)
    window = reader.integer("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _slides(reader: ConfigReader) -> bool:
    return reader.flag("use_sliding_window", False) and not reader.is_null("sliding_window")


def upper_layers_slide(reader: ConfigReader) -> list[str]:
    """layer_types of the dense Qwen models where it is absent: layers from max_window_layers on have a window."""
    full, used = reader.integer("max_window_layers", 28, low=0), _slides(reader)
    return ["sliding_attention" if used and i >= full else "full_attention" for i in range(reader.num_layers)]


def sparse_layers(reader: ConfigReader) -> list[bool]:
    """Which layers have experts in the Qwen family: every decoder_sparse_step-th, but for mlp_only_layers."""
    step, dense = reader.integer("decoder_sparse_step", 1), reader.indices("mlp_only_layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(reader.num_layers)]


def decoder(
    reader: ConfigReader,
    feed_forward: FeedForwardConfig | Sequence[FeedForwardConfig],
    *,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    windows: int | Sequence[int | None] | None = None,
    **different: Any,
) -> ModelConfig:
    """What every supported architecture spells alike, and what is different about this one.

    feed_forward and windows are one for all layers, or one each. theta and eps are defaults of keys that are absent.
    """
    heads, hidden, layers = reader.integer("num_attention_heads"), reader.integer("hidden_size"), reader.num_layers
    require(
        reader.get("head_dim") is not None or hidden % heads == 0,
        f"config.json: hidden_size = {hidden} is no multiple of num_attention_heads = {heads}; give head_dim",
    )
    max_position = reader.integer("max_position_embeddings")
    quantization = reader.get("quantization_config", {})
    require(
        not quantization,
        f"config.json: quantization_config of method {dict(quantization).get('quant_method')!r} is not supported; "
        "use the checkpoint in bfloat16, float16 or float32",
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
        rope=reader.rope(theta, max_position),
        norm_eps=reader.number("rms_norm_eps", eps),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        feed_forward=tuple(feed_forward) if isinstance(feed_forward, Sequence) else (feed_forward,) * layers,
        windows=tuple(windows) if isinstance(windows, Sequence) else (windows,) * layers,
        **different,
    )
