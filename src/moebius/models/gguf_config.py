"""A GGUF file's keys as the config.json that they were made from.

As with config.json, whatever is not understood and could change the answer is refused: any key
under the architecture's name, unless it says that something is off. moebius.models.gguf_keys is the
way back.
"""

import math
import struct
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from moebius.errors import ConfigError, WeightsError
from moebius.files import short_name
from moebius.gguf import GgufModel, GgufTensor, Value
from moebius.gguf.types import QUANTIZATION_VERSION
from moebius.models.family import gguf_architectures, gguf_families, why_refused
from moebius.models.gemma_parts import turning_pairs
from moebius.models.gguf_architecture import SLIDING_WINDOW, GgufArchitecture, Key
from moebius.models.parts import FULL, SLIDING

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_DIVISORS = "rope_freqs.weight"
# Longrope's, of sequences up to the original context and of longer ones.
LONGROPE_DIVISORS = {
    "short_factor": "rope_factors_short.weight",
    "long_factor": "rope_factors_long.weight",
}
# The divisor of a pair that does not turn, in float32.
STILL = struct.unpack("<f", struct.pack("<f", 1e30))[0]
_HEAD_SIZE = "attention.key_length"
_ROUTERS = "blk.*.ffn_gate_inp.weight"

# Keys that change no logits here: what they say is told by others, or concerns other programs.
_TOLD_ELSEWHERE = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
# Keys without which an answer is the same as with these values.
_NEUTRAL: Mapping[str, tuple[Value, ...]] = {
    "attention.causal": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "interleave_moe_layer_step": (0, 1),
}
_OFF: tuple[Value, ...] = (0, "", [])
# Where keys have nothing to do with what the model computes.
_ELSEWHERE = ("general.", "tokenizer.", "split.", "quantize.", "imatrix.")
# Of a head.
_MOST_PAIRS = 2**12

_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "integer": ((int,), "an integer"),
    "number": ((int, float), "a number"),
    "flag": ((bool,), "true or false"),
}


class GgufConfig(NamedTuple):
    """What a GGUF file says of its model.

    config_json    as transformers would have it, with vocab_size and tie_word_embeddings told by
                   the tensors
    architecture   how the file has this family's models
    rope_divisors  of each pair's frequency; None for none
    ignored        keys that were not understood and change nothing
    """

    config_json: Mapping[str, Any]
    architecture: GgufArchitecture
    rope_divisors: tuple[float, ...] | None
    ignored: list[str]


