"""What a rank's process does in tests of the exchange. Every rank draws the same cases."""

from __future__ import annotations

import itertools
import resource
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.parallel import sockets
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.key import ClusterKey
from moebius.parallel.process_group import join_process_group
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange

Held = dict[str, Any]
KEY = ClusterKey(b"of a test's cluster, 32 letters.")


@dataclass(frozen=True)
class Meeting:
    """Where and as what the ranks of a test meet.

    kind    "shared", "sockets", "gloo" or "nccl"
    place   the segment's, or the file of a store of torch's
    near    of each rank, where they connect: those that are on its host
    """

    kind: str
    place: str
    spec: ExchangeSpec
    epoch: Epoch
    timeout: float = 30.0
    near: tuple[tuple[int, ...], ...] = ()


def join(held: Held, meeting: Meeting, rank: int | None = None) -> None:
    """Joins as the process's own rank, where the test names no other."""
    torch.set_num_threads(1)
    if "exchange" in held:
        held.pop("exchange").close()
    rank = held["rank"] if rank is None else rank
    spec = meeting.spec
    if meeting.kind == "shared":
        held["exchange"] = SharedMemoryExchange(
            meeting.place,
            spec,
            rank,
            meeting.epoch,
            timeout=meeting.timeout,
        )
        return
    if meeting.kind == "sockets":
        held["exchange"] = connected(dist.FileStore(meeting.place, spec.size), meeting, rank)
        return
    device = "cpu" if meeting.kind == "gloo" else "cuda"
    torch.set_default_device(device)
    held["exchange"] = join_process_group(
        Path(meeting.place),
        spec,
        rank,
        meeting.epoch,
        timeout=meeting.timeout,
        device=torch.device(device),
    )


def connected(store: dist.Store, meeting: Meeting, rank: int) -> Exchange:
    """With the store in the place of frames that carry the ranks' addresses."""
    place = sockets.Meeting(meeting.epoch, lambda address: store.set(f"rank {rank}", address))

    def hear() -> None:
        for lower in range(rank):
            place.hear(lower, store.get(f"rank {lower}").decode())

    threading.Thread(target=hear, daemon=True).start()
    return sockets.join_epoch(
        place,
        meeting.spec,
        rank,
        "127.0.0.1",
        KEY,
        timeout=meeting.timeout,
        patience=30.0,
        near=meeting.near[rank] if meeting.near else (),
    )


def leave(held: Held) -> None:
    held.pop("exchange").close()


@dataclass(frozen=True)
class Case:
    """A layer's exchange, drawn by its seed: how many tokens each rank has, experts, splits."""

    seed: int
    tokens: tuple[int, ...]
    experts: int
    splits: int = 1
    one_rank: bool = False  # holds all experts

    def owners_CE(self) -> Tensor:
        shape = (self.splits, self.experts)
        owners = draw(self.seed, len(self.tokens), shape, torch.int32)
        return torch.full_like(owners, len(self.tokens) - 1) if self.one_rank else owners

    def ids_TK(self, rank: int, spec: ExchangeSpec) -> Tensor:
        """Different experts for one token."""
        shape = (self.tokens[rank], self.experts)
        chances = draw(self.seed + 1000 * rank + 1, 2**30, shape, torch.int64)
        return chances.topk(spec.top_k, dim=1).indices

    def x_TD(self, rank: int, spec: ExchangeSpec) -> Tensor:
        """Any bits, those of infinities and of numbers that are none among them."""
        shape = (self.tokens[rank], spec.row_bytes)
        return draw(self.seed + 1000 * rank + 2, 256, shape, torch.uint8).view(spec.dtype)


