"""Which kinds of files weights may lie in."""

from pathlib import Path

from moebius.models.store.safetensors import SafetensorsStore
from moebius.models.store.tensors import Store

KINDS: tuple[type[Store], ...] = (SafetensorsStore,)


def open_store(directory: Path) -> Store:
    """The tensors of a model directory. Raises WeightsError naming file and tensor."""
    kind = next((kind for kind in KINDS if kind.is_in(directory)), KINDS[0])
    return kind.open(directory)
