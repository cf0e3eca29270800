"""Experts over the ranks that train together; all else is at each of them.

Each rank has some rows of every micro-batch, in the order of ranks, and each layer's experts in the
order of their numbers. A token's row goes to the rank of each expert that it chose, in the order of
experts, and there stands in the order of the batch's tokens: experts see the rows that they would
see in one process, in that order, and so do their gradients.

Shape legend: T tokens here, K choices a token, P pairs of both, R rows received, N ranks, E
experts, H experts here, D hidden size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebius.moe.dispatch import Dispatcher, LocalDispatcher
from moebius.moe.experts import Experts
from moebius.moe.placement import Placement
from moebius.moe.ranks import ExpertRank
from moebius.moe.router import Routing
from moebius.moe.share import BatchShare
from moebius.ops import Ops
from moebius.ops.reference.choices import in_choices, to_experts
from moebius.train.ops import TrainingOps
from moebius.train.ranks import Ranks


class RowsHere(BatchShare):
    """Rows `first` and on of `of`, which ranks hold in their order."""

    def __init__(self, ranks: Ranks, first: int = 0, of: int = 0) -> None:
        self._ranks = ranks
        self.first = first
        self.of = of

    def total(self, tokens: int) -> int:
        return self.of

    def drawn(self, like: Tensor, fill: Callable[[Tensor], Tensor]) -> Tensor:
        whole = fill(like.new_empty(self.of, *like.shape[1:]))
        return whole[self.first : self.first + len(like)]

    def ahead(self, counts_KE: Tensor) -> Tensor:
        counts_NKE = self._ranks.all_gather(counts_KE)
        before_KE = super().ahead(counts_NKE.sum(0))
        return before_KE + counts_NKE[: self._ranks.rank].sum(0)


class TrainingRank(ExpertRank):
    """One rank's part in training experts that are shared out: it needs no exchange to join.

    experts   how many each layer has, by its number

    Raises ConfigError for more ranks than experts.
    """

    def __init__(self, experts: Mapping[int, int], ranks: Ranks) -> None:
        super().__init__(Placement.linear(experts, ranks.count), ranks.rank, tokens=1)
        self._ranks = ranks

    def dispatcher(self, ops: Ops, layer: int) -> Dispatcher:
        if layer not in self.placement.layers:
            return LocalDispatcher()
        assert isinstance(ops, TrainingOps)
        return TrainingDispatcher(ops, self._ranks, self.placement.layers[layer].held)

    def owner(self, name: str) -> int | None:
        """The rank of a parameter of the decoder; None for one that all ranks have."""
        layer, expert = _expert(name)
        placed = None if expert is None else self.placement.layers.get(layer)
        if placed is None or expert is None:
            return None
        return next(rank for rank, held in enumerate(placed.held) if expert in held)

    def gather(
        self, mine: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        """Tensors of all ranks, at rank 0 and on the CPU; nothing elsewhere.

        mine: those that are here by name. shapes: of all of them. They travel a layer at a time.
        """
        owners = {name: self.owner(name) for name in shapes}
        found: dict[str, Tensor] = {}
        for layer in self.placement.layers:
            # What rank 0 has itself, or all have, need not travel.
            names = [name for name, owner in owners.items() if owner and _expert(name)[0] == layer]
            found |= self._gathered(names, owners, mine, shapes)
        if self.rank:
            return {}
        here = {name: x.detach().cpu() for name, x in mine.items()}
        return {name: found[name] if owners[name] else here[name] for name in shapes}

    def _gathered(
        self,
        names: Iterable[str],
        owners: Mapping[str, int | None],
        mine: Mapping[str, Tensor],
        shapes: Mapping[str, torch.Size],
    ) -> dict[str, Tensor]:
        """Those of other ranks than 0."""
        from_rank = _by_owner(names, owners, self._ranks.count)
        like = next(iter(mine.values()))
        flat = [mine[name].detach().flatten() for name in from_rank[self.rank]]
        sent = torch.cat(flat) if flat else like.new_empty(0)
        sizes = [sum(shapes[name].numel() for name in each) for each in from_rank]
        nothing = [0] * len(sizes)
        counts_to = [len(sent), *nothing[1:]]
        received = self._ranks.all_to_all(sent, counts_to, nothing if self.rank else sizes).cpu()
        if self.rank:
            return {}
        ordered = [name for each in from_rank for name in each]
        parts = torch.split(received, [shapes[name].numel() for name in ordered])
        return {name: x.view(shapes[name]) for name, x in zip(ordered, parts, strict=True)}


def _by_owner(
    names: Iterable[str], owners: Mapping[str, int | None], count: int
) -> list[list[str]]:
    """The names that each of `count` ranks has; those that all have are rank 0's."""
    found: list[list[str]] = [[] for _ in range(count)]
    for name in names:
        found[owners[name] or 0].append(name)
    return found


