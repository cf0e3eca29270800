"""What a model's files say of it beside its tensors: a directory's config.json, a GGUF file's keys.

Wherever a model is named by a path, it is one of the two: see `is_gguf`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moebius.files import read_json
from moebius.gguf import GgufModel, is_gguf, open_gguf
from moebius.models.config import ModelConfig
from moebius.models.family import Told, family, nothing_told, read_config
from moebius.models.gguf_config import LONGROPE_DIVISORS, ROPE_DIVISORS, gguf_config
from moebius.models.layout import Layout, switched
from moebius.models.quantization import Quantization, quantization_beside
from moebius.nn.attention import GQA
from moebius.nn.rope import RopeConfig

# What files of 2023 hold, and llama.cpp no longer reads.
_GGUF_UNUSED = (ROPE_DIVISORS, *LONGROPE_DIVISORS.values(), "blk.*.attn_rot_embd.weight")


class Description(NamedTuple):
    """A model as its files describe it.

    config_json   as transformers would have it
    layouts       what its tensors may be called
    unused        patterns of tensors that do not belong to the model
    ignored       keys that change nothing, and that no model of this type reads
    quantization  how a directory's matrices are stored; None for plain numbers, and in a GGUF file,
                  which says it of each tensor
    told          what the names of the tensors tell of the model
    spare         patterns of tensors that may be left over
    """

    config_json: Mapping[str, Any]
    config: ModelConfig
    layouts: tuple[Layout, ...]
    unused: tuple[str, ...]
    ignored: Sequence[str]
    quantization: Quantization | None = None
    told: Told = nothing_told
    spare: tuple[str, ...] = ()


def describe(path: Path) -> Description:
    """Raises ConfigError naming the file and the key that is wrong, or is not supported, and
    WeightsError for a GGUF file that is damaged."""
    return describe_gguf(open_gguf(path)) if is_gguf(path) else describe_directory(path)


def describe_directory(directory: Path) -> Description:
    """By its config.json."""
    config_json = read_json(directory / "config.json")
    config, ignored, _, quantization = read_config(config_json)
    quantization = quantization or quantization_beside(directory)
    found = family(config.model_type)
    layouts = found.layouts
    if quantization is not None and quantization.method == "mlx":
        layouts += tuple(filter(None, map(switched, layouts)))
    return Description(
        config_json,
        config,
        layouts,
        found.unused,
        ignored,
        quantization,
        found.told,
        found.spare,
    )


def describe_gguf(model: GgufModel) -> Description:
    """By its keys."""
    name = model.files[0].path.name
    found = gguf_config(model)
    config = found.architecture.held_config(read_config(found.config_json, name).config)
    layers = []
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, GQA) and mixer.rope is not None:
            rope = _as_stored(mixer.rope, found.rope_divisors, found.architecture.permuted)
            layer = replace(layer, mixer=replace(mixer, rope=rope))
        layers.append(layer)
    config = replace(config, layers=tuple(layers))
    layouts = found.architecture.layouts
    unused = (*_GGUF_UNUSED, *found.architecture.unused)
    return Description(found.config_json, config, layouts, unused, found.ignored)


def _as_stored(rope: RopeConfig, divisors: tuple[float, ...] | None, permuted: bool) -> RopeConfig:
    """Queries and keys turn as their rows lie in the file: nothing is put into another order."""
    divisors = divisors or rope.divisors
    return replace(rope, divisors=divisors, interleaved=permuted or rope.interleaved)