class _Keys:
    """The keys under an architecture's name, which remembers those that were read."""

    def __init__(self, metadata: Mapping[str, Value], architecture: str, where: str) -> None:
        self._metadata = metadata
        self._before = f"{architecture}."
        self._where = where
        self._read: set[str] = set()

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self._where}: {message}")

    def wrong(self, key: str, message: str) -> ConfigError:
        """What is wrong with a key."""
        return self.error(f"{self._before}{key} {message}")

    def __contains__(self, key: str) -> bool:
        return self._before + key in self._metadata

    def get(self, key: str, default: Value) -> Value:
        """Of a list, one for each layer, what they all are."""
        self._read.add(key)
        value = self._metadata.get(self._before + key, default)
        if not isinstance(value, list):
            return value
        if not value or any(each != value[0] for each in value):
            raise self.wrong(key, "differs from layer to layer, which is not supported")
        return value[0]

    def listed(self, key: str) -> list[Any] | None:
        """A list as it is; None where there is none."""
        self._read.add(key)
        value = self._metadata.get(self._before + key)
        if value is not None and not isinstance(value, list):
            raise self.wrong(key, f"is {value!r}; it must be a list")
        return value

    def each(self, key: str, layers: int) -> list[int]:
        """An integer for each layer, where the file may have one for all."""
        found = self._metadata.get(self._before + key)
        self._read.add(key)
        given = found[:layers] if isinstance(found, list) else [found] * layers
        listed = [value for value in given if type(value) is int]
        if len(listed) != layers:
            raise self.wrong(key, f"is {found!r}; it must be an integer, or one for each layer")
        return listed

    def typed(self, key: Key) -> Any:
        """A key's value as config.json would have it. Raises ConfigError for another type."""
        value = self.get(key.gguf, 0)
        kinds, words = _KINDS[key.kind]
        good = isinstance(value, kinds) and isinstance(value, bool) == (key.kind == "flag")
        if not good:
            raise self.wrong(key.gguf, f"is {value!r}; it must be {words}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(key, f"is {value!r}; it must be a finite number")
        return float(value)

    def check(self, key: str, wanted: Value) -> None:
        """Raises ConfigError where a key is there and has another value."""
        value = self.get(key, wanted)
        unsaid = value == 0 and not isinstance(value, bool)
        if value != wanted and not unsaid:
            raise self.wrong(key, f"is {value!r}; only {wanted!r} is supported")

    def pass_over(self, beginning: str) -> None:
        """Keys that begin so mean nothing to this model, whatever the file says."""
        before = self._before
        ours = (key.removeprefix(before) for key in self._metadata if key.startswith(before))
        self._read.update(key for key in ours if key.startswith(beginning))

    def finish(self) -> list[str]:
        """The keys that were not read and change nothing.

        Raises ConfigError naming one that could change the answer.
        """
        ignored = []
        for key in self._metadata:
            own = key.removeprefix(self._before)
            if own == key:
                if not key.startswith(_ELSEWHERE):
                    ignored.append(key)
            elif own not in self._read and own not in _TOLD_ELSEWHERE:
                value = self._metadata[key]
                if value not in _NEUTRAL.get(own, _OFF):
                    raise self.error(
                        f"{key} = {value!r} is not supported; the model would not compute what it "
                        "was trained for"
                    )
        return ignored


def gguf_config(model: GgufModel) -> GgufConfig:
    """Raises ConfigError naming the file and the key that is wrong, or is not supported, and
    WeightsError for a file without an embedding."""
    where = short_name(model.files[0].path)
    model_type, architecture = _family(model, where)
    keys = _Keys(model.metadata, architecture.name, where)
    config = {"model_type": model_type, **architecture.fixed}
    # Layers that predict further tokens stand behind the model's own, and are counted with them.
    predicting = keys.typed(Key("", "nextn_predict_layers"))
    for key in architecture.keys:
        try:
            config[key.config] = _value(keys, key, config)
        except KeyError:
            raise keys.wrong(key.gguf, "is missing") from None
        if key.gguf == "block_count":
            config[key.config] -= predicting
    config.pop("", None)
    _check_counts(keys, model)
    for flag, tensor in architecture.present.items():
        config[flag] = tensor in model.tensors
    for name, wanted in architecture.values.items():
        keys.check(name, wanted)
    size = next((config[key.config] for key in architecture.keys if key.gguf == _HEAD_SIZE), 0)
    if not architecture.latent:
        _read_heads(keys, config, architecture, size)
    config |= architecture.read(keys, config)
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    config |= architecture.told(shapes, config)
    divisors = None
    if architecture.ropes != "none":
        divisors = _read_positions(keys, config, architecture, model, size)
    config["vocab_size"] = _embedding(model, where).shape[0]
    config["tie_word_embeddings"] = HEAD not in model.tensors
    return GgufConfig(config, architecture, divisors, keys.finish())


def _read_positions(
    keys: _Keys,
    config: dict[str, Any],
    architecture: GgufArchitecture,
    model: GgufModel,
    size: int,
) -> tuple[float, ...] | None:
    """config.json's keys of rotary embeddings, of heads of this size; returns the divisors of
    their frequencies that config.json has no key for."""
    where = short_name(model.files[0].path)
    scaling = _longrope(keys, config, model, where)
    scaling = scaling or _rope_scaling(keys, config, truncate=architecture.truncates)
    config["rope_scaling"] = {**scaling, **config.get("rope_scaling", {})}
    if architecture.ropes == "each":
        config["rope_parameters"] = _ropes(keys, config, architecture)
    divisors = _rope_divisors(model, where)
    if not architecture.proportional:
        return divisors
    config["rope_parameters"][FULL] |= _proportional(divisors, size, where)
    return None


def _read_heads(
    keys: _Keys, config: dict[str, Any], architecture: GgufArchitecture, size: int
) -> None:
    """How much of each head turns; values are heads of the same size."""
    if architecture.ropes == "none":
        keys.pass_over("rope.")
    elif architecture.partial:
        turning = keys.number("rope.dimension_count", size)
        config["partial_rotary_factor"] = turning / max(size, 1)
    else:
        keys.check("rope.dimension_count", size)
    keys.check("attention.value_length", size)


def _value(keys: _Keys, key: Key, config: Mapping[str, Any]) -> Any:
    """What config.json would have. Raises KeyError for a key that is missing."""
    if key.gguf not in keys:
        return key.absent(config)
    if key.kind != "sliding":
        value = keys.typed(key)
        return value or None if key is SLIDING_WINDOW else value
    layers = config["num_hidden_layers"]
    each = (keys.listed(key.gguf) or [])[:layers]
    if len(each) != layers or not all(isinstance(slides, bool) for slides in each):
        raise keys.wrong(key.gguf, "must be a list of true and false, one for each layer")
    return [SLIDING if slides else FULL for slides in each]


def _ropes(keys: _Keys, config: dict[str, Any], architecture: GgufArchitecture) -> dict[str, Any]:
    """config.json's rope_parameters of each kind of layer; what scales positions is full
    attention's."""
    theta = config.pop("rope_theta")
    usual = architecture.sliding_theta or theta
    full = {**config.pop("rope_scaling"), "rope_theta": theta}
    slides = {"rope_theta": keys.number("rope.freq_base_swa", usual)}
    size = config["head_dim"]
    if architecture.partial:
        full["partial_rotary_factor"] = config.pop("partial_rotary_factor")
        turning = keys.number("rope.dimension_count_swa", size)
        slides["partial_rotary_factor"] = turning / max(size, 1)
    else:
        keys.check("rope.dimension_count_swa", size)
    return {FULL: full, SLIDING: slides}


def _proportional(
    divisors: tuple[float, ...] | None, head_dim: int, where: str
) -> dict[str, float | str]:
    """Entries of the rope of full attention, whose slow pairs do not turn: their divisors are
    beyond all others."""
    pairs = head_dim // 2
    turning = pairs
    if divisors is not None:
        turning = sum(each < STILL for each in divisors)
        if tuple(map(float, divisors)) != (1.0,) * turning + (STILL,) * (pairs - turning):
            raise ConfigError(
                f"{where}: {ROPE_DIVISORS} must be 1 for pairs that turn, and {STILL:g} for those "
                f"behind, {pairs} in all"
            )
    partial = 2 * turning / max(head_dim, 1)
    if turning_pairs(partial, head_dim) != turning:  # by a rounding
        partial = (2 * turning + 1) / head_dim
    return {"rope_type": "proportional", "partial_rotary_factor": partial}


def _check_counts(keys: _Keys, model: GgufModel) -> None:
    """Raises ConfigError for more layers or experts than there can be tensors of: what follows
    takes time by their number."""
    for key in ("block_count", "decoder_block_count"):
        layers = keys.get(key, 0) if key in keys else 0
        if isinstance(layers, int) and layers > len(model.tensors):
            raise keys.wrong(key, f"is {layers}, in a file of {len(model.tensors)} tensors")
    experts = keys.get("expert_count", 0)
    routers = {
        tensor.shape[0]
        for name, tensor in model.tensors.items()
        if fnmatchcase(name, _ROUTERS) and len(tensor.shape) == 2
    }
    if routers and routers != {experts}:
        raise keys.wrong("expert_count", f"is {experts}, but routers are of {sorted(routers)}")
    if experts and not routers:
        raise keys.wrong("expert_count", f"is {experts}, but there is no router ({_ROUTERS})")


def _family(model: GgufModel, where: str) -> tuple[str, GgufArchitecture]:
    """The model_type whose models the file holds, and how it holds them."""
    metadata = model.metadata
    name = metadata.get("general.architecture")
    found = gguf_families(name) if isinstance(name, str) else []
    if not found:
        raise ConfigError(
            f"{where}: general.architecture {name!r} is not supported{why_refused(str(name))}; "
            f"supported are {', '.join(gguf_architectures())}"
        )
    version = metadata.get("general.quantization_version", QUANTIZATION_VERSION)
    if version != QUANTIZATION_VERSION:
        raise ConfigError(
            f"{where}: general.quantization_version is {version!r}; only the blocks of version "
            f"{QUANTIZATION_VERSION} can be read: convert the model again with today's llama.cpp"
        )
    sparse = bool(metadata.get(f"{name}.expert_count"))
    marked: list[tuple[str, GgufArchitecture]] = []
    plain: list[tuple[str, GgufArchitecture]] = []
    # Of those that a file does not tell apart, the one that the architecture has its name from.
    for model_type, each in sorted(found, key=lambda entry: entry[0] != name):
        if each.sparse not in (None, sparse) and len(found) > 1:
            continue
        if not (each.marked or each.marks or each.holding):
            plain.append((model_type, each))
        elif _is_marked(each, model):
            marked.append((model_type, each))
    for told in (*marked, *plain):
        return told
    raise ConfigError(f"{where}: {name} with {'' if sparse else 'no '}experts is not supported")


def _is_marked(architecture: GgufArchitecture, model: GgufModel) -> bool:
    """Whether the file is of this kind, by its keys or by its tensors."""
    if architecture.holding:
        return any(fnmatchcase(tensor, architecture.holding) for tensor in model.tensors)
    if architecture.marks is not None:
        return architecture.marks(model.metadata)
    return bool(model.metadata.get(f"{architecture.name}.{architecture.marked}"))


def _rope_scaling(keys: _Keys, config: Mapping[str, Any], *, truncate: bool) -> dict[str, Any]:
    """config.json's object of that name."""
    context = config["max_position_embeddings"]
    original = keys.get("rope.scaling.original_context_length", context)
    kind = keys.get("rope.scaling.type", "linear")
    # An older name of the same.
    older = keys.number("rope.scale_linear", 0.0)
    factor = keys.number("rope.scaling.factor", older) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        words = f"is {kind!r}; none, linear and yarn are supported"
        raise keys.wrong("rope.scaling.type", words)
    keys.check("rope.scaling.yarn_ext_factor", 1.0)
    # What the converter writes is all of it; what llama.cpp reads is beside yarn's own.
    beside = keys.number("rope.scaling.attn_factor", 1.0)
    attention = keys.number("rope.scaling.yarn_attn_factor", beside * yarn_attention(factor))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": attention,
        "truncate": truncate,
    }


