"""What every mixer is to the rest: a record that knows parameters, cache and module, and no more.

A new kind of mixer is a file in mixers/. It holds the record; the module; and, where it keeps
something that no mixer kept before, a protocol such as `Attends`, by which the module reaches it.
That protocol then joins `Past`, and the two pasts there are (paged.py, packed.py) learn to answer.
The decoder, the layouts and the engine do not change. What an encoder's layers ask for, the pasts
of such models alone answer (mixers/source_past.py).
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from moebius.nn.attention import Attends
from moebius.nn.mixers.latent import AttendsLatent
from moebius.nn.mixers.recurs import Recurs
from moebius.nn.rope import Positions
from moebius.nn.spec import Parameters, Place
from moebius.ops import Use
from moebius.ops.cache_spec import CacheSpec


class Past(Attends, AttendsLatent, Recurs, Protocol):
    """All that mixers ask of whoever runs a step. Made for one step, and handed through to each."""


class MixerModule(Protocol):
    """A mixer at work in one layer: an nn.Module."""

    def __call__(self, x_TD: Tensor, positions: Positions, past: Past) -> Tensor:
        """What is added to the residual stream (T, D), of the step's normed rows."""


class Mixer(Protocol):
    """How a layer's tokens learn of those before them: one frozen record for each kind."""

    @property
    def activations(self) -> int:
        """Numbers that a token takes at the widest moment, in and out of the projections."""

    @property
    def scores(self) -> int:
        """Numbers for each token and each that it sees, where plain PyTorch keeps them; 0: none."""

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of the module, in a model of this width."""

    def cache(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> CacheSpec:
        """What a layer keeps of the past, in a model of this dtype.

        kv_dtype: what keys and values are held in; None: as they are computed.
        """

    def uses(self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Iterator[Use]:
        """What serving it in this dtype asks of a backend."""

    def build(self, place: Place) -> MixerModule:
        """The module, with uninitialised parameters."""
