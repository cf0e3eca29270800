"""Linear layers, logits and experts by torch's own products, in place of this project's kernels:
what promise P1 does without.

torch takes the kernel, and with it the order of sums, that suits the number of rows; so a row's
bits depend on its company. Experts are computed as other engines' plain PyTorch has them: rows in
the order of their experts, a grouped product for gate and up together, one for down, and a weighted
sum.

Legend of shape suffixes: moebius.ops; P choices in the order of their experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops import ExpertWeights
from moebius.ops.reference import ReferenceOps

DTYPE = torch.bfloat16


def grouped_mm() -> Callable[..., Tensor]:
    """Under its name in this torch. Raises AttributeError where there is none."""
    return getattr(F, "grouped_mm", None) or torch._grouped_mm


class Stacked(NamedTuple):
    """The experts of a layer in two tensors.

    gate_up_EID   (E, 2F, D), gates before ups
    down_EDF
    numbers_E     1 to E
    """

    gate_up_EID: Tensor
    down_EDF: Tensor
    numbers_E: Tensor

    @classmethod
    def of(cls, experts: ExpertWeights) -> Stacked:
        gate_EFD = torch.stack(list(experts.gate_FD))
        up_EFD = torch.stack(list(experts.up_FD))
        numbers_E = torch.arange(1, len(gate_EFD) + 1, device=gate_EFD.device)
        down_EDF = torch.stack(list(experts.down_DF))
        return cls(torch.cat((gate_EFD, up_EFD), dim=1), down_EDF, numbers_E)


def experts_by_torch(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, stacked: Stacked) -> Tensor:
    """As Ops.experts, of experts with SiLU: (T, D)."""
    product = grouped_mm()
    rows, top_k = ids_TK.shape
    if not rows:  # as in the step that warms up
        return torch.empty_like(x_TD)
    sorted_P, order_P = ids_TK.flatten().sort()
    ends_E = torch.searchsorted(sorted_P, stacked.numbers_E, out_int32=True)
    x_PD = x_TD[order_P // top_k]
    both_PI = product(x_PD, stacked.gate_up_EID.transpose(1, 2), offs=ends_E)
    gate_PF, up_PF = both_PI.chunk(2, dim=1)
    inner_PF = F.silu(gate_PF) * up_PF
    out_PD = product(inner_PF, stacked.down_EDF.transpose(1, 2), offs=ends_E)
    back_PD = torch.empty_like(out_PD).index_copy_(0, order_P, out_PD)
    of_choices_TKD = back_PD.view(rows, top_k, x_TD.shape[1])
    return torch.bmm(weights_TK.unsqueeze(1).to(x_TD.dtype), of_choices_TKD).squeeze(1)


class TorchProducts:
    """Computes what backends of a class would, where rows and weights are bfloat16.

    replaced: how often each operation was torch's.
    """

    def __init__(self, backend: type[ReferenceOps]) -> None:
        self.replaced = Counter[str]()
        self._backend = backend
        # By the identity of the handles, which are kept with what was made of them.
        self._joined: dict[int, tuple[object, Tensor, Tensor | None]] = {}
        self._stacked: dict[int, tuple[object, Stacked]] = {}

    def forget(self) -> None:
        """Weights have become others."""
        self._joined.clear()
        self._stacked.clear()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the backend's products are torch's."""
        products = self
        backend = self._backend
        plain_linear = backend.linear
        plain_logits = backend.logits
        plain_experts = backend.experts

        def linear(ops: Any, x_TI: Tensor, layers: Any) -> Tensor:
            if not _plain(x_TI, [weight for weight, _ in layers.layers]):
                return plain_linear(ops, x_TI, layers)
            return products._linear("linear", x_TI, layers)

        def logits(ops: Any, x_TI: Tensor, layers: Any) -> Tensor:
            if not _plain(x_TI, [weight for weight, _ in layers.layers]):
                return plain_logits(ops, x_TI, layers)
            return products._linear("logits", x_TI, layers).float()

        def experts(
            ops: Any, x_TD: Tensor, weights_TK: Tensor | None, ids_TK: Tensor | None, given: Any
        ) -> Tensor:
            plain = getattr(given, "plain", given)
            held = plain.weights
            usual = _plain(x_TD, [*held.gate_FD, *held.up_FD, *held.down_DF]) and held.up_FD
            if not usual or plain.activation != "silu" or held.gate_bias_F or ids_TK is None:
                return plain_experts(ops, x_TD, weights_TK, ids_TK, given)
            return products._experts(x_TD, weights_TK, ids_TK, given, held)

        with mock.patch.multiple(backend, linear=linear, logits=logits, experts=experts):
            yield

    def _linear(self, operation: str, x_TI: Tensor, layers: Any) -> Tensor:
        self.replaced[operation] += 1
        if id(layers) not in self._joined:
            self._joined[id(layers)] = (layers, *_side_by_side(layers.layers))
        _, weight_OI, bias_O = self._joined[id(layers)]
        return F.linear(x_TI, weight_OI, bias_O)

    def _experts(
        self, x_TD: Tensor, weights_TK: Any, ids_TK: Tensor, given: object, held: ExpertWeights
    ) -> Tensor:
        self.replaced["experts"] += 1
        if id(given) not in self._stacked:
            self._stacked[id(given)] = (given, Stacked.of(held))
        return experts_by_torch(x_TD, weights_TK, ids_TK, self._stacked[id(given)][1])


def _plain(x: Tensor, weights: Sequence[object]) -> bool:
    return x.dtype == DTYPE and all(
        isinstance(weight, Tensor) and weight.dtype == DTYPE for weight in weights
    )


def _side_by_side(layers: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Layers of one input as one. A single one stays where it is."""
    if len(layers) == 1:
        return layers[0]
    weight_OI = torch.cat([weight for weight, _ in layers])
    if all(bias is None for _, bias in layers):
        return weight_OI, None
    biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in layers]
    return weight_OI, torch.cat(biases)