def draw(seed: int, below: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randint(0, below, shape, generator=generator, dtype=dtype, device="cpu")
    return drawn.to(torch.get_default_device())


def bits(tensor: Tensor) -> Tensor:
    """A tensor of any dtype as integers, which are equal where all its bits are."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def expert_output(x: Tensor, expert: int) -> Tensor:
    """What stands for an expert: other bits for every row and expert."""
    return bits(x) * 3 + 7 * expert


@dataclass
class Outcome:
    """What a rank got, as integers (`bits`)."""

    rows_RD: Tensor
    ids_RK: Tensor
    untouched: bool
    back_TKD: Tensor
    bytes_out: int
    bytes_in: int


GUARD = 123


def layer(exchange: Exchange, case: Case) -> Outcome:
    """One dispatch and combine, with "experts" between."""
    spec = exchange.spec
    before = exchange.traffic
    most = spec.size * spec.tokens
    rows_RD = torch.full((most, spec.hidden), GUARD, dtype=spec.dtype)
    ids_RK = torch.full((most, spec.top_k), GUARD, dtype=torch.int64)
    x_TD = case.x_TD(exchange.rank, spec)
    received = exchange.dispatch(
        x_TD, case.ids_TK(exchange.rank, spec), case.owners_CE(), rows_RD, ids_RK
    )
    outputs_RKD = torch.full((received, spec.top_k, spec.hidden), GUARD, dtype=spec.dtype)
    for r in range(received):
        for k, expert in enumerate(ids_RK[r].tolist()):
            if expert < case.experts:
                bits(outputs_RKD)[r, k] = expert_output(rows_RD[r], expert)
    back_TKD = torch.full((len(x_TD), spec.top_k, spec.hidden), GUARD, dtype=spec.dtype)
    exchange.combine(outputs_RKD, back_TKD)
    moved = exchange.traffic - before
    untouched = (rows_RD[received:] == GUARD).all() and (ids_RK[received:] == GUARD).all()
    return Outcome(
        bits(rows_RD[:received]).clone().cpu(),
        ids_RK[:received].clone().cpu(),
        bool(untouched),
        bits(back_TKD).cpu(),
        moved.bytes_out,
        moved.bytes_in,
    )


def layers(held: Held, cases: list[Case]) -> list[Outcome]:
    return [layer(held["exchange"], case) for case in cases]


def repeated(held: Held, case: Case, times: int) -> list[tuple[int, ...]]:
    """Layers in a row, each rank ahead of others where it can be, agreements between them."""
    exchange = held["exchange"]
    first = layer(exchange, case)
    agreed = []
    for step in range(times):
        agreed = exchange.agree((step, exchange.rank))
        again = layer(exchange, replace(case))
        assert torch.equal(again.back_TKD, first.back_TKD)
        assert torch.equal(again.rows_RD, first.rows_RD)
    return agreed


def layers_without_end(held: Held, case: Case, killed: int, microseconds: int) -> None:
    """The rank that is to be killed is, by a timer, so long after its third layer."""
    exchange = held["exchange"]
    for number in itertools.count():
        if number == 3 and exchange.rank == killed:
            signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
        layer(exchange, case)


@dataclass(frozen=True)
class Gathering:
    """How many rows each rank has for all others, drawn by its seed."""

    seed: int
    rows: tuple[int, ...]

    def x_GD(self, rank: int, spec: ExchangeSpec) -> Tensor:
        shape = (self.rows[rank], spec.row_bytes)
        return draw(self.seed + 1000 * rank, 256, shape, torch.uint8).view(spec.dtype)

    def results_GV(self, rank: int, spec: ExchangeSpec) -> Tensor:
        """What stands for logits: other numbers for every row and column."""
        first = bits(self.x_GD(rank, spec))[:, :1].float()
        return first + torch.arange(spec.width)


def gather(held: Held, cases: list[Gathering]) -> list[tuple[Tensor, bool, Tensor]]:
    """The rows that came, whether others' memory was left alone, and the results."""
    exchange = held["exchange"]
    return [gathered(exchange, case) for case in cases]


def gathered(exchange: Exchange, case: Gathering) -> tuple[Tensor, bool, Tensor]:
    spec = exchange.spec
    rows_RD = torch.full((spec.size * spec.gathered, spec.hidden), GUARD, dtype=spec.dtype)
    count = exchange.gather(case.x_GD(exchange.rank, spec), rows_RD)
    untouched = bool((rows_RD[count:] == GUARD).all())
    rows_RD = rows_RD[:count]
    own = spec.columns(exchange.rank)
    parts_RW = bits(rows_RD)[:, :1].float() + torch.arange(own.start, own.stop)
    back_GV = torch.full((case.rows[exchange.rank], spec.width), float(GUARD))
    exchange.scatter(parts_RW, back_GV)
    return bits(rows_RD).clone(), untouched, back_GV


def scatter_without_gather(held: Held) -> None:
    spec = held["exchange"].spec
    columns = len(spec.columns(held["exchange"].rank))
    held["exchange"].scatter(torch.zeros(0, columns), torch.zeros(0, spec.width))


def agree(held: Held, *values: tuple[int, ...]) -> list[list[tuple[int, ...]]]:
    """One agreement for each tuple; each rank adds its own rank to every value."""
    exchange = held["exchange"]
    return [exchange.agree([value + exchange.rank for value in each]) for each in values]


def agree_unlike(held: Held) -> list[tuple[int, ...]]:
    """Every rank brings as many values as its number."""
    exchange = held["exchange"]
    return exchange.agree(range(exchange.rank))


def waited(held: Held) -> tuple[int, float]:
    traffic = held["exchange"].traffic
    return traffic.calls, traffic.seconds_waited


def agree_in_a_thread(held: Held) -> None:
    """Returns while the thread waits for the others."""
    agreed: Future[list[tuple[int, ...]]] = Future()
    exchange = held["exchange"]

    def agree() -> None:
        try:
            agreed.set_result(exchange.agree((7,)))
        except Exception as error:
            agreed.set_exception(error)

    threading.Thread(target=agree, daemon=True).start()
    held["agreed"] = agreed


def agreed_in_the_thread(held: Held) -> list[tuple[int, ...]]:
    return held["agreed"].result()


def give_up(held: Held, ranks: tuple[int, ...]) -> None:
    held["exchange"].give_up(ranks)


def is_waiting(held: Held) -> bool:
    return not held["agreed"].done()


def wrong_tensors(held: Held, name: str) -> None:
    """A dispatch of one row in which one thing is wrong."""
    exchange = held["exchange"]
    spec = exchange.spec
    most = spec.size * spec.tokens
    given = {
        "x_TD": torch.zeros(1, spec.hidden, dtype=spec.dtype),
        "ids_TK": torch.arange(spec.top_k)[None],
        "owners_CE": torch.zeros(1, 5, dtype=torch.int32),
        "rows_RD": torch.zeros(most, spec.hidden, dtype=spec.dtype),
        "ids_RK": torch.zeros(most, spec.top_k, dtype=torch.int64),
    }
    wrong = {
        "too many rows": {
            "x_TD": torch.zeros(spec.tokens + 1, spec.hidden, dtype=spec.dtype),
            "ids_TK": torch.zeros(spec.tokens + 1, spec.top_k, dtype=torch.int64),
        },
        "other rows": {"x_TD": torch.zeros(1, spec.hidden + 1, dtype=spec.dtype)},
        "another dtype": {"x_TD": torch.zeros(1, spec.hidden, dtype=torch.float64)},
        "fewer ids": {"ids_TK": torch.zeros(1, spec.top_k - 1, dtype=torch.int64)},
        "not contiguous": {"rows_RD": torch.zeros(most, 2 * spec.hidden, dtype=spec.dtype)[:, ::2]},
        "little room": {"rows_RD": torch.zeros(most - 1, spec.hidden, dtype=spec.dtype)},
        "no owners": {"owners_CE": torch.zeros(0, 5, dtype=torch.int32)},
        "an id too large": {"ids_TK": torch.full((1, spec.top_k), 5)},
        "an id below zero": {"ids_TK": torch.full((1, spec.top_k), -1)},
        "an owner too large": {"owners_CE": torch.full((1, 5), spec.size, dtype=torch.int32)},
        "an expert nowhere": {"owners_CE": torch.full((1, 5), -1, dtype=torch.int32)},
    }[name]
    exchange.dispatch(**{**given, **wrong})


def combine_without_dispatch(held: Held) -> None:
    spec = held["exchange"].spec
    held["exchange"].combine(
        torch.zeros(0, spec.top_k, spec.hidden, dtype=spec.dtype),
        torch.zeros(0, spec.top_k, spec.hidden, dtype=spec.dtype),
    )


def start_segment(held: Held, spec: ExchangeSpec, epoch: Epoch) -> str:
    held["segment"] = Segment(spec, epoch)
    return held["segment"].place


def start_segment_without_memory(held: Held, spec: ExchangeSpec, epoch: Epoch) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    in_use = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use, in_use))
    Segment(spec, epoch)
