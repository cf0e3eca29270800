"""What a model's files hold, checked from headers: nothing is allocated.

One tensor is read where two may be the same: see _tied.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from moebius.errors import ConfigError, WeightsError
from moebius.files import short_name
from moebius.gguf import is_gguf
from moebius.models.config import ModelConfig
from moebius.models.description import Description
from moebius.models.layout import Layout, Source, sources
from moebius.models.quantization import BESIDE, Scheme
from moebius.models.store.composed import composed, is_stored
from moebius.models.store.kinds import open_model
from moebius.models.store.plan import PlannedWeight, planned_weight
from moebius.models.store.tensors import NUMBER_BYTES, Store, StoredTensor
from moebius.moe.on_host import HostExperts
from moebius.moe.ranks import ExpertRank

log = logging.getLogger(__name__)

_SAMPLE = 4096
# Bytes of two tensors that may be the same; larger pieces would leave the processor's cache.
_COMPARED_AT_ONCE = 2**18


@dataclass(frozen=True)
class Checkpoint:
    """A model whose configuration and tensors fit together; made by open_checkpoint.

    path is a directory, or a GGUF file. config.tie_word_embeddings says what the tensors do, which
    is not always what config_json says.
    tensors are the store's, under their names in a model with a head; a matrix that is quantised in
    several tensors is one, under its weight's name.
    """

    path: Path
    config_json: Mapping[str, Any]
    config: ModelConfig
    store: Store
    tensors: Mapping[str, StoredTensor]
    sources: tuple[Source, ...]

    @cached_property
    def dtype(self) -> str:
        """What to compute in: bfloat16, float16 or float32.

        Where the store does not say it, what most bytes of plain numbers are. Matrices in other
        formats say nothing of it; float32 where all are such.
        """
        if self.store.dtype is not None:
            return self.store.dtype
        sizes: Counter[str] = Counter()
        for source in self.sources:
            name = str(self.tensors[source.name].format)
            if name in NUMBER_BYTES:
                sizes[name] += math.prod(source.shape) * NUMBER_BYTES[name]
        return max(sizes, key=lambda name: sizes[name], default="float32")

    @property
    def formats(self) -> dict[str, int]:
        """Bytes of the model's tensors by what they are stored as, most first."""
        found: Counter[str] = Counter()
        for name in {source.name for source in self.sources}:
            tensor = self.tensors[name]
            found[str(tensor.format)] += tensor.stop - tensor.start
        return dict(found.most_common())

    def sources_at(self, ranks: ExpertRank | None) -> Sequence[Source]:
        """Those of what a rank holds; all of them without ranks."""
        if ranks is None:
            return self.sources
        held = ranks.holds
        return [each for each in self.sources if each.expert is None or held(*each.expert)]

    def plan_weights(
        self,
        dtype: str,
        device: str = "cpu",
        formats: Collection[str] = (),
        sources: Sequence[Source] | None = None,
        *,
        near: bool = False,
        host: HostExperts | None = None,
    ) -> list[PlannedWeight]:
        """How each parameter is held on `device` by a model that computes in `dtype`.

        formats: those of matrices that the backend reads where they lie (Ops.formats), besides
        `dtype` itself. sources: of the parameters in question, None for all. near: what could be
        mapped is copied as it is. host: of the experts in the host's memory, which are held as on a
        CPU. Loads none; loading holds each as this says.
        """
        found: list[PlannedWeight] = []
        places = {False: (device, formats)}
        if host is not None:
            places[True] = ("cpu", host.formats)
        # Experts' matrices are thousands, and as many as a layer has lie in one tensor.
        alike: dict[tuple[str, tuple[int, ...], bool, bool], PlannedWeight] = {}
        for source in self.sources if sources is None else sources:
            away = host is not None and source.expert is not None and host.holds(*source.expert)
            kind = (source.name, source.shape, source.float32, away)
            if kind not in alike:
                stored = self.tensors[source.name]
                alike[kind] = planned_weight(source, stored, dtype, *places[away], near=near)
            found.append(alike[kind].named(source.parameter, on_host=away))
        return found


def _named_in_full(
    layout: Layout, tensors: Mapping[str, StoredTensor]
) -> Mapping[str, StoredTensor]:
    """The tensors under their names in a model with a head; one that was saved without has no
    `model.` before them."""
    before = layout.prefix
    bare = layout.layer.removeprefix(before).partition("{i}")[0]
    whole = any(name.startswith(before) for name in tensors)
    if whole or not any(name.startswith(bare) for name in tensors):
        return tensors
    return {
        name if name == layout.head else before + name: tensor for name, tensor in tensors.items()
    }


