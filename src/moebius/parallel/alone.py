"""The exchange of a rank that has no group yet."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.traffic import Traffic

_EPOCH = Epoch("none", 0)


class Alone(Exchange):
    """As if the other ranks had no tokens, and answered with zeros: for warming up."""

    gathers = True

    def __init__(self, spec: ExchangeSpec, rank: int) -> None:
        super().__init__(spec, rank, _EPOCH, timeout=1.0)
        self._mine_TK = torch.empty(0)

    @property
    def traffic(self) -> Traffic:
        return Traffic()

    def agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(values)]

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        self._check_dispatch(x_TD, ids_TK, owners_CE, rows_RD, ids_RK)
        turns_T = torch.arange(len(x_TD), device=x_TD.device) % len(owners_CE)
        self._mine_TK = owners_CE.to(x_TD.device)[turns_T].gather(1, ids_TK) == self.rank
        kept_T = self._mine_TK.any(1)
        received = int(kept_T.sum())
        rows_RD[:received] = x_TD[kept_T]
        ids_RK[:received] = ids_TK.masked_fill(~self._mine_TK, owners_CE.shape[1])[kept_T]
        return received

    def combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        kept_T = self._mine_TK.any(1)
        self._check_combine(outputs_RKD, back_TKD, int(kept_T.sum()), len(kept_T))
        back_TKD.zero_()
        back_TKD[self._mine_TK] = outputs_RKD[: int(kept_T.sum())][self._mine_TK[kept_T]]

    def gather(self, x_GD: Tensor, rows_RD: Tensor) -> int:
        self._check_gather(x_GD, rows_RD)
        rows_RD[: len(x_GD)] = x_GD
        return len(x_GD)

    def scatter(self, parts_RW: Tensor, back_GV: Tensor) -> None:
        rows = len(back_GV)
        self._check_scatter(parts_RW, back_GV, rows, rows)
        own = self.spec.columns(self.rank)
        back_GV.zero_()
        back_GV[:, own.start : own.stop] = parts_RW[:rows]

    def close(self) -> None:
        """Nobody waits for it."""
