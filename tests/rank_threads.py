"""Several ranks in one process, each on a thread, and an exchange between them that loops over
rows: too simple to be wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from moebius.errors import PeerError
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.traffic import Traffic

SECONDS = 60.0
T = TypeVar("T")


class Table:
    """Where the ranks of a group lay down what all are to see."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.places: list[Any] = [None] * size


class ThreadExchange(Exchange):
    """Everybody sees everything, and takes what is its own."""

    gathers = True

    def __init__(self, spec: ExchangeSpec, rank: int, table: Table) -> None:
        super().__init__(spec, rank, Epoch("test", 0), SECONDS)
        self._table = table
        self._received: list[tuple[int, int]] = []
        self._gathered: list[Tensor] = []
        self._ids: list[list[int]] = []
        self.calls = 0

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.calls)

    def agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        return self._all(tuple(values))

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        self._check_dispatch(x_TD, ids_TK, owners_CE, rows_RD, ids_RK)
        none = owners_CE.shape[1]
        self._received = []
        self._ids = []
        for home, (x, ids, owners) in enumerate(self._all((x_TD, ids_TK, owners_CE.tolist()))):
            for t, chosen in enumerate(ids.tolist()):
                of_row = owners[t % len(owners)]
                mine = [e if of_row[e] == self.rank else none for e in chosen]
                if set(mine) != {none}:
                    rows_RD[len(self._received)] = x[t]
                    ids_RK[len(self._received)] = torch.tensor(mine)
                    self._received.append((home, t))
                    self._ids.append(mine)
        self._none = none
        self._all(None)  # nobody's tensors may change before all have seen them
        return len(self._received)

    def combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        self._check_combine(outputs_RKD, back_TKD, len(self._received), len(back_TKD))
        missing = {(t, k) for t in range(len(back_TKD)) for k in range(back_TKD.shape[1])}
        for outputs, received, chosen in self._all((outputs_RKD, self._received, self._ids)):
            for r, (home, t) in enumerate(received):
                for k, e in enumerate(chosen[r]):
                    if home == self.rank and e != self._none:
                        back_TKD[t, k] = outputs[r, k]
                        missing.remove((t, k))
        assert not missing, "every pair is computed by one rank"
        self._all(None)

    def gather(self, x_GD: Tensor, rows_RD: Tensor) -> int:
        self._check_gather(x_GD, rows_RD)
        self._gathered = self._all(x_GD.clone())
        rows = [row for each in self._gathered for row in each]
        for place, row in enumerate(rows):
            rows_RD[place] = row
        return len(rows)

    def scatter(self, parts_RW: Tensor, back_GV: Tensor) -> None:
        counts = [len(each) for each in self._gathered]
        self._check_scatter(parts_RW, back_GV, sum(counts), counts[self.rank])
        first = sum(counts[: self.rank])
        for rank, parts in enumerate(self._all(parts_RW)):
            for column, source in enumerate(self.spec.columns(rank)):
                for g in range(counts[self.rank]):
                    back_GV[g, source] = parts[first + g, column]
        self._all(None)

    def close(self) -> None:
        self._table.barrier.abort()

    def _all(self, mine: Any) -> list[Any]:
        """What every rank brings."""
        self.calls += 1
        table = self._table
        try:
            table.places[self.rank] = mine
            table.barrier.wait(self.timeout)
            found = list(table.places)
            table.barrier.wait(self.timeout)
        except threading.BrokenBarrierError:
            raise PeerError("a rank is gone", ranks=()) from None
        return found


def group(spec: ExchangeSpec) -> list[ThreadExchange]:
    """An exchange for each rank."""
    table = Table(spec.size)
    return [ThreadExchange(spec, rank, table) for rank in range(spec.size)]


def together(exchanges: Sequence[Exchange], act: Callable[[int], T]) -> list[T]:
    """act(rank) on a thread for each rank; the first error that is no other's consequence."""

    def run(rank: int) -> T:
        try:
            return act(rank)
        except BaseException:
            exchanges[rank].close()
            raise

    with ThreadPoolExecutor(len(exchanges)) as threads:
        running = [threads.submit(run, rank) for rank in range(len(exchanges))]
    errors = [error for each in running if (error := each.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, PeerError)):
        raise error
    return [each.result() for each in running]
