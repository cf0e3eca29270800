"""Gemma 4's attention: values are normed, without a weight. In some layers they are the keys as
they were projected, and some layers attend over what another one kept.

Where values are keys, a cache holds both all the same: the one is normed with a weight and turned,
and the other is not.
"""

from dataclasses import dataclass

import torch

from moebius.nn.attention import GQA, Attention
from moebius.nn.spec import Parameters, Place
from moebius.ops.cache_spec import CacheSpec
from moebius.ops.config import HeadRows


@dataclass(frozen=True, slots=True)
class NormedValues(GQA):
    """Grouped-query attention whose values are normed each head by itself.

    keys_as_values   values have no projection: they are the keys before these are normed and turned
    kept_by          the layer whose keys and values it attends over; None for its own
    """

    keys_as_values: bool = False
    kept_by: int | None = None

    @property
    def without(self) -> frozenset[str]:
        """Parts of other attention that this one lacks."""
        if self.kept_by is not None:
            return frozenset({"k_proj", "v_proj", "k_norm"})
        return frozenset({"v_proj"} if self.keys_as_values else ())

    @property
    def rows(self) -> HeadRows:
        """How a token's row holds them."""
        return HeadRows(
            keys_as_values=self.keys_as_values,
            normed_values=True,
            queries_alone=self.kept_by is not None,
        )

    # Plain super() knows a class before it has slots, and not this one.
    def parameters(self, hidden_size: int) -> Parameters:
        """Those of NormedValuesAttention."""
        for parameter in GQA.parameters(self, hidden_size):
            if parameter.name.partition(".")[0] not in self.without:
                yield parameter

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """Keys and values of the window's tokens; nothing, where they are another layer's."""
        return CacheSpec() if self.kept_by is not None else GQA.cache(self, dtype, kv_dtype)

    def build(self, place: Place) -> "NormedValuesAttention":
        return NormedValuesAttention(self, place)


class NormedValuesAttention(Attention):
    """The module of NormedValues at one layer."""

    def __init__(self, spec: NormedValues, place: Place) -> None:
        super().__init__(spec, place)
        for name in spec.without:
            setattr(self, name, None)
        if spec.kept_by is not None:
            self.layer = spec.kept_by
            assert self.q_norm is not None, "its queries are normed"
            self.head_norms = (self.q_norm, self.q_norm)
