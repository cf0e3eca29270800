"""Experts in the host's memory beside a device that computes all else: rows go to them, and never
they to the rows.

Where an expert lies is said once, before anything is loaded, and with it which kernel computes it,
for all requests; nothing moves it between the two while it serves. So promise P1 holds as far as it
holds for either kernel. A layer's rows are summed on the device in routing order, wherever each was
computed.

Shapes: R tokens with a choice on the host, P such choices; the others as in moebius.ops.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Self, TypeVar

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.moe.crossing import Crossing, CrossingRows, crossing
from moebius.moe.dispatch import Dispatcher, LocalDispatcher
from moebius.moe.experts import Experts
from moebius.moe.router import Routing
from moebius.ops import ExpertWeights, Ops, PreparedExperts
from moebius.ops.host import HostResult

Kind = TypeVar("Kind")


class HostExperts:
    """Which experts of each layer lie in the host's memory, and what computes them there.

    ops       the host's
    held      the experts on the host, by the layer's number
    experts   how many each layer has
    most      what crosses in a step at most

    Raises ConfigError for an expert or a layer that there is not.
    """

    def __init__(
        self,
        ops: Ops,
        held: Mapping[int, Collection[int]],
        experts: Mapping[int, int],
        most: CrossingRows,
    ) -> None:
        for layer, numbers in held.items():
            odd = sorted(set(numbers) - set(range(experts.get(layer, 0))))
            if odd:
                raise ConfigError(
                    f"expert {odd[0]} of layer {layer} is to lie on the host, but the layer has "
                    f"{experts.get(layer, 0)} experts"
                )
        self.ops = ops
        self.most = most
        self.experts = dict(experts)
        self._held = {layer: frozenset(held.get(layer, ())) for layer in experts}
        self._crossing: Crossing | None = None

    def again(self) -> Self:
        """The same for another decoder, whose rows cross by a way of their own."""
        return type(self)(self.ops, self._held, self.experts, self.most)

    @property
    def formats(self) -> frozenset[str]:
        """Formats of matrices that are read in place here."""
        return self.ops.formats(self.most.dtype)

    def require(self, experts: Mapping[int, int]) -> None:
        """Raises ConfigError where these are not how many experts each layer has."""
        if self.experts != experts:
            raise ConfigError(
                f"layers have {dict(experts)} experts, but {self.experts} were placed"
            )

    def held(self, layer: int) -> None:
        """No expert of any layer is another rank's."""

    def holds(self, layer: int, expert: int) -> bool:
        """Whether this expert of a layer lies on the host."""
        return expert in self._held[layer]

    def on_host(self, layer: int) -> frozenset[int]:
        return self._held[layer]

    def on_device(self, layer: int) -> frozenset[int]:
        return frozenset(range(self.experts[layer])) - self._held[layer]

    def crossing(self, device: torch.device) -> Crossing:
        """The way of all layers' rows from a device to here and back, made at its first use."""
        if self._crossing is None:
            self._crossing = crossing(device, self.most)
        return self._crossing

    def dispatcher(self, ops: Ops, layer: int) -> Dispatcher:
        """How the tokens of a layer get to their experts; `ops` are the device's."""
        if not self._held.get(layer):
            return LocalDispatcher()
        return HostDispatcher(ops, self, layer)