def _longrope(keys: _Keys, config: dict[str, Any], model: GgufModel, where: str) -> dict[str, Any]:
    """config.json's object of that name, and beside it the original context; empty without."""
    if not any(name in model.tensors for name in LONGROPE_DIVISORS.values()):
        return {}
    if keys.get("rope.scaling.type", "longrope") != "longrope":
        raise keys.wrong("rope.scaling.type", "is another than longrope, whose tensors are there")
    context = config["max_position_embeddings"]
    original = keys.get("rope.scaling.original_context_length", context)
    config["original_max_position_embeddings"] = original
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    if "rope.scaling.attn_factor" in keys:
        scaling["attention_factor"] = keys.number("rope.scaling.attn_factor", 1.0)
    for key, name in LONGROPE_DIVISORS.items():
        found = _divisors(model, name, where)
        if found is None:
            raise WeightsError(f"{where}: {name} is missing")
        scaling[key] = list(found)
    return scaling


def yarn_attention(factor: float) -> float:
    """What yarn multiplies cos and sin by (arXiv 2309.00071), where nothing else is said."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _embedding(model: GgufModel, where: str) -> GgufTensor:
    embedding = model.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{where}: the matrix {EMBEDDING} is missing")
    return embedding


def _rope_divisors(model: GgufModel, where: str) -> tuple[float, ...] | None:
    """The values of the tensor that divides the frequencies of all layers; none where all are 1."""
    found = _divisors(model, ROPE_DIVISORS, where)
    return None if found is None or set(found) == {1.0} else found


def _divisors(model: GgufModel, name: str, where: str) -> tuple[float, ...] | None:
    """The values of a tensor of divisors; None where there is none."""
    tensor = model.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > _MOST_PAIRS:
        raise WeightsError(f"{where}: {name} must be a vector of F32")
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            content = file.read(tensor.stop - tensor.start)
        found = struct.unpack(f"<{tensor.shape[0]}f", content)
    except (OSError, struct.error) as cause:
        raise WeightsError(f"{where}: {name} cannot be read: {cause}") from None
    if not all(0 < each < math.inf for each in found):
        raise WeightsError(f"{where}: {name} must hold positive finite numbers")
    return found
