"""Matrices that are several tensors of a file, each a plane of theirs, as one stored tensor.

A checkpoint's Quantization says which; what is then planned and loaded is one tensor like any.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from moebius.errors import WeightsError
from moebius.files import short_name
from moebius.models.layout import Source
from moebius.models.quantization import Parts, Plane, Quantization, Scheme
from moebius.models.quantization.record import module_of
from moebius.models.store.tensors import StoredTensor

_EMBEDDING = "embed_tokens"


def is_stored(name: str, tensors: Mapping[str, StoredTensor], kinds: Iterable[Scheme]) -> bool:
    """Whether there is a tensor of this name, or its codes in one of these schemes."""
    return name in tensors or any(kind.codes(name) in tensors for kind in kinds)


def composed(
    sources: Iterable[Source], tensors: Mapping[str, StoredTensor], quantization: Quantization
) -> Mapping[str, StoredTensor]:
    """The tensors, but for each quantised matrix one under its weight's name, and not its parts.

    Raises WeightsError for a part that is missing, or has another shape or dtype than its scheme
    says, and for a matrix that is there in plain numbers too.
    """
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] not in quantization.unread
    }
    matrices: dict[str, StoredTensor] = {}
    for source in sources:
        if len(source.shape) == 2 and source.name not in matrices:
            scheme = _scheme(source, tensors, quantization)
            if scheme is not None:
                matrices[source.name] = _matrix(source, tensors, scheme)
    for name, matrix in matrices.items():
        for part in matrix.parts:
            found.pop(part.name, None)
        if name in found:
            raise WeightsError(
                f"{short_name(matrix.file)}: tensor {name!r} is there in plain numbers, and as "
                f"codes, {matrix.parts[0].name!r}; only one of them can be meant"
            )
    return {**found, **matrices}


def _scheme(
    source: Source, tensors: Mapping[str, StoredTensor], quantization: Quantization
) -> Scheme | None:
    """How a matrix is stored; None for plain numbers, which a quantised checkpoint may have
    anywhere."""
    module = module_of(source.name)
    kind = "Embedding" if module.endswith(_EMBEDDING) else "Linear"
    scheme = quantization.scheme(module, kind)
    if scheme is not None:
        codes = tensors.get(scheme.codes(source.name))
        plain = codes is None or codes.format is not None
        return None if plain else scheme
    for other in quantization.schemes:
        codes = tensors.get(other.codes(source.name))
        if codes is not None and codes.dtype in other.codes_dtypes:
            raise WeightsError(
                f"{short_name(codes.file)}: tensor {codes.name!r} is quantised, but "
                f"quantization_config says that {module!r} is not"
            )
    return None


def _matrix(source: Source, tensors: Mapping[str, StoredTensor], scheme: Scheme) -> StoredTensor:
    codes = tensors[scheme.codes(source.name)]
    shape = source.of_codes.stored_shape
    where = f"{short_name(codes.file)}: tensor {codes.name!r}"
    try:
        parts = scheme.parts(source.name, shape, tensors)
    except ValueError as cause:
        raise WeightsError(
            f"{where} cannot hold the shape {list(shape)} that config.json needs: {cause}"
        ) from None
    planes = tuple(_checked(plane, tensors, where, parts) for plane in parts.planes)
    return replace(
        codes,
        name=source.name,
        format=parts.format,
        shape=shape,
        parts=planes,
        repacking=parts.repacking,
    )


def _checked(
    plane: Plane, tensors: Mapping[str, StoredTensor], codes: str, parts: Parts
) -> StoredTensor:
    stored = tensors.get(plane.name)
    if stored is None:
        raise WeightsError(f"{codes} needs {plane.name!r} beside it, which is missing")
    where = f"{short_name(stored.file)}: tensor {plane.name!r}"
    if stored.dtype not in plane.dtypes:
        raise WeightsError(
            f"{where} has dtype {stored.dtype}; {parts.format} needs {' or '.join(plane.dtypes)}"
        )
    if stored.shape not in plane.shapes:
        wanted = " or ".join(str(list(shape)) for shape in plane.shapes)
        raise WeightsError(
            f"{where} has shape {list(stored.shape)}; with config.json, {parts.format} needs "
            f"{wanted}"
        )
    return stored
