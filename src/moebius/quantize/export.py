"""A model as a GGUF file that llama.cpp loads: its names, its keys, its order of rows."""

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moebius.errors import ConfigError
from moebius.files import Ours, anyone, check_target
from moebius.gguf.reader import Value
from moebius.gguf.types import QUANTIZATION_VERSION
from moebius.gguf.writer import TensorToWrite, gguf_file, write_gguf
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import GgufArchitecture, Moved
from moebius.models.gguf_config import ROPE_DIVISORS
from moebius.models.gguf_keys import gguf_keys
from moebius.models.layout import Source, sources
from moebius.models.store import Checkpoint, StoredTensor, open_checkpoint
from moebius.models.store.gguf import GgufStore, block_type
from moebius.ops.formats import Dense, format_named
from moebius.progress import Progress, silent
from moebius.quantize.recipe import PLAIN, RECIPES, Recipe, format_of, recipe
from moebius.quantize.rows import Rows
from moebius.quantize.vocabulary import vocabulary_metadata

# The format of what is no matrix, and of routers.
_KEPT = "float32"


class Part(NamedTuple):
    """A parameter, the tensor that holds it, and what of it is otherwise in the file."""

    source: Source
    stored: StoredTensor
    moved: Moved | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the file, and the parameters that it is made of."""

    name: str
    shape: tuple[int, ...]
    format: str
    parts: tuple[Part, ...]

    def to_write(self, rows: Rows) -> TensorToWrite:
        return TensorToWrite(
            self.name, block_type(self.format), self.shape, partial(self._pieces, rows)
        )

    def _pieces(self, rows: Rows) -> Iterator[memoryview]:
        for source, stored, moved in self.parts:
            yield from rows.of(source, stored, self.format, moved)


@dataclass(slots=True)
class Total:
    """Of some tensors: how many they are, their numbers, and their bytes."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    def add(self, tensor: TensorToWrite) -> None:
        self.tensors += 1
        self.parameters += tensor.numbers
        self.nbytes += tensor.nbytes


@dataclass(frozen=True, slots=True)
class Written:
    """What a file holds.

    nbytes    of the whole file, metadata included
    total     of all tensors
    by_type   of those of each type
    """

    nbytes: int
    total: Total
    by_type: Mapping[str, Total]

    @property
    def bits(self) -> float:
        """Of a parameter, metadata left out."""
        return 8 * self.total.nbytes / self.total.parameters


def write_model(
    model: Path,
    out: Path,
    type_name: str,
    *,
    name: str = "",
    force: bool = False,
    progress: Progress = silent,
) -> Written:
    """Write a model, a directory or a GGUF file, as a GGUF file of the named type.

    name: what the file calls the model. force: a GGUF file that is there may be replaced. Raises
    ConfigError for an unknown type, for a model that llama.cpp does not have, and where `out` is
    there; TokenizerError for a tokenizer that GGUF files cannot describe; WeightsError;
    StorageError.
    """
    chosen = recipe(type_name, {**RECIPES, **PLAIN})
    _check_out(out, force=force)
    checkpoint = open_checkpoint(model)
    metadata, targets, more = _described(checkpoint, chosen)
    metadata["general.name"] = name or model.name
    with Rows() as rows:
        tensors = [*more, *(target.to_write(rows) for target in targets)]
        total = sum(tensor.nbytes for tensor in tensors)
        with progress(f"writing {out.name}", total) as written:
            layout = write_gguf(out, metadata, tensors, ours=_ours(force=force), written=written)
    return _summary(layout.size, tensors)


def _ours(*, force: bool) -> Ours:
    return gguf_file if force else lambda path: False


def _check_out(out: Path, *, force: bool) -> None:
    if out.suffix != ".gguf":
        raise ConfigError(f"{out}: name a file that ends in .gguf")
    check_target(out, gguf_file if force else anyone)
    if out.is_file() and not force:
        raise ConfigError(f"{out} is there already; choose another name, or add --force")


