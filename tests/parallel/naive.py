"""What ranks must get from an exchange: its definition, pair by pair, in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.parallel.exchange import ExchangeSpec
from parallel import rank_side
from parallel.rank_side import Case, Outcome, bits, expert_output
from parallel.ranks import Rank, together


def wanted(case: Case, spec: ExchangeSpec, rank: int) -> Outcome:
    """What a rank must get, by the definition, pair by pair."""
    owners = case.owners_CE()
    rows = []
    ids = []
    bytes_in = 0
    bytes_out = 0
    for home in range(spec.size):
        chosen = case.ids_TK(home, spec)
        for t, x in enumerate(case.x_TD(home, spec)):
            ranks_of = [int(owners[t % case.splits, e]) for e in chosen[t].tolist()]
            if rank in ranks_of:
                rows.append(bits(x))
                pairs = zip(chosen[t].tolist(), ranks_of, strict=True)
                ids.append([e if owner == rank else case.experts for e, owner in pairs])
            if home != rank and rank in ranks_of:
                bytes_in += spec.row_bytes
                bytes_out += spec.row_bytes * ranks_of.count(rank)
            if home == rank:
                others = [owner for owner in ranks_of if owner != rank]
                bytes_out += spec.row_bytes * len(set(others))
                bytes_in += spec.row_bytes * len(others)
    return Outcome(
        torch.stack(rows) if rows else bits(torch.empty(0, spec.hidden, dtype=spec.dtype)),
        torch.tensor(ids, dtype=torch.int64).reshape(len(ids), spec.top_k),
        True,
        wanted_back(case, spec, rank),
        bytes_out,
        bytes_in,
    )


def wanted_back(case: Case, spec: ExchangeSpec, rank: int) -> Tensor:
    back_TKD = bits(torch.empty(case.tokens[rank], spec.top_k, spec.hidden, dtype=spec.dtype))
    x_TD = case.x_TD(rank, spec)
    for t, chosen in enumerate(case.ids_TK(rank, spec).tolist()):
        for k, expert in enumerate(chosen):
            back_TKD[t, k] = expert_output(x_TD[t], expert)
    return back_TKD


def check(members: Sequence[Rank], spec: ExchangeSpec, cases: list[Case]) -> None:
    for rank, outcomes in enumerate(together(members, rank_side.layers, cases)):
        for case, found in zip(cases, outcomes, strict=True):
            right = wanted(case, spec, rank)
            where = f"{case}, rank {rank}"
            assert torch.equal(found.rows_RD, right.rows_RD), where
            assert torch.equal(found.ids_RK, right.ids_RK), where
            assert found.untouched, where
            assert torch.equal(found.back_TKD, right.back_TKD), where
            assert (found.bytes_out, found.bytes_in) == (right.bytes_out, right.bytes_in), where


def cases(size: int, most: int) -> list[Case]:
    """None, one, most and uneven numbers of tokens; replicas; everything at one rank."""
    uneven = tuple((3 * rank + 1) % (most + 1) for rank in range(size))
    one = tuple(int(rank == size - 1) for rank in range(size))
    return [
        Case(1, uneven, 7),
        Case(2, (0,) * size, 7),
        Case(3, one, 7),
        Case(4, (most,) * size, 5),
        Case(5, uneven, 4, splits=3),
        Case(6, (most,) * size, 9, splits=most + 1),
        Case(7, uneven, 7, one_rank=True),
        Case(8, one[::-1], 3),
    ]
