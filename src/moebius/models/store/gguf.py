"""Tensors in GGUF files, single or split, where they lie."""

import math
from collections import Counter
from pathlib import Path

from moebius.gguf import GgufModel, GgufTensor
from moebius.gguf.types import TENSOR_TYPES, BlockType
from moebius.models.quantization.record import Repacking
from moebius.models.store.tensors import NUMBER_BYTES, Store, StoredTensor

# What types are called in moebius.ops.FORMATS; nothing here reads the others.
_FORMATS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "Q8_0": "q8_0",
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q2_K": "q2_k",
    "Q3_K": "q3_k",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
    "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs",
    "MXFP4": "mxfp4",
}
_TYPES = {_FORMATS[each.name]: each for each in TENSOR_TYPES.values() if each.name in _FORMATS}


# What a loader makes of a format's blocks where kernels read planes, of as many bytes.
_PLANES = {"mxfp4": "mxfp4_planes"}


def block_type(format: str) -> BlockType:
    """What GGUF files call a format of moebius.ops.FORMATS."""
    return _TYPES[format]


def _repacking(tensor: GgufTensor) -> Repacking | None:
    planes = _PLANES.get(_FORMATS.get(tensor.type.name, ""))
    if planes is None:
        return None
    return Repacking(planes, (tensor.stop - tensor.start) // math.prod(tensor.shape[:-2]))


class GgufStore(Store):
    """The tensors of a GGUF model."""

    dtypes = tuple(_FORMATS)
    config = "the file's head"

    def __init__(self, model: GgufModel) -> None:
        self.tensors = {
            tensor.name: StoredTensor(
                tensor.file,
                tensor.name,
                tensor.type.name,
                _FORMATS.get(tensor.type.name),
                tensor.shape,
                tensor.start,
                tensor.stop,
                repacking=_repacking(tensor),
            )
            for tensor in model.tensors.values()
        }
        self.metadata = model.metadata
        # Norms and routers are F32 in all files, so they say nothing; what most numbers are does.
        numbers: Counter[str] = Counter()
        for tensor in self.tensors.values():
            numbers[str(tensor.format)] += math.prod(tensor.shape)
        most = max(numbers, key=lambda name: numbers[name])
        self.dtype = most if most in NUMBER_BYTES else "bfloat16"
        self._heads = {file.path: file.data_start for file in model.files}

    def same_shape(self, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """A file does not tell a vector from a matrix of one row, nor has it others of one."""
        return _without_ones(stored) == _without_ones(wanted)

    def header(self, file: Path) -> bytes:
        with file.open("rb") as opened:
            return opened.read(self._heads[file])


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]