def _without_unused(described: Description, store: Store) -> Mapping[str, StoredTensor]:
    """The store's tensors without those that the model computes nothing with; a line names them."""
    names = store.tensors
    layers = described.config.num_layers
    patterns = (*described.unused, *_predicting(described.layouts[0], layers, names))
    unused = {name: pattern for name in names for pattern in patterns if fnmatchcase(name, pattern)}
    if unused:
        log.info(
            "%s: %d tensors are left out, as no %s model here computes with them: %s",
            store.config,
            len(unused),
            described.config.model_type,
            ", ".join(sorted(set(unused.values()))),
        )
    return {name: tensor for name, tensor in names.items() if name not in unused}


def _predicting(layout: Layout, layers: int, names: Collection[str]) -> list[str]:
    """Patterns of the layers behind the model's own that predict further tokens (multi-token
    prediction, arXiv 2412.19437 section 2.2): a projection of two joined inputs marks them."""
    found: list[str] = []
    while True:
        layer = layout.layer.replace("{i}", str(layers + len(found)))
        marks = (f"{layer}eh_proj.", f"{layer}nextn.")
        if not any(name.startswith(marks) for name in names):
            return found
        found.append(f"{layer}*")


def _harmless(name: str, config: ModelConfig, head: str) -> bool:
    """Buffers that old checkpoints carry, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == head and config.tie_word_embeddings)


def _tied(
    path: Path, config: ModelConfig, layout: Layout, tensors: Mapping[str, StoredTensor]
) -> bool:
    """Whether the head is the embedding: it is meant to be, and no head is stored that differs.

    As in transformers: a head of its own counts for more than tie_word_embeddings. Bytes are
    compared, so that two spellings of one number are two heads, which costs memory and is right.
    What is read is what loading maps, and it ends at the first difference.
    """
    embedding = tensors.get(layout.embedding)
    head = tensors.get(layout.head)
    if not config.tie_word_embeddings or embedding is None or head is None:
        return config.tie_word_embeddings
    if _same_values(embedding, head):
        return True
    log.warning(
        "%s: tie_word_embeddings is true, but the files hold a %s that is not %s: it is used",
        path.name,
        layout.head,
        layout.embedding,
    )
    return False


def _check_copy(name: str, stored: StoredTensor, embedding: StoredTensor) -> None:
    """WeightsError for what should be the embedding again, and differs."""
    if not _same_values(stored, embedding):
        raise WeightsError(
            f"{short_name(stored.file)}: tensor {name!r} is not the model's embedding again; one "
            "embedding serves an encoder and a decoder"
        )


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(mine == theirs for mine, theirs in zip(_pieces(one), _pieces(other), strict=True))


def _pieces(tensor: StoredTensor) -> Iterator[bytearray]:
    """The tensor's bytes, one piece after the other in the same buffer; the last may have old bytes
    behind it, the same of two tensors whose earlier pieces are the same."""
    buffer = bytearray(_COMPARED_AT_ONCE)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            for left in range(tensor.stop - tensor.start, 0, -len(buffer)):
                wanted = memoryview(buffer)[:left]
                if file.readinto(wanted) != len(wanted):
                    raise WeightsError(f"{short_name(tensor.file)} shrank while it was read")
                yield buffer
    except OSError as cause:
        raise WeightsError(
            f"{short_name(tensor.file)} cannot be read: {cause.strerror or cause}"
        ) from None


def _match(
    path: Path,
    config: ModelConfig,
    store: Store,
    tensors: Mapping[str, StoredTensor],
    described: Description,
) -> tuple[tuple[Source, ...], Mapping[str, StoredTensor]]:
    """The sources of all parameters, in the layout that the checkpoint has; and what they read."""
    layouts = _with_embedding(described.layouts, config, tensors)
    quantization = described.quantization
    head = layouts[0].head
    schemes = () if quantization is None else quantization.schemes
    wanted, missing = _closest(config, tensors, layouts, schemes)
    if quantization is not None:
        tensors = composed(wanted, tensors, quantization)
    if missing:
        files = sorted({short_name(tensor.file) for tensor in tensors.values()})
        where = ", ".join(files[:3]) or path.name
        raise WeightsError(f"{where}: tensor {missing[0]!r} is missing{_remark(missing, head)}")
    wanted = _as_stored(wanted, tensors)
    shapes = dict.fromkeys((source.name, source.stored_shape) for source in wanted)
    for name, shape in shapes:
        _check_stored(tensors[name], name, shape, store)
    used = {name for name, _ in shapes}
    for name, stored in tensors.items():
        spare = any(fnmatchcase(name, pattern) for pattern in described.spare)
        if name in layouts[0].copies:
            _check_copy(name, stored, tensors[layouts[0].embedding])
        elif not (name in used or spare or _harmless(name, config, head)):
            raise WeightsError(
                f"{short_name(stored.file)}: tensor {name!r} is left over; {config.model_type} has "
                "no such tensor"
            )
    return wanted, tensors


def _with_embedding(
    layouts: tuple[Layout, ...], config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[Layout, ...]:
    """The layouts; of a head alone, which serves as embedding, as such."""
    stored = any(layout.embedding in tensors for layout in layouts)
    if stored or not config.tie_word_embeddings:
        return layouts
    return tuple(replace(layout, embedding=layout.head) for layout in layouts)


def _as_stored(
    wanted: tuple[Source, ...], tensors: Mapping[str, StoredTensor]
) -> tuple[Source, ...]:
    """The sources, told which of their tensors are quantised."""
    return tuple(each.of_codes if tensors[each.name].parts else each for each in wanted)


def _closest(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    layouts: tuple[Layout, ...],
    schemes: tuple[Scheme, ...],
) -> tuple[tuple[Source, ...], list[str]]:
    """The sources in the layout that lacks fewest of them, and the names of those that it lacks."""
    options = []
    for layout in layouts:
        wanted = tuple(sources(config, layout))
        lacking = [each.name for each in wanted if not is_stored(each.name, tensors, schemes)]
        options.append((wanted, lacking))
        if not lacking:
            break
    wanted, lacking = min(options, key=lambda option: len(option[1]))
    return wanted, list(dict.fromkeys(lacking))


def _check_stored(stored: StoredTensor, name: str, shape: tuple[int, ...], store: Store) -> None:
    """WeightsError where a parameter's tensor has another shape, or a dtype that nothing reads."""
    where = f"{short_name(stored.file)}: tensor {name!r}"
    if not store.same_shape(stored.shape, shape):
        raise WeightsError(
            f"{where} has shape {list(stored.shape)}; {store.config} needs {list(shape)}"
        )
    if stored.format is None:
        supported = ", ".join(store.dtypes)
        raise WeightsError(f"{where} has dtype {stored.dtype}; supported are {supported}")


