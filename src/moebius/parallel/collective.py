"""The exchange through torch.distributed: NCCL between GPUs; over gloo its tests need none.

Nothing but `all_to_all_single`, which both have had for long. Counts go first, in a message of one
size whatever the operation, so that ranks that are out of step notice. Rows and their ids travel
together: what a call costs, it costs once.
"""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import Work

from moebius.errors import ConfigError, PeerError
from moebius.parallel.exchange import (
    MOST_VALUES,
    CheckedExchange,
    Epoch,
    ExchangeSpec,
    check_alike,
    identity,
)
from moebius.parallel.traffic import Traffic

# What a rank sends each other before anything else: what it does, how many values follow, values.
_HEADER = 2 + MOST_VALUES
_HELLO = 1
_AGREE = 2
_DISPATCH = 3
# Between two looks whether somebody has given up; and whether a device has come so far.
_SLICE_SECONDS = 0.05
_POLL_SECONDS = 20e-6


@dataclass(slots=True)
class _Sent:
    """What `dispatch` leaves for `combine`.

    owners_TK     the rank of each pair of this rank's tokens
    here_RK       whether a received pair's expert is here
    pairs_to      how many pairs of this rank's tokens each rank computes
    pairs_from    how many of each rank's are computed here
    """

    owners_TK: Tensor
    here_RK: Tensor
    pairs_to: list[int]
    pairs_from: list[int]


