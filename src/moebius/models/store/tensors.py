"""Where a checkpoint's tensors are, whatever kind of file they lie in. No torch, nothing allocated.

A kind of file is a `Store`: one file in this package, which `kinds` knows. What it says of a tensor
(`StoredTensor`) is all that planning and loading need; they know no kind.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from moebius.models.quantization.record import Repacking

# Bytes a number, of the formats (moebius.ops.FORMATS) whose matrices are plain numbers.
NUMBER_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def readings(format: str, columns: int) -> tuple[str, ...]:
    """The names by which a backend may say that it reads matrices of a format (Ops.formats).

    That without parameters; and `int4 of 32` where groups of columns are whole blocks of 32, with
    ` with zeros` behind it where they have zero points. Groups of other formats have one size.
    """
    base, _, parameters = format.removesuffix("]").partition("[")
    group, *others = parameters.split(",")
    if not base.startswith(("affine", "int")) or columns % 32 or int(group) % 32:
        return (base,)
    zeros = any(each.endswith(" zeros") for each in others)
    return base, f"{base} of 32{' with zeros' if zeros else ''}"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; start and stop are byte offsets from the file's beginning.

    dtype is what the file calls it. format is the name that it has here (moebius.ops.formats), or
    None where Moebius reads none such.

    A matrix whose format has several planes, each a tensor of its own, is one too: these are its
    `parts`, and file, start and stop those of its codes. `repacking` is what is made of a matrix
    that nothing reads as it is stored.
    """

    file: Path
    name: str
    dtype: str
    format: str | None
    shape: tuple[int, ...]
    start: int
    stop: int
    parts: "tuple[StoredTensor, ...]" = ()
    repacking: Repacking | None = None

    @property
    def planes(self) -> "tuple[StoredTensor, ...]":
        """The tensors of files that it lies in, in the order of its format's planes."""
        return self.parts or (self,)

    @property
    def nbytes(self) -> int:
        return sum(plane.stop - plane.start for plane in self.planes)


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