def _remark(missing: Sequence[str], head: str) -> str:
    """What to say of the missing tensors beyond the first one's name."""
    if missing == [head]:
        return (
            "; if the embedding is meant to serve as head, config.json must say "
            "tie_word_embeddings = true"
        )
    remark = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if all(name.endswith(".bias") for name in missing):
        remark += "; models of this type have biases on all of these projections, or on none"
    return remark


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check a model: a directory, or a GGUF file.

    Raises ConfigError or WeightsError; allocates nothing. Keys of its configuration that change
    nothing are named in the log.
    """
    path = Path(path)
    if not path.is_dir() and not is_gguf(path):
        raise ConfigError(
            f"{path} is no directory; a model is a directory with config.json and safetensors "
            "files, or a GGUF file"
        )
    described, store = open_model(path)
    if described.ignored:
        log.info(
            "%s: no %s model reads %s, which changes nothing",
            store.config,
            described.config.model_type,
            ", ".join(described.ignored),
        )
    layout = described.layouts[0]
    config = described.config
    tensors = _named_in_full(layout, _without_unused(described, store))
    layout = next((each for each in described.layouts if each.embedding in tensors), layout)
    tied = _tied(path, config, layout, tensors)
    config = described.told(config, tensors)
    config = replace(config, tie_word_embeddings=tied)
    matched, tensors = _match(path, config, store, tensors, described)
    return Checkpoint(path, described.config_json, config, store, tensors, matched)


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits naming a checkpoint: its configuration, with what a file beside it says of how
    it is quantised, headers, file sizes and 4 KiB of each tensor."""
    digest = blake2b(digest_size=8, person=b"moebius-weights")
    digest.update(json.dumps(checkpoint.config_json, sort_keys=True).encode())
    beside = checkpoint.path / BESIDE
    if beside.exists():
        digest.update(beside.read_bytes())
    digest.update(b"tied" if checkpoint.config.tie_word_embeddings else b"a head of its own")
    files: dict[Path, list[StoredTensor]] = {}
    every = checkpoint.store.tensors.values()
    stored = [plane for tensor in every for plane in tensor.planes]
    for tensor in sorted(stored, key=lambda t: t.start):
        files.setdefault(tensor.file, []).append(tensor)
    for path, tensors in sorted(files.items()):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            header = checkpoint.store.header(path)
            for part in (path.name.encode(), size.to_bytes(8, "little"), header):
                digest.update(len(part).to_bytes(8, "little") + part)
            for tensor in tensors:
                file.seek(tensor.start)
                digest.update(file.read(min(_SAMPLE, tensor.stop - tensor.start)))
    return digest.hexdigest()
