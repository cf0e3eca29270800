"""A model of one GGUF file, or of several that it was split into."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moebius.errors import WeightsError
from moebius.files import short_name
from moebius.gguf.reader import GgufFile, GgufTensor, Metadata, read_gguf

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_PARTS = 1000


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What the first file says, and the tensors of all.

    files in the order of their numbers
    """

    files: tuple[GgufFile, ...]
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]


@dataclass(frozen=True, slots=True)
class SplitName:
    """What the name of a split file says: part `number` of `count`, from 1."""

    stem: str
    number: int
    count: int

    @classmethod
    def of(cls, name: str) -> "SplitName | None":
        """None for the name of a file that is whole."""
        found = _PART.fullmatch(name)
        return found and cls(found["stem"], int(found["number"]), int(found["count"]))

    def name(self, number: int) -> str:
        """What part `number` of the same model is called."""
        return f"{self.stem}-{number:05}-of-{self.count:05}.gguf"


def first_file(name: str) -> str:
    """The name of a model's first file, by that of any."""
    part = SplitName.of(name)
    return name if part is None else part.name(1)


def is_gguf(path: Path) -> bool:
    """Whether a model's path is that of a GGUF file, and not of a directory."""
    return path.suffix == ".gguf" and not path.is_dir()


def open_gguf(path: Path) -> GgufModel:
    """The model that a file belongs to, all of its parts.

    Raises WeightsError naming the file and what is wrong in it, or the part that is missing.
    """
    first = read_gguf(path.with_name(first_file(path.name)))
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return GgufModel((first,), first.metadata, first.tensors)
    name = short_name(first.path)
    part = SplitName.of(path.name)
    if type(count) is not int or not 1 <= count <= _MOST_PARTS:
        raise WeightsError(f"{name}: split.count is {count!r}; it must be 1 to {_MOST_PARTS}")
    if part is None or part.count != count:
        raise WeightsError(
            f"{name} is one of {count} files; they must keep their names, "
            f"NAME-00001-of-{count:05}.gguf and so on, in one directory"
        )
    files = [first, *(read_gguf(path.with_name(part.name(n))) for n in range(2, count + 1))]
    return GgufModel(tuple(files), first.metadata, _joined(files, count))


def _joined(files: list[GgufFile], count: int) -> dict[str, GgufTensor]:
    """The tensors of all parts. Raises WeightsError where they are not parts of one model."""
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        name = short_name(file.path)
        for key, wanted in (("split.count", count), ("split.no", number)):
            found = file.metadata.get(key)
            if found != wanted:
                raise WeightsError(f"{name}: {key} is {found}; by its name it must be {wanted}")
        for tensor in file.tensors:
            if tensor in tensors:
                other = tensors[tensor].file.name
                raise WeightsError(f"{name}: tensor {tensor!r} is in {other} too")
        tensors.update(file.tensors)
    total = files[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise WeightsError(
            f"{short_name(files[0].path)}: split.tensors.count is {total}, but the files hold "
            f"{len(tensors)}"
        )
    return tensors
