"""What a record and the module that it describes agree on: parameters, and where they go."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from moebius.nn.rope import RopeConfig, Rotary
from moebius.ops import Ops

Norm = Literal["rounded", "float32", "zero-centred", "less-mean"]


class Parameter(NamedTuple):
    """One parameter of a module, before there is any.

    name      in the module
    shape     its sizes
    role      what layouts of checkpoints call it by: its name, but for an expert's number
    expert    the expert whose matrix it is, of `experts`; None for what belongs to no one expert
    float32   it stays float32 in a model of any dtype
    norm      it is an RMSNorm's weight, and held as the model's norms are (ModelConfig.norm)
    """

    name: str
    shape: tuple[int, ...]
    role: str = ""
    expert: int | None = None
    experts: int = 1
    float32: bool = False
    norm: bool = False

    def within(self, prefix: str) -> "Parameter":
        """The same parameter, seen from a module that has this one's under `prefix`."""
        return self._replace(name=prefix + self.name, role=prefix + (self.role or self.name))


@dataclass(frozen=True, slots=True)
class Place:
    """What a layer's modules are built with.

    rotaries   those that the model's layers share: equal ropes are worked out once a step
    """

    ops: Ops
    hidden_size: int
    norm_eps: float
    dtype: torch.dtype
    layer: int = 0
    norm: Norm = "rounded"
    rotaries: dict[tuple[RopeConfig | None, int], Rotary] = field(default_factory=dict)

    @property
    def norm_dtype(self) -> torch.dtype:
        """Of norms' weights."""
        return self.dtype if self.norm == "rounded" else torch.float32

    def rotary(self, rope: RopeConfig | None, head_dim: int) -> Rotary:
        """The rotation of heads of this size; None turns nothing (NoPE)."""
        key = (rope, head_dim)
        if key not in self.rotaries:
            self.rotaries[key] = Rotary(rope, head_dim, self.ops)
        return self.rotaries[key]


Parameters = Iterator[Parameter]