class HostDispatcher:
    """One layer's: the device computes its own experts while the host computes the others."""

    def __init__(self, ops: Ops, host: HostExperts, layer: int) -> None:
        self._ops = ops
        self._host = host
        count = host.experts[layer]
        self._on_device = _Part(ops, host.on_device(layer), count)
        self._on_host = _Part(host.ops, host.on_host(layer), count, mapped=True)

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        assert routing.kept_TK is None, "only training drops choices"
        ids_TK = routing.expert_ids_TK
        top_k = ids_TK.shape[1:]
        given = [x_TD, ids_TK]
        if self._on_device.numbers:
            own = HostResult(ids_TK, top_k, ids_TK.dtype)
            (own_TK,) = self._ops.host(self._ask, given, [own])
            given.append(self._on_device.rows(x_TD, own_TK, experts))
        answer = partial(self._answer, experts)
        found = HostResult(x_TD, (*top_k, *x_TD.shape[1:]), x_TD.dtype)
        (rows_TKD,) = self._ops.host(answer, given, [found])
        return self._ops.combine(rows_TKD, routing.weights_TK)

    def _ask(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Mapping[str, int]:
        """Let the choices come to the host; the device gets its own."""
        x_TD, ids_TK = inputs
        self._host.crossing(ids_TK.device).begin(ids_TK, x_TD)
        outputs[0].copy_(self._on_device.own(ids_TK))
        return {}

    def _answer(
        self, experts: Experts, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Mapping[str, int]:
        """Compute the host's choices, and put them among the device's."""
        x_TD, ids_TK, *device_rows = inputs
        (out_TKD,) = outputs
        way = self._host.crossing(ids_TK.device)
        for rows_TKD in device_rows:
            out_TKD.copy_(rows_TKD)
        if not device_rows:
            way.begin(ids_TK, x_TD)
        own_TK = self._on_host.own(way.ids(ids_TK))
        chosen_TK = own_TK != self._on_host.count
        tokens_R = chosen_TK.any(1).nonzero().squeeze(1)
        if not len(tokens_R):
            return {}
        rows_RD = way.rows(tokens_R)
        answers_RKD = self._on_host.rows(rows_RD, own_TK[tokens_R], experts)
        answers_PD = answers_RKD[chosen_TK[tokens_R]]
        places_P = chosen_TK.flatten().nonzero().squeeze(1)
        way.give(answers_PD, places_P, out_TKD.flatten(0, 1))
        return {}


class _Part:
    """Those of a layer's experts that one backend computes; `count` is how many there are in all,
    and stands for none of these. mapped: they may lie in files."""

    def __init__(
        self, ops: Ops, numbers: frozenset[int], count: int, *, mapped: bool = False
    ) -> None:
        self.numbers = numbers
        self.count = count
        self._ops = ops
        self._mapped = mapped
        own = [e if e in numbers else count for e in range(count)]
        self._table_E = torch.tensor(own, device="cpu")
        self._prepared: PreparedExperts | None = None
        self._made_at = 0

    def own(self, ids_TK: Tensor) -> Tensor:
        """The choices that are of these, on the device that they came on."""
        if self._table_E.device != ids_TK.device:
            self._table_E = self._table_E.to(ids_TK.device)
        return self._table_E[ids_TK]

    def rows(self, x_RD: Tensor, ids_RK: Tensor, experts: Experts) -> Tensor:
        """Each choice's output (R, K, D)."""
        return self._ops.expert_rows(x_RD, ids_RK, self._handle(experts, x_RD.dtype))

    def _handle(self, experts: Experts, dtype: torch.dtype) -> PreparedExperts:
        """The backend's, made anew when a parameter of the model became another."""
        changes = experts.gate_proj.changes.count
        if self._prepared is None or self._made_at != changes:
            weights = _only(experts.weights(), self.numbers)
            on_disk = self._mapped and experts.on_disk
            self._prepared = self._ops.prepare_experts(
                weights, experts.activation, dtype, on_disk=on_disk
            )
            self._made_at = changes
        return self._prepared


def _only(weights: ExpertWeights, numbers: frozenset[int]) -> ExpertWeights:
    """Of these experts; the others become holes."""

    def of(kind: Sequence[Kind | None]) -> list[Kind | None]:
        return [each if e in numbers else None for e, each in enumerate(kind)]

    return ExpertWeights(
        of(weights.gate_FD),
        of(weights.up_FD),
        of(weights.down_DF),
        of(weights.gate_bias_F),
        of(weights.up_bias_F),
        of(weights.down_bias_D),
    )