def _described(
    checkpoint: Checkpoint, recipe: Recipe
) -> tuple[dict[str, Value], list[Target], list[TensorToWrite]]:
    """The file's keys, the model's tensors, and those that say what keys cannot."""
    if isinstance(checkpoint.store, GgufStore):
        metadata = dict(checkpoint.store.metadata)
        for key in [key for key in metadata if key.startswith(("split.", "general.alignment"))]:
            del metadata[key]
        _leave_out_predicting(metadata, checkpoint.config)
        whole = [(each, Part(each, checkpoint.tensors[each.name])) for each in checkpoint.sources]
        targets = _targets(checkpoint, recipe, whole)
        stored = checkpoint.store.tensors.get(ROPE_DIVISORS)
        if stored is not None:
            source = Source(ROPE_DIVISORS, stored.shape, ROPE_DIVISORS, stored.shape)
            targets.append(Target(ROPE_DIVISORS, stored.shape, _KEPT, (Part(source, stored),)))
        more = []
    else:
        found = gguf_keys(checkpoint.config_json)
        vocabulary = vocabulary_metadata(checkpoint.path, checkpoint.config.vocab_size)
        metadata = {**found.keys, **vocabulary}
        targets = _targets(checkpoint, recipe, _moved(checkpoint, found.architecture))
        divisors = found.rope_divisors
        more = [] if divisors is None else [_vector(ROPE_DIVISORS, divisors)]
    metadata["general.file_type"] = recipe.file_type
    metadata["general.quantization_version"] = QUANTIZATION_VERSION
    return metadata, targets, more


def _moved(checkpoint: Checkpoint, architecture: GgufArchitecture) -> list[tuple[Source, Part]]:
    """Each parameter of a file, where it stands there, and what it is made of."""
    config = checkpoint.config
    origins = {source.parameter: source for source in checkpoint.sources}
    found = []
    for wanted in sources(architecture.held_config(config), architecture.layouts[0]):
        moved = architecture.made_of(wanted.parameter, config)
        origin = origins[wanted.parameter if moved is None else moved.parameter]
        found.append((wanted, Part(origin, checkpoint.tensors[origin.name], moved)))
    return found


def _leave_out_predicting(metadata: dict[str, Value], config: ModelConfig) -> None:
    """Count no layers that predict further tokens: they are read by none, and not written."""
    before = f"{metadata['general.architecture']}."
    if metadata.pop(f"{before}nextn_predict_layers", 0):
        metadata[f"{before}block_count"] = config.num_layers


def _targets(
    checkpoint: Checkpoint, recipe: Recipe, parameters: Iterable[tuple[Source, Part]]
) -> list[Target]:
    """The tensors of a file: where each parameter stands in it, and what that is made of."""
    parts: dict[str, list[tuple[Source, Part]]] = {}
    for wanted, part in parameters:
        parts.setdefault(wanted.name, []).append((wanted, part))
    targets = []
    for name, found in parts.items():
        found.sort(key=lambda pair: (pair[0].entry or 0, pair[0].start))
        wanted, part = found[0]
        format = _format(recipe, wanted, part.stored, checkpoint.config)
        shape = _shape(wanted.stored_shape)
        targets.append(Target(name, shape, format, tuple(part for _, part in found)))
    return targets


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Matrices have no dimension of 1 between others; of four dimensions all are meant."""
    last = len(shape) - 1
    if last == 3:
        return shape
    return tuple(size for i, size in enumerate(shape) if size != 1 or i in (0, last))


def _format(recipe: Recipe, source: Source, tensor: StoredTensor, config: ModelConfig) -> str:
    wanted = format_of(recipe, source, config)
    if wanted is not None:
        return wanted
    norm = source.parameter.endswith("norm.weight")
    matrix = len(source.shape) > 1 and source.shape[0] > 1 and not norm
    stored = str(tensor.format)
    # Rows that are no whole blocks; a router is worth float32.
    rows_do_not_fit = matrix and ".router." not in source.parameter and not source.float32
    return stored if rows_do_not_fit and isinstance(format_named(stored), Dense) else _KEPT


def _vector(name: str, numbers: Sequence[float]) -> TensorToWrite:
    content = struct.pack(f"<{len(numbers)}f", *numbers)
    return TensorToWrite(name, block_type(_KEPT), (len(numbers),), lambda: (content,))


def _summary(nbytes: int, tensors: Iterable[TensorToWrite]) -> Written:
    total = Total()
    by_type: defaultdict[str, Total] = defaultdict(Total)
    for tensor in tensors:
        total.add(tensor)
        by_type[tensor.type.name].add(tensor)
    return Written(nbytes, total, by_type)
