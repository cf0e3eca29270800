"""A checkpoint's tensors into a Decoder, where they lie in their files wherever that can be."""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from moebius.errors import WeightsError
from moebius.models.decoder import Decoder
from moebius.models.encoder_decoder import decoder_of
from moebius.models.layout import Source
from moebius.models.store.checkpoint import Checkpoint, open_checkpoint
from moebius.models.store.heads import of_heads
from moebius.models.store.mapped import MappedFiles
from moebius.models.store.near import NearFiles
from moebius.models.store.plan import PlannedWeight
from moebius.models.store.sending import Sender, sender_to
from moebius.models.store.tensors import NUMBER_BYTES, StoredTensor
from moebius.moe.experts import Experts
from moebius.moe.on_host import HostExperts
from moebius.moe.placement import Placement
from moebius.moe.ranks import ExpertRank
from moebius.nn.linear import Weighted, WeightList
from moebius.ops import Format, Matrix, Ops, PreparedExperts, Weight, select_ops
from moebius.ops.cuda import device_for_threads
from moebius.ops.formats import Dense, Repacked, dtype_name, format_named, planes_of_blocks
from moebius.pages import Span, give_back

Send = Callable[[Tensor], Tensor]
"""Brings a tensor to the device."""

# Threads that copy a model while it is loaded, and nothing is computed yet.
_COPYING = 4


