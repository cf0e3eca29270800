"""The operations of multi-head latent attention (arXiv 2405.04434 section 2.1), in one form for
prompts and single tokens alike.

The cache holds of each token a latent, from which all heads' keys and values are made, and the part
of a key that turns, which all heads share. Neither keys nor values are made: a query meets latents
once it was multiplied by its head's key matrix, and what a head found among latents is multiplied
by its value matrix (the "absorbed" form). So to `Ops.paged_attention` there is one key head, whose
values are the first ones of its keys.

Shape legend, beside that of moebius.ops: C size of a latent, P of the part of a key that turns, O
and I rows and columns of a head's own matrix.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moebius.ops.config import Temperature
from moebius.ops.prepared import LayerCache, PreparedHeads
from moebius.ops.steps import Rotation
from moebius.ops.weights import Weight


class LatentOps(ABC):
    """The part of `Ops` that latent attention asks for."""

    @abstractmethod
    def prepare_heads(
        self, weight: Weight, heads: int, dtype: torch.dtype | None = None
    ) -> PreparedHeads:
        """What `head_products` needs to know of the heads' own matrices (H * O, I), one below the
        other. Formats and dtype are as in Ops.prepare_linear."""

    @abstractmethod
    def head_products(self, x_THN: Tensor, heads: PreparedHeads) -> Tensor:
        """Of each head, W x for its first I values, and behind it the others as they are.

        (T, H, O + N - I). Sums in float32 at least, rounded once, as by Ops.linear.
        """

    @abstractmethod
    def rotate_and_store_latent(
        self,
        q_THN: Tensor,
        latent_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        norm_C: Tensor,
        eps: float,
        *,
        temperature: Temperature | None = None,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        """The step's queries (T, H, C + P), whose last P values have turned; latents and keys go to
        the cache, which is one of moebius.ops.cache_spec.latent_spec.

        latent_TI: (T, C + P), a token's latent, to be normed as by Ops.rms_norm, and its key,
        which turns. Queries are last multiplied by the temperature at positions_T (int64), and
        rounded. q_THN itself may be changed.
        """