class Group(Protocol):
    """What is used of a process group; torch's ProcessGroupGloo and ProcessGroupNCCL alone, without
    torch's global state, have it too."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def alltoall_base(
        self, output: Tensor, input: Tensor, output_counts: list[int], input_counts: list[int]
    ) -> Work: ...
    def abort(self) -> None: ...


class CollectiveExchange(CheckedExchange):
    """A rank's part in a process group, which is this epoch's alone.

    group     given for good: where a rank is lost, dropping the last reference to it waits for
              gloo's threads, which try for as long as the group's own timeout says. `close` drops
              it where nobody waits.
    device    of all tensors

    Making one is the first thing that ranks do together. Raises ConfigError where they differ in
    what they are for, PeerError.
    """

    def __init__(
        self,
        group: Group,
        spec: ExchangeSpec,
        rank: int,
        epoch: Epoch,
        *,
        timeout: float,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(spec, rank, epoch, timeout)
        if (group.size(), group.rank()) != (spec.size, rank):
            raise ConfigError(
                f"{epoch}: rank {rank} of {spec.size} was given a process group in which it is "
                f"rank {group.rank()} of {group.size()}"
            )
        self._group: Group | None = group
        self._device = torch.device(device)
        self._ranks_P = torch.arange(spec.size, dtype=torch.int32, device=self._device)
        # A row on its way: its bytes, then the experts that it is sent to as int32.
        self._ids_at = _aligned(spec.row_bytes)
        self._packed_bytes = _aligned(self._ids_at + 4 * spec.top_k)
        self._calls = 0
        self._bytes_out = 0
        self._bytes_in = 0
        self._seconds_waited = 0.0
        self._sent: _Sent | None = None
        self._greet()

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._calls, self._bytes_out, self._bytes_in, self._seconds_waited)

    def close(self) -> None:
        super().close()
        held = [self._group]
        self._group = None
        threading.Thread(target=held.clear, name="drop group", daemon=True).start()

    def give_up(self, ranks: Sequence[int]) -> None:
        self._over = self._over or self.epoch.lost(ranks)

    def _agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        self._calls += 1
        return self._trade_headers(_AGREE, [tuple(values)] * self.size)

    def _dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, owners_CE: Tensor, rows_RD: Tensor, ids_RK: Tensor
    ) -> int:
        experts = owners_CE.shape[1]
        owners_TK = self._owners(ids_TK, owners_CE)
        needed_PT = (owners_TK == self._ranks_P[:, None, None]).any(2)
        rows_to, pairs_to = self._counts(ids_TK, owners_TK, needed_PT, experts)
        headers = self._trade_headers(_DISPATCH, list(zip(rows_to, pairs_to, strict=True)))
        rows_from = [header[0] for header in headers]
        rank_S, row_S = needed_PT.nonzero(as_tuple=True)
        here_SK = owners_TK[row_S] == rank_S[:, None]
        packed_SB = self._pack(x_TD[row_S], ids_TK[row_S].where(here_SK, experts))
        received = sum(rows_from)
        packed_RB = packed_SB.new_empty((received, self._packed_bytes))
        self._all_to_all(packed_RB, packed_SB, rows_from, rows_to)
        self._unpack(packed_RB, rows_RD[:received], ids_RK[:received])
        self._sent = _Sent(
            owners_TK,
            ids_RK[:received] != experts,
            pairs_to,
            [header[1] for header in headers],
        )
        self._count_rows(rows_to, rows_from)
        return received

    def _combine(self, outputs_RKD: Tensor, back_TKD: Tensor) -> None:
        sent = self._sent
        assert sent is not None
        # Both sides know which pairs there are: home's rows in order, a row's choices in order.
        pairs_ND = outputs_RKD[: len(sent.here_RK)][sent.here_RK]
        back_ND = torch.empty_like(back_TKD.flatten(0, 1))
        self._all_to_all(_bytes(back_ND), _bytes(pairs_ND), sent.pairs_to, sent.pairs_from)
        self._sent = None
        places_N = sent.owners_TK.flatten().sort(stable=True).indices
        back_TKD.flatten(0, 1).index_copy_(0, places_N, back_ND)
        self._count_rows(sent.pairs_from, sent.pairs_to)

    def _greet(self) -> None:
        mine = tuple(identity(self.spec, self.epoch).values())
        found = self._trade_headers(_HELLO, [mine] * self.size)
        check_alike(self.spec, self.epoch, self.rank, found)

    def _owners(self, ids_TK: Tensor, owners_CE: Tensor) -> Tensor:
        """The rank of each pair; ids out of range are looked up as if they were within it."""
        split_T = torch.arange(len(ids_TK), device=self._device) % len(owners_CE)
        return owners_CE.to(self._device)[split_T[:, None], ids_TK.clamp(0, owners_CE.shape[1] - 1)]

    def _counts(
        self, ids_TK: Tensor, owners_TK: Tensor, needed_PT: Tensor, experts: int
    ) -> tuple[list[int], list[int]]:
        """How many rows and pairs go to each rank: one copy from the device, with the checks."""
        wrong_ids = ((ids_TK < 0) | (ids_TK >= experts)).sum()
        wrong_owners = ((owners_TK < 0) | (owners_TK >= self.size)).sum()
        pairs_P = (owners_TK == self._ranks_P[:, None, None]).sum((1, 2))
        wrong = torch.stack((wrong_ids, wrong_owners))
        counts = torch.cat((needed_PT.sum(1), pairs_P, wrong)).tolist()
        if counts[-2]:
            raise ValueError(f"{counts[-2]} choices are of no expert of 0 to {experts - 1}")
        if counts[-1]:
            raise ValueError(f"{counts[-1]} choices' experts are at no rank of {self.size}")
        return counts[: self.size], counts[self.size : 2 * self.size]

    def _pack(self, x_SD: Tensor, ids_SK: Tensor) -> Tensor:
        packed_SB = torch.empty(
            (len(x_SD), self._packed_bytes), dtype=torch.uint8, device=self._device
        )
        self._rows_of(packed_SB).copy_(x_SD)
        self._ids_of(packed_SB).copy_(ids_SK)
        return packed_SB

    def _unpack(self, packed_RB: Tensor, rows_RD: Tensor, ids_RK: Tensor) -> None:
        rows_RD.copy_(self._rows_of(packed_RB))
        ids_RK.copy_(self._ids_of(packed_RB))

    def _rows_of(self, packed_SB: Tensor) -> Tensor:
        return packed_SB[:, : self.spec.row_bytes].view(self.spec.dtype)

    def _ids_of(self, packed_SB: Tensor) -> Tensor:
        ids_SB = packed_SB[:, self._ids_at : self._ids_at + 4 * self.spec.top_k]
        return ids_SB.view(torch.int32)

    def _trade_headers(self, doing: int, values: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Sends each rank its values, and returns every rank's for this one."""
        rows = [(doing, len(each), *each, *([0] * (MOST_VALUES - len(each)))) for each in values]
        headers_PH = torch.tensor(rows, dtype=torch.int64, device=self._device)
        found_PH = torch.empty_like(headers_PH)
        self._all_to_all(found_PH, headers_PH, [1] * self.size, [1] * self.size)
        found = found_PH.tolist()
        others = tuple(rank for rank, header in enumerate(found) if header[0] != doing)
        if others:
            raise self._out_of_step(others)
        return [tuple(header[2 : 2 + header[1]]) for header in found]

    def _all_to_all(
        self, received: Tensor, sent: Tensor, counts_from: list[int], counts_to: list[int]
    ) -> None:
        """Rows of `sent` to each rank, those of each into `received`."""
        group = self._group
        if group is None:
            raise self._over or self.epoch.lost((self.rank,), "has left it")
        begun = time.monotonic()
        until = begun + self.timeout
        try:
            work = group.alltoall_base(received, sent, counts_from, counts_to)
            if self._device.type == "cpu":
                self._wait(work, until)
            else:
                self._wait_for_device(group, work, until)
        except (RuntimeError, TimeoutError) as error:
            raise self._over or self._lost(error, late=time.monotonic() >= until) from None
        self._seconds_waited += time.monotonic() - begun

    def _wait(self, work: Work, until: float) -> None:
        """In slices, between which another thread may have given up."""
        while True:
            seconds = min(_SLICE_SECONDS, max(0.001, until - time.monotonic()))
            try:
                work.wait(timedelta(seconds=seconds))
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises what it failed with, unless it came just now
                    return
                if self._over or time.monotonic() > until:
                    raise

    def _wait_for_device(self, group: Group, work: Work, until: float) -> None:
        """On a GPU an operation is only put in line; the host waits until its turn has come, as
        else it would wait without a deadline for whatever it reads from the device next."""
        work.wait()
        reached = torch.Event(self._device)
        reached.record()
        while not reached.query():
            if self._over or time.monotonic() > until:
                group.abort()  # or the device would wait on
                raise TimeoutError("timed out")
            time.sleep(_POLL_SECONDS)

    def _lost(self, error: Exception, *, late: bool) -> PeerError:
        """Sockets do not say whose they were: it is one or more of the others."""
        others = tuple(rank for rank in range(self.size) if rank != self.rank)
        some = f"{'one or more of ' if len(others) > 1 else ''}{self.epoch.told(others)}"
        # Without the place in gloo's source that it begins with.
        reason = re.sub(r"^\[\S*\] *", "", str(error)).partition("\n")[0]
        text = f"{some} {self._late}" if late else f"the connection to {some} broke"
        return PeerError(f"{self.epoch}: {text} ({reason})", ranks=others)

    def _count_rows(self, out: list[int], back: list[int]) -> None:
        self._calls += 1
        self._bytes_out += self.spec.row_bytes * (sum(out) - out[self.rank])
        self._bytes_in += self.spec.row_bytes * (sum(back) - back[self.rank])


def _aligned(nbytes: int) -> int:
    """Where 8-byte values may begin, after so many bytes."""
    return (nbytes + 7) // 8 * 8


def _bytes(rows_ND: Tensor) -> Tensor:
    return rows_ND.view(torch.uint8)
