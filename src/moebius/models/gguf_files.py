"""Which of several GGUF files is meant: those of a directory, or of a repository on the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from moebius.errors import ConfigError
from moebius.gguf import first_file

# Projectors of images, which lie beside the models that they are for.
_NO_MODEL = "mmproj"


@dataclass(frozen=True, slots=True)
class GgufChoice:
    """One model: a file, or all those that it was split into.

    name    the first file's, as its directory or repository has it
    """

    name: str
    files: tuple[str, ...]
    nbytes: int

    def __str__(self) -> str:
        parts = f" in {len(self.files)} files" if len(self.files) > 1 else ""
        return f"{self.name} ({_size(self.nbytes)}{parts})"


def gguf_choices(sizes: Mapping[str, int]) -> list[GgufChoice]:
    """The models that these files are, by their names; sizes in bytes."""
    found: dict[str, list[str]] = {}
    for name in sorted(sizes):
        path = PurePosixPath(name)
        if path.suffix == ".gguf" and not path.name.startswith(_NO_MODEL):
            first = str(path.with_name(first_file(path.name)))
            found.setdefault(first, []).append(name)
    return [
        GgufChoice(first, tuple(files), sum(sizes[file] for file in files))
        for first, files in found.items()
    ]


def chosen(choices: list[GgufChoice], wanted: str | None, where: str) -> GgufChoice:
    """The one whose name `wanted` is, or is a part of; where it is None, the only one.

    Raises ConfigError, which lists them, where none fits or several do.
    """
    listed = ", ".join(map(str, choices))
    if not choices:
        raise ConfigError(f"{where} holds no GGUF file")
    if wanted is None:
        if len(choices) > 1:
            raise ConfigError(f"{where} holds several models; choose one by --file: {listed}")
        return choices[0]
    exact = [each for each in choices if wanted in (each.name, *each.files)]
    fitting = exact or [each for each in choices if wanted.lower() in each.name.lower()]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = ", ".join(map(str, fitting))
        raise ConfigError(f"{where} holds several models of --file {wanted}: {several}")
    raise ConfigError(f"{where} holds no model of --file {wanted}; it holds {listed}")


def _size(nbytes: int) -> str:
    """18 GB, 98 MB, as file managers and the hub have it."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes / 1e3:.3g} kB"