def load_decoder(
    checkpoint: Checkpoint | Path | str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ops: Ops | None = None,
    *,
    mapped: bool = True,
    ranks: ExpertRank | None = None,
    host: HostExperts | None = None,
) -> Decoder:
    """A decoder with a checkpoint's weights, which computes in `dtype` on `device`.

    ranks: where its experts are spread over several ranks, the one whose share is to be loaded.
    host: where some of them lie in the host's memory beside the device's, which these are.
    The other arguments and what is raised are as in Loader.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    device = torch.device(device)
    ops = ops or select_ops(device, dtype)
    decoder = decoder_of(checkpoint.config, ops, dtype, device="meta", ranks=ranks, host=host)
    Loader(checkpoint, device, mapped=mapped).fill(decoder)
    return decoder


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """Experts on their way: rank `rank` is to hold what `placement` says of it.

    come   what it lacked, with its values; gone: what is others' then
    """

    placement: Placement
    rank: int
    come: Sequence[tuple[Source, Weight]]
    gone: Sequence[Source]

    @property
    def modules(self) -> list[str]:
        """The names of the Experts that change."""
        sources = [*(source for source, _ in self.come), *self.gone]
        return sorted({source.parameter.rsplit(".", 2)[0] for source in sources})


class _Files(Protocol):
    """Files whose bytes are in memory."""

    def view(
        self, stored: StoredTensor, dtype: torch.dtype, skipped: int, shape: tuple[int, ...]
    ) -> Tensor: ...


class Loader:
    """Puts a checkpoint's tensors into decoders, where they lie in their files if that can be.

    On a CPU, tensors are used where they lie in the mapped file if they are stored as the dtype
    that is computed in, or are matrices in a format that the backend reads in place: loading copies
    nothing and processes share the pages. All others are copied as that dtype;
    Checkpoint.plan_weights says which. Mapped weights cannot be written and take no gradient;
    mapped=False copies all of them, for training. Experts in the host's memory beside another
    device are mapped too, and it holds copies of the rest.

    A rank that shares experts with others reads and holds its own alone. near: it has copies of
    what would be mapped, too, in memory of its own, and no file stays mapped for them. cold: mapped
    experts are not read ahead; operations ask for those that they need.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        mapped: bool = True,
        near: bool = False,
        cold: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self._mapped = mapped
        self._near = near
        self._cold = cold
        # Of ranks that hold parts of files, and may come to hold others.
        self._parts = MappedFiles(whole=False)
        self._ahead: MappedFiles | None = None
        self._send = sender_to(device)

    def read_ahead(self, ranks: ExpertRank | None) -> None:
        """Begin to read all files, where `fill` of a decoder of these ranks will map them whole:
        the system does it while other things are made."""
        if ranks is None and self._mapped and not self._cold and self.device.type == "cpu":
            self._ahead = MappedFiles()
            stored = self.checkpoint.tensors.values()
            for file in {plane.file for tensor in stored for plane in tensor.planes}:
                self._ahead.map(file)

    def fill(self, decoder: Decoder) -> None:
        """Give all parameters of a decoder on meta their values.

        Raises ConfigError or WeightsError before anything is allocated.
        """
        sources = self.checkpoint.sources_at(decoder.ranks)
        _check_all_have_a_source(decoder, sources)
        whole = decoder.ranks is None and decoder.host is None and not self._cold
        files = (self._ahead or MappedFiles()) if whole else self._parts
        self._ahead = None
        for module in decoder.modules():
            if isinstance(module, Experts):
                module.on_disk = self._cold
        self._put(decoder, self._values(decoder, sources, files, _COPYING))

    def fill_some(self, decoder: Decoder, wanted: Callable[[str], bool]) -> None:
        """Give values to the parameters of a decoder on meta whose names are `wanted`."""
        sources = [
            source
            for source in self.checkpoint.sources_at(decoder.ranks)
            if wanted(source.parameter)
        ]
        self._put(decoder, self._values(decoder, sources, MappedFiles(), _COPYING))

    def bring_experts(
        self, decoder: Decoder, placement: Placement, rank: int | None = None
    ) -> ExpertMove:
        """Read what a rank lacks of what `placement` says of it, while it goes on with what it has.

        On any thread. rank: its number from then on, where it is another. Raises ConfigError as
        ExpertRank.place and WeightsError.
        """
        ranks = decoder.ranks
        assert ranks is not None, "this decoder holds all experts"
        rank = ranks.rank if rank is None else rank
        ranks.check(placement, rank)
        before = self._expert_sources(ranks)
        after = self._expert_sources(ExpertRank(placement, rank, ranks.tokens))
        come = [source for name, source in after.items() if name not in before]
        gone = [source for name, source in before.items() if name not in after]
        values = self._values(decoder, come, self._parts)
        return ExpertMove(placement, rank, values, gone)

    def move_experts(self, decoder: Decoder, move: ExpertMove) -> None:
        """Let a rank hold what was brought for it, between two steps of all ranks.

        Experts that went to others are there no longer. Programs that were recorded go on with the
        new ones where the backend can exchange them; else they have to be recorded anew
        (Decoder.changes). Nothing else may have been moved since.
        """
        ranks = decoder.ranks
        assert ranks is not None, "this decoder holds all experts"
        ranks.place(move.placement, move.rank)
        layers = [decoder.get_submodule(name) for name in move.modules]
        handles = [_prepared(experts, decoder) for experts in layers]
        before = decoder.changes.count
        self._put(decoder, move.come)
        gone = [_taken(decoder, source) for source in move.gone]
        now = [_prepared(experts, decoder) for experts in layers]
        if all(one is other for one, other in zip(now, handles, strict=True)):
            decoder.changes.count = before
        self._release(decoder, move.gone, gone)

    def _release(
        self, decoder: Decoder, sources: Sequence[Source], weights: Sequence[Weight]
    ) -> None:
        """Give back the memory of weights that nothing is computed with any more."""
        planned = self._planned(decoder, sources)
        far = []
        for source, weight, plan in zip(sources, weights, planned, strict=True):
            if not plan.near:
                far.append(source)
                continue
            for plane in (weight,) if isinstance(weight, Tensor) else weight.planes:
                give_back(plane.data_ptr(), plane.nbytes)
        self._give_back(far, self._parts)

    def _give_back(self, sources: Iterable[Source], files: MappedFiles) -> None:
        """Pages that nothing reads any more."""
        for file, spans in self._spans(sources).items():
            files.release(file, spans)

    def _expert_sources(self, ranks: ExpertRank) -> dict[str, Source]:
        sources = self.checkpoint.sources_at(ranks)
        return {source.parameter: source for source in sources if source.expert is not None}

    def _spans(self, sources: Iterable[Source]) -> dict[Path, list[Span]]:
        """Where sources lie in their files."""
        found: dict[Path, list[Span]] = {}
        for source in sources:
            for plane, span in _spans_of(source, self.checkpoint.tensors[source.name]):
                found.setdefault(plane.file, []).append(span)
        return found

    def _planned(self, decoder: Decoder, sources: Sequence[Source]) -> list[PlannedWeight]:
        dtype = dtype_name(decoder.dtype)
        formats = decoder.ops.formats(decoder.dtype) if self._mapped else frozenset[str]()
        return self.checkpoint.plan_weights(
            dtype, self.device.type, formats, sources, near=self._near, host=decoder.host
        )

    def _values(
        self,
        decoder: Decoder,
        sources: Sequence[Source],
        files: MappedFiles,
        threads: int = 1,
    ) -> list[tuple[Source, Weight]]:
        """What a decoder's parameters will be, for these sources; so many threads copy."""
        planned = list(zip(sources, self._planned(decoder, sources), strict=True))
        near = None
        if self._near:
            near = NearFiles(self._spans(source for source, plan in planned if plan.near), threads)
        if not files.whole:
            far = self._spans(
                source
                for source, plan in planned
                if not (plan.near or (plan.mapped and self._cold and source.expert is not None))
            )
            for file, spans in far.items():
                files.fetch(file, spans)
        values: list[tuple[Source, Weight]] = []
        others = []
        for source, plan in planned:
            held: _Files = near if near is not None and plan.near else files
            weight = _view(held, source, self.checkpoint.tensors[source.name])
            if not (plan.mapped or plan.near):
                others.append(len(values))
            elif not self._mapped and isinstance(weight, Tensor):
                weight = weight.clone()
            values.append((source, weight))

        done_with = self._done_with(decoder, files)

        def convert(index: int) -> Weight:
            source, weight = values[index]
            brought = self._brought(source, weight, planned[index][1])
            done_with(source)
            return brought

        with ThreadPoolExecutor(threads, initializer=device_for_threads()) as pool:
            for index, weight in zip(others, pool.map(convert, others), strict=True):
                values[index] = (values[index][0], weight)
        if isinstance(self._send, Sender):
            self._send.finish()
        return values

    def _done_with(self, decoder: Decoder, files: MappedFiles) -> Callable[[Source], None]:
        """What to do with a source that was copied. A model that a device has copies of may be
        larger than the host's memory, and files with the host's experts stay mapped: its pages are
        given back."""
        if decoder.host is None and not isinstance(self._send, Sender):
            return lambda source: None
        return lambda source: self._give_back([source], files)

    def _brought(self, source: Source, weight: Weight, plan: PlannedWeight) -> Weight:
        """A copy where it is to be."""
        send = _stay if plan.on_host else self._send
        return _converted(weight, source, plan.format, send)

    def _put(self, decoder: Decoder, values: Iterable[tuple[Source, Weight]]) -> None:
        modules = dict(decoder.named_modules())
        for source, weight in values:
            module, _, leaf = source.parameter.rpartition(".")
            _put(modules[module], leaf, weight, requires_grad=not self._mapped)


