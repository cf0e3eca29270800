"""Which kinds of files weights may lie in."""

from pathlib import Path

from moebius.gguf import is_gguf, open_gguf
from moebius.models.description import Description, describe_directory, describe_gguf
from moebius.models.store.gguf import GgufStore
from moebius.models.store.safetensors import SafetensorsStore
from moebius.models.store.tensors import DirectoryStore, Store

KINDS: tuple[type[DirectoryStore], ...] = (SafetensorsStore,)


def open_model(path: Path) -> tuple[Description, Store]:
    """A model and its tensors, of a directory or a GGUF file.

    Raises ConfigError, and WeightsError naming file and tensor.
    """
    if is_gguf(path):
        model = open_gguf(path)
        return describe_gguf(model), GgufStore(model)
    description = describe_directory(path)
    kind = next((kind for kind in KINDS if kind.is_in(path)), KINDS[0])
    return description, kind.open(path)
