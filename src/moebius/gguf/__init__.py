"""The GGUF file format: what a file says of itself, and where its tensors lie. No torch."""

from moebius.gguf.model import GgufModel, SplitName, first_file, is_gguf, open_gguf
from moebius.gguf.reader import GgufFile, GgufTensor, Metadata, Value, read_gguf

__all__ = [
    "GgufFile",
    "GgufModel",
    "GgufTensor",
    "Metadata",
    "SplitName",
    "Value",
    "first_file",
    "is_gguf",
    "open_gguf",
    "read_gguf",
]