class Counts(NamedTuple):
    """Who sends whom how many rows in a layer.

    to, from_   of this rank's rows to each rank, of each rank's to this one
    here_NH     of each rank, for each expert that is here
    first       how many choices of the whole batch are of experts before those here
    total       how many there are
    """

    to: Sequence[int]
    from_: Sequence[int]
    here_NH: Tensor
    first: int
    total: int


class TrainingDispatcher:
    """One layer's: rows to their experts and back, and in the backward pass their gradients.

    Counts go first, so that nothing is padded.
    """

    def __init__(self, ops: TrainingOps, ranks: Ranks, held: Sequence[Sequence[int]]) -> None:
        self.ops = ops
        self.ranks = ranks
        self.sizes = [len(each) for each in held]
        self.first = list(accumulate(self.sizes, initial=0))[ranks.rank]

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        ids_TK = routing.expert_ids_TK
        if routing.kept_TK is not None:
            ids_TK = ids_TK.masked_fill(~routing.kept_TK, sum(self.sizes))
        top_k = ids_TK.shape[1]
        order_P = torch.argsort(ids_TK.reshape(-1), stable=True)
        counts = self._counts(ids_TK)
        rows_PD = to_experts(x_TD, order_P, top_k, sum(counts.to))
        rows_RD = _all_to_all(rows_PD, self.ranks, counts.to, counts.from_)
        here_H = torch.arange(len(counts.here_NH[0])) + self.first
        ids_R = here_H.repeat(self.ranks.count).repeat_interleave(counts.here_NH.flatten())
        # Those of no expert are drawn for too where they are computed along.
        total = self.ops.tokens.total(len(x_TD)) * top_k if self.ops.kernels else counts.total
        self.ops.choices = RowsHere(self.ranks, counts.first, total)
        outputs_RD = experts.rows(rows_RD, ids_R.to(x_TD.device).unsqueeze(1)).squeeze(1)
        back_PD = _all_to_all(outputs_RD, self.ranks, counts.from_, counts.to)
        return self.ops.combine(in_choices(back_PD, order_P, top_k), routing.weights_TK)

    def _counts(self, ids_TK: Tensor) -> Counts:
        """The one wait for the device."""
        experts = sum(self.sizes)
        counts_E = ids_TK.new_zeros(experts + 1)
        counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK.flatten()))
        counts_NE = self.ranks.all_gather(counts_E[:experts]).cpu()
        rank = self.ranks.rank
        here = slice(self.first, self.first + self.sizes[rank])
        to = [int(each.sum()) for each in torch.split(counts_NE[rank], self.sizes)]
        here_NH = counts_NE[:, here]
        first = int(counts_NE[:, : self.first].sum())
        return Counts(to, here_NH.sum(1).tolist(), here_NH, first, int(counts_NE.sum()))


class _AllToAll(torch.autograd.Function):
    """Ranks.all_to_all, and back for gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, ranks: Ranks, to: Sequence[int], from_: Sequence[int]
    ) -> Tensor:
        ctx.ranks = ranks
        ctx.to = to
        ctx.from_ = from_
        return ranks.all_to_all(rows.contiguous(), to, from_)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.ranks.all_to_all(grads[0].contiguous(), ctx.from_, ctx.to), None, None, None


def _all_to_all(rows_PD: Tensor, ranks: Ranks, to: Sequence[int], from_: Sequence[int]) -> Tensor:
    rows_RD: Tensor = _AllToAll.apply(rows_PD, ranks, to, from_)  # type: ignore[no-untyped-call]
    return rows_RD


def _expert(name: str) -> tuple[int, int | None]:
    """Layer and number of the expert that a parameter is of, as layers.3.mlp.experts.up_proj.5."""
    parts = name.split(".")
    if ".experts." not in name:
        return -1, None
    return int(parts[1]), int(parts[-1])