def _prepared(experts: nn.Module, decoder: Decoder) -> PreparedExperts:
    assert isinstance(experts, Experts)
    return experts.prepared(decoder.dtype)


def _spans_of(source: Source, stored: StoredTensor) -> list[tuple[StoredTensor, Span]]:
    """The bytes of a source in its files: of an entry of several planes, all of it."""
    if source.entry is None:
        return [(plane, (plane.start, plane.stop)) for plane in stored.planes]
    if not (stored.parts or source.scattered):
        row_bytes = (stored.stop - stored.start) // math.prod(stored.shape[:2])
        first = stored.start + row_bytes * _first_row(source)
        return [(stored, (first, first + row_bytes * source.shape[0]))]
    found = []
    for plane in stored.planes:
        nbytes = (plane.stop - plane.start) // stored.shape[0]
        first = plane.start + source.entry * nbytes
        found.append((plane, (first, first + nbytes)))
    return found


def _first_row(source: Source) -> int:
    """Where a source begins in the rows of all entries of its tensor."""
    before = 0 if source.entry is None else source.entry * source.stored_shape[1]
    return before + source.start


def _view(files: _Files, source: Source, stored: StoredTensor) -> Weight:
    """The source's values where they lie, as they are stored."""
    format = format_named(str(stored.format))
    if source.heads:
        shape = source.stored_shape
        return _view(files, Source(source.parameter, shape, source.name, shape), stored)
    if stored.parts:
        return _of_planes(files, source, stored, format)
    if source.scattered:
        return _scattered(files, source, stored, format)
    first_row = _first_row(source)
    if isinstance(format, Dense):
        skipped = first_row * math.prod(source.shape[1:])
        return files.view(stored, format.dtype, skipped, source.shape)
    rows, columns = source.shape
    ((dtype, shape),) = format.planes(rows, columns)
    plane = files.view(stored, dtype, first_row * math.prod(shape[1:]), shape)
    return Matrix(format, (rows, columns), (plane,))


