"""A checkpoint's tensors into a Decoder, where they lie in their files wherever that can be."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from moebius.errors import WeightsError
from moebius.models.decoder import Decoder
from moebius.models.layout import Source
from moebius.models.store.checkpoint import Checkpoint, open_checkpoint
from moebius.models.store.mapped import MappedFiles
from moebius.models.store.tensors import StoredTensor
from moebius.nn.linear import Weighted, WeightList
from moebius.ops import FORMATS, Matrix, Ops, Weight, select_ops
from moebius.ops.weights import Dense, dtype_name


def load_decoder(
    checkpoint: Checkpoint | Path | str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ops: Ops | None = None,
    *,
    mapped: bool = True,
    into: Decoder | None = None,
) -> Decoder:
    """A decoder with a checkpoint's weights, which computes in `dtype` on `device`.

    On a CPU, tensors are used where they lie in the mapped file if they are stored as `dtype`, or
    are matrices in a format that the backend reads in place: loading copies nothing and processes
    share the pages. All others are copied as `dtype`; Checkpoint.plan_weights says which. Mapped
    weights cannot be written and take no gradient; mapped=False copies all of them, as `dtype`, for
    training. `into` is a decoder of this configuration that has no memory yet, where there is one.
    Raises ConfigError or WeightsError before anything is allocated.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    device = torch.device(device)
    decoder = into
    if decoder is None or not decoder.norm.weight.is_meta:
        decoder = Decoder(checkpoint.config, ops or select_ops(device, dtype), dtype, device="meta")
    _check_all_have_a_source(decoder, checkpoint.sources)
    formats = decoder.ops.formats(dtype) if mapped else frozenset[str]()
    planned = checkpoint.plan_weights(dtype_name(dtype), device.type, formats)
    files = MappedFiles()
    modules = dict(decoder.named_modules())
    for source, plan in zip(checkpoint.sources, planned, strict=True):
        weight = _view(files, source, checkpoint.tensors[source.name])
        if not plan.mapped:
            weight = _copied(weight, plan.format, device)
        elif not mapped and isinstance(weight, Tensor):
            weight = weight.clone()
        module, _, leaf = source.parameter.rpartition(".")
        _put(modules[module], leaf, weight, requires_grad=not mapped)
    return decoder


def _view(files: MappedFiles, source: Source, stored: StoredTensor) -> Weight:
    """The source's values where they lie, as they are stored."""
    format = FORMATS[str(stored.format)]
    first_row = 0
    if source.entry is not None:
        first_row = source.entry * source.stored_shape[1] + source.start
    if isinstance(format, Dense):
        skipped = first_row * math.prod(source.stored_shape[2:])
        return files.view(stored, format.dtype, skipped, source.shape)
    rows, columns = source.shape
    ((dtype, shape),) = format.planes(rows, columns)
    plane = files.view(stored, dtype, first_row * math.prod(shape[1:]), shape)
    return Matrix(format, (rows, columns), (plane,))


def _copied(weight: Weight, wanted: str, device: torch.device) -> Tensor:
    """A copy in the plain numbers `wanted`, on a device."""
    dtype = getattr(torch, wanted)
    if isinstance(weight, Matrix):
        return weight.widened(dtype).to(device)
    return weight.to(device, dtype, copy=True)


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
