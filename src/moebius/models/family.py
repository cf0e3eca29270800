"""The supported architectures: one module each in moebius.models.families, named after its
model_type.

Such a module declares FAMILY, a Family or, for a model that is more than one of language, a Nested.
Nothing else lists it: which there are is what the directory holds,
and only the one that a model asks for is imported.
"""

import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from moebius.errors import ConfigError
from moebius.files import package_table
from moebius.models import families
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import GgufArchitecture
from moebius.models.layout import Layout
from moebius.models.quantization import Quantization, read_quantization
from moebius.models.quantization.read import KEYS as QUANTIZATION_KEYS
from moebius.models.reading import HARMLESS, ConfigReader, Keys

_REFUSED: Mapping[str, str] = package_table("models/keys.toml")["refused"]
# Keys of a config.json that describe what sees.
_SEEING = ("vision_config", "vision_tower", "mm_vision_tower")
# Keys that a file has one of, for the language model as for the rest.
_OF_THE_WHOLE = ("tie_word_embeddings", *sorted(QUANTIZATION_KEYS))


Told = Callable[[ModelConfig, Collection[str]], ModelConfig]


def nothing_told(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """For `Family.told`: config.json says all."""
    return config


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    read      config.json to ModelConfig
    layouts   how its checkpoints name their tensors, the published one first
    unused    patterns of tensors that checkpoints hold and this model does not, such as "mtp.*"
    spare     patterns of tensors that some layers have and others hold for nothing
    keys      what the keys of config.json mean, where transformers does not say it: the table
              beside a module, of its name, was made from transformers' sources
    gguf      how llama.cpp's files have its models, in each way that there is: under one name or
              several, told apart as GgufArchitecture says; the first that fits is written
    told      the model as the names of its checkpoint's tensors tell it, where config.json does not
    """

    read: Callable[[ConfigReader], ModelConfig]
    layouts: tuple[Layout, ...] = (Layout(),)
    unused: tuple[str, ...] = ()
    keys: Keys | None = None
    gguf: tuple[GgufArchitecture, ...] = ()
    told: Told = nothing_told
    spare: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Nested:
    """A model_type whose config.json describes a language model in an object; all else is left out.

    model_type   the language model's
    key          the object
    """

    model_type: str
    key: str = "text_config"

    def language_model(self, whole: Mapping[str, Any], where: str) -> ConfigReader:
        """Of the language model's keys; what the file has one of stands beside its object."""
        given = whole.get(self.key)
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}: {self.key} is {given!r}; it must be an object")
        kind = given.get("model_type", self.model_type)
        if kind != self.model_type:
            raise ConfigError(
                f"{where}: {self.key}.model_type is {kind!r}; it must be {self.model_type!r}"
            )
        shared = {key: whole[key] for key in _OF_THE_WHOLE if key in whole}
        raw = {**given, **shared, "model_type": kind}
        reader = config_reader(raw, f"{where}: {self.key}")
        reader.ignored += sorted(whole.keys() - HARMLESS - shared.keys() - {self.key})
        return reader


class ConfigReading(NamedTuple):
    """What a config.json says.

    ignored   keys that no model of this type reads, so that they change nothing
    assumed   keys that count and are absent, so that they have the default of transformers' class
    quantization   how the checkpoint's matrices are stored; None for plain numbers
    """

    config: ModelConfig
    ignored: Sequence[str]
    assumed: Sequence[str]
    quantization: Quantization | None


def model_types() -> tuple[str, ...]:
    """Those that are supported, in alphabetical order."""
    return _modules_in(tuple(families.__path__))


@cache
def _modules_in(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders)))


def family(model_type: object) -> Family:
    """That of a model's language model. Raises ConfigError where config.json's model_type is none
    of the supported ones."""
    declared, _ = _declared(model_type)
    return family(declared.model_type) if isinstance(declared, Nested) else declared


def _declared(
    model_type: object, config_json: Mapping[str, Any] | None = None
) -> tuple[Family | Nested, Path]:
    """What is declared for a model_type, and in which file; config_json tells why not, if so."""
    known = model_types()
    if model_type not in known:
        sees = any(key in (config_json or {}) for key in _SEEING)
        why = why_refused(str(model_type)) or (why_refused("images") if sees else "")
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported{why}; supported are "
            f"{', '.join(known)}"
        )
    module = import_module(f"{families.__name__}.{model_type}")
    assert isinstance(module.FAMILY, Family | Nested) and module.__file__ is not None
    return module.FAMILY, Path(module.__file__)


def why_refused(name: str) -> str:
    """For a message: the reason, behind a colon, where one is known for this kind of model."""
    why = _REFUSED.get(name)
    return f": {why}" if why else ""


def gguf_families(name: str) -> list[tuple[str, GgufArchitecture]]:
    """The ways in which GGUF files of this architecture's name hold models, and of which
    model_type."""
    every = ((model_type, _declared(model_type)[0]) for model_type in model_types())
    return [
        (model_type, each)
        for model_type, declared in every
        if isinstance(declared, Family)
        for each in declared.gguf
        if each.name == name
    ]


def gguf_architectures() -> tuple[str, ...]:
    """Those that are supported, in alphabetical order."""
    every = (family(model_type).gguf for model_type in model_types())
    return tuple(sorted({each.name for ways in every for each in ways}))


def config_reader(config_json: Mapping[str, Any], where: str = "config.json") -> ConfigReader:
    """Of the language model's keys, which its model_type has. Raises ConfigError as `family`."""
    declared, file = _declared(config_json.get("model_type"), config_json)
    if isinstance(declared, Nested):
        return declared.language_model(config_json, where)
    keys = declared.keys or Keys.of_file(file.with_suffix(".json"))
    return ConfigReader(config_json, keys, f"{where}: ")


def read_config(config_json: Mapping[str, Any], where: str = "config.json") -> ConfigReading:
    """Raises ConfigError naming the key that is wrong, or that counts and has a value which is not
    supported, and the file, which is called `where`."""
    reader = config_reader(config_json, where)
    quantization = read_quantization(reader.raw)
    config = family(reader.raw["model_type"]).read(reader)
    assumed = sorted(reader.computed - reader.raw.keys())
    reader.computed |= QUANTIZATION_KEYS
    reader.finish()
    return ConfigReading(config, reader.ignored, assumed, quantization)


def model_config(config_json: Mapping[str, Any]) -> ModelConfig:
    """The architecture alone. Raises ConfigError as read_config."""
    return read_config(config_json).config