def _of_planes(files: _Files, source: Source, stored: StoredTensor, format: Format) -> Matrix:
    """A matrix of several planes, or some rows of one, where they lie."""
    rows, columns = stored.shape[-2:]
    shapes = format.planes(rows, columns)
    planes = [
        files.view(plane, dtype, (source.entry or 0) * math.prod(shape), shape)
        for plane, (dtype, shape) in zip(stored.parts, shapes, strict=True)
    ]
    whole = Matrix(format, (rows, columns), tuple(planes))
    return whole if source.shape[0] == rows else whole.rows(*source.rows)


def _scattered(files: _Files, source: Source, stored: StoredTensor, format: Format) -> Tensor:
    """Plain numbers that do not lie one after another, where they lie."""
    assert isinstance(format, Dense), "quantised matrices of one plane lie row by row"
    shape = stored.shape[1:]
    entry = files.view(stored, format.dtype, (source.entry or 0) * math.prod(shape), shape)
    rows = entry.t() if source.transposed else entry
    return rows[slice(*source.rows)]


_stay = sender_to(torch.device("cpu"))


def _converted(weight: Weight, source: Source, wanted: str, send: Send) -> Weight:
    """A copy in the format `wanted`. Raises WeightsError for planes that contradict each other."""
    try:
        if source.heads:
            whole = _copied(weight, wanted, send, source.added)
            return of_heads(whole, source).reshape(source.shape).contiguous()
        if wanted in NUMBER_BYTES:
            return _copied(weight, wanted, send, source.added)
        assert isinstance(weight, Matrix)
        format = weight.format
        planes = weight.planes
        if isinstance(format, Repacked):
            planes = format.repacked(planes)
            format = format.target
        elif format.name != wanted:  # blocks, where kernels read planes
            format = format_named(wanted)
            return Matrix(format, weight.shape, planes_of_blocks(send(planes[0].contiguous())))
    except ValueError as cause:
        raise WeightsError(f"tensor {source.name!r} cannot be repacked: {cause}") from None
    return Matrix(format, weight.shape, tuple(send(plane.contiguous()) for plane in planes))


def _taken(decoder: Decoder, source: Source) -> Weight:
    """What a decoder has computed with for an expert's source, which is a hole from now on."""
    name, _, number = source.parameter.rpartition(".")
    weights = decoder.get_submodule(name)
    assert isinstance(weights, WeightList)
    weight = weights.held()[int(number)]
    assert weight is not None, "what goes was there"
    weights.hold(int(number), None)
    return weight


def _copied(weight: Weight, wanted: str, send: Send, added: float) -> Tensor:
    """A copy in the plain numbers `wanted`, on a device, with what is added to each."""
    dtype = getattr(torch, wanted)
    if isinstance(weight, Matrix):
        return send(weight.widened(dtype))
    there = send(weight)
    copy = there.to(dtype, copy=there is weight, memory_format=torch.contiguous_format)
    return copy.add_(added) if added else copy


def _put(module: nn.Module, leaf: str, weight: Weight, *, requires_grad: bool) -> None:
    """Plain numbers become a parameter; a matrix of another format takes a parameter's place."""
    if isinstance(weight, Tensor):
        module.register_parameter(leaf, nn.Parameter(weight, requires_grad=requires_grad))
    elif isinstance(module, WeightList):
        module.hold(int(leaf), weight)
    elif isinstance(module, Weighted) and leaf == "weight":
        module.hold(weight)
    else:
        raise WeightsError(
            f"a {type(module).__name__} holds no {weight.format.name} matrix as its {leaf}"
        )


def _check_all_have_a_source(decoder: Decoder, sources: Iterable[Source]) -> None:
    """Raises WeightsError naming what would stay without values: nothing but a source takes a
    tensor off meta."""
    tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    found = {source.parameter: source.shape for source in sources}
    bare = [
        name
        for name, tensor in tensors.items()
        if tensor.is_meta and found.get(name) != tuple(tensor.shape)
    ]
    if bare:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise WeightsError(
            f"no tensor of a {decoder.config.model_type} checkpoint holds the values of "
            f"{bare[0]}{more}; what config.json describes cannot be loaded"
        )
