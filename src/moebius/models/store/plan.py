"""How a parameter is held: read where it lies in its file, or copied. No torch.

Plan and loading both ask here, so that they cannot disagree.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from moebius.models.layout import Source
from moebius.models.store.tensors import NUMBER_BYTES, StoredTensor, readings


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """One parameter as it will be held.

    mapped   read from the file as it lies there
    near     copied as it lies there, into this process's own memory; copied and converted where it
             is neither
    format   of what is held: the file's of what is mapped or near; else what the model computes in,
             or what a matrix is repacked to that nothing reads as it is stored
    count    numbers, however many bytes they take
    split    the heads' part of a tensor that has more of each: in plain numbers, whatever it is
             stored as
    on_host  in the host's memory, beside a device that has the rest in its own
    """

    name: str
    mapped: bool
    format: str
    count: int
    nbytes: int
    near: bool = False
    split: bool = False
    on_host: bool = False

    def named(self, name: str, *, on_host: bool = False) -> "PlannedWeight":
        """The same of another parameter."""
        held = (self.mapped, self.format, self.count, self.nbytes, self.near, self.split)
        return PlannedWeight(name, *held, on_host)

    @property
    def repacked(self) -> bool:
        """Copied into another format of codes and scales, which stands for the same numbers."""
        return not (self.mapped or self.near or self.format in NUMBER_BYTES)


def planned_weight(
    source: Source,
    stored: StoredTensor,
    dtype: str,
    device: str,
    formats: Collection[str],
    *,
    near: bool = False,
) -> PlannedWeight:
    """How `source` is held on `device` by a model that computes in `dtype`.

    near: what could be mapped is copied instead. Rows that are scattered in a tensor are copied, as
    they are stored; but those of an expert's quantised gate and up that take turns are read there.

    Numbers of that very dtype are mapped, unless something is to be added to them, and matrices in
    one of `formats`, which widen to it exactly. Vectors (norms, biases) take kilobytes: they always
    have the model's dtype. Devices other than the CPU hold copies, in which quantised matrices stay
    what they are too.
    """
    wanted = "float32" if source.float32 else dtype
    count = math.prod(source.shape)
    name = source.parameter

    def read(format: str) -> bool:
        return len(source.shape) == 2 and any(
            name in formats for name in readings(format, source.shape[1])
        )

    format = str(stored.format)
    here = device == "cpu"
    if source.heads:
        held = format if here and format in NUMBER_BYTES and format in formats else wanted
        return PlannedWeight(name, False, held, count, count * NUMBER_BYTES[held], split=True)
    same = format == wanted and not source.added
    if (same or read(format)) and (here or format not in NUMBER_BYTES):
        nbytes = stored.nbytes * count // math.prod(stored.shape)
        if source.scattered:
            mapped = here and not near and source.takes_turns and format not in NUMBER_BYTES
            return PlannedWeight(name, mapped, format, count, nbytes)
        if stored.start % NUMBER_BYTES.get(format, 1) == 0:
            return PlannedWeight(name, here and not near, format, count, nbytes, here and near)
    if stored.repacking is not None and read(stored.repacking.format):
        format, nbytes = stored.repacking
        nbytes = nbytes * source.shape[0] // stored.shape[-2]
        return PlannedWeight(name, False, format, count, nbytes)
    return PlannedWeight(name, False, wanted, count, count * NUMBER_BYTES[wanted])
