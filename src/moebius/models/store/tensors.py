"""Where a checkpoint's tensors are, whatever kind of file they lie in. No torch, nothing allocated.

A kind of file is a `Store`: one file in this package, which `kinds` knows. What it says of a tensor
(`StoredTensor`) is all that planning and loading need; they know no kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

# Bytes a number, of the formats (moebius.ops.FORMATS) whose matrices are plain numbers.
NUMBER_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; start and stop are byte offsets from the file's beginning.

    dtype is what the file calls it. format is the name that it has here (moebius.ops.FORMATS), or
    None where Moebius reads none such.
    """

    file: Path
    name: str
    dtype: str
    format: str | None
    shape: tuple[int, ...]
    start: int
    stop: int


class Store(ABC):
    """The tensors of one checkpoint, by name, told from headers.

    dtypes   what files of this kind call what Moebius reads, for messages
    config   what says which tensors there must be, for messages
    dtype    what to compute in, where files of this kind have their plain numbers by convention
    """

    dtypes: tuple[str, ...]
    config: str = "config.json"
    dtype: str | None = None
    tensors: Mapping[str, StoredTensor]

    @abstractmethod
    def header(self, file: Path) -> bytes:
        """What one file says of its tensors, as it lies there, for the fingerprint."""

    def same_shape(self, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Whether a tensor of shape `stored` holds one of shape `wanted`."""
        return stored == wanted


class DirectoryStore(Store):
    """Those of a directory, beside its config.json."""

    @classmethod
    @abstractmethod
    def is_in(cls, directory: Path) -> bool:
        """Whether the directory's weights are of this kind."""

    @classmethod
    @abstractmethod
    def open(cls, directory: Path) -> Self:
        """Read and check all headers. Raises WeightsError naming file and tensor."""


@cache
def short_name(path: Path) -> str:
    """`directory/file`, for messages."""
    return f"{path.parent.name}/{path.name}"
