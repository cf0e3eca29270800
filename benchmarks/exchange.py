"""What it takes to send a layer's rows to the ranks of their experts and back, without any experts.

    .venv/bin/python benchmarks/exchange.py [--ranks 2 4] [--rounds 9] [--layers 300] [--json FILE]

Through shared memory, through sockets, as ranks of one host do where others are on other hosts (a
connection, and memory beside it), and through gloo, between processes of this machine. A layer
is one dispatch and one combine, called from Python as the engine calls them. The cases take turns,
so that a busy machine slows all of them alike; printed are microseconds a layer, at the slowest
rank: the median round, and the fastest one. Beside other work run it as a real-time process (chrt
-r 10), which the record says: a rank that is not given a processor holds up all others.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from moebius import machine
from moebius.parallel.collective import CollectiveExchange
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.key import ClusterKey
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange
from moebius.parallel.sockets import Meeting, join_epoch
from records import save
from workers import Workers

HIDDEN = 1024
TOP_K = 8
EXPERTS = 64
MOST_TOKENS = 512
TIMEOUT = 60.0
KEY = ClusterKey(b"of a benchmark's ranks, 32 bytes")
# Tokens of rank 0, and of every other.
LOADS = {
    "one token in all": (1, 0),
    "one token a rank": (1, 1),
    "32 tokens a rank": (32, 32),
    "512 tokens a rank": (512, 512),
}
KINDS = ("shared memory", "sockets", "sockets, one host", "gloo")


@dataclass
class Result:
    """Microseconds a layer; bytes that rank 0 sends in one."""

    kind: str
    ranks: int
    load: str
    median: float
    fastest: float
    bytes_out: int


def join(kind: str, place: str, spec: ExchangeSpec, rank: int) -> Exchange:
    epoch = Epoch("benchmark", 1)
    if kind == "shared memory":
        return SharedMemoryExchange(place, spec, rank, epoch, timeout=TIMEOUT)
    return join_by_store(kind, dist.FileStore(place, spec.size), spec, rank, epoch)


def join_by_store(
    kind: str, store: dist.Store, spec: ExchangeSpec, rank: int, epoch: Epoch
) -> Exchange:
    """Over connections of this machine: sockets of our own, with memory or without, or gloo's."""
    if kind == "gloo":
        group = dist.ProcessGroupGloo(store, rank, spec.size, timedelta(seconds=TIMEOUT))
        return CollectiveExchange(group, spec, rank, epoch, timeout=TIMEOUT)
    meeting = Meeting(epoch, lambda address: store.set(f"rank {rank}", address))

    def hear() -> None:
        for lower in range(rank):
            meeting.hear(lower, store.get(f"rank {lower}").decode())

    threading.Thread(target=hear, daemon=True).start()
    crowded = spec.size > machine.threads()
    return join_epoch(
        meeting,
        spec,
        rank,
        "127.0.0.1",
        KEY,
        timeout=TIMEOUT,
        patience=TIMEOUT,
        crowded=crowded,
        near=range(spec.size) if kind == "sockets, one host" else (),
    )


class Received:
    """A rank's memory for what comes, and for what experts would make of it."""

    def __init__(self, spec: ExchangeSpec) -> None:
        most = spec.size * spec.tokens
        self.rows_RD = torch.empty(most, spec.hidden, dtype=spec.dtype)
        self.ids_RK = torch.empty(most, spec.top_k, dtype=torch.int64)
        self.outputs_RKD = torch.zeros(most, spec.top_k, spec.hidden, dtype=spec.dtype)


class Layer:
    """A rank's tensors for one load. Experts are at ranks in turn."""

    def __init__(self, exchange: Exchange, received: Received, tokens: int) -> None:
        spec = exchange.spec
        drawn = torch.Generator().manual_seed(exchange.rank)
        self._exchange = exchange
        self._received = received
        self._x_TD = torch.randn(tokens, spec.hidden, generator=drawn).to(spec.dtype)
        self._ids_TK = torch.rand(tokens, EXPERTS, generator=drawn).topk(spec.top_k).indices
        self._owners_CE = (torch.arange(EXPERTS, dtype=torch.int32) % spec.size)[None]
        self._back_TKD = torch.empty(tokens, spec.top_k, spec.hidden, dtype=spec.dtype)

    def run(self) -> None:
        memory = self._received
        rows = self._exchange.dispatch(
            self._x_TD, self._ids_TK, self._owners_CE, memory.rows_RD, memory.ids_RK
        )
        self._exchange.combine(memory.outputs_RKD[:rows], self._back_TKD)


def serve(pipe: Connection, kind: str, place: str, spec: ExchangeSpec, rank: int) -> None:
    """In a rank's process: measures loads until told to end."""
    torch.set_num_threads(1)
    exchange = join(kind, place, spec, rank)
    received = Received(spec)
    layers = {name: Layer(exchange, received, load[min(rank, 1)]) for name, load in LOADS.items()}
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        name, count = order
        before = exchange.traffic
        exchange.agree(())
        begun = time.perf_counter()
        for _ in range(count):
            layers[name].run()
        taken = time.perf_counter() - begun
        pipe.send((taken / count * 1e6, (exchange.traffic - before).bytes_out // count))


class Group:
    """The processes of one kind and number of ranks."""

    def __init__(
        self,
        kind: str,
        ranks: int,
        folder: Path,
        stack: ExitStack,
        *,
        hidden: int = HIDDEN,
        top_k: int = TOP_K,
    ) -> None:
        self.kind = kind
        self.ranks = ranks
        spec = ExchangeSpec(ranks, MOST_TOKENS, hidden, top_k, torch.bfloat16)
        place = str(folder / f"{kind}{ranks}")
        if kind == "shared memory":
            place = stack.enter_context(Segment(spec, Epoch("benchmark", 1))).place
        arguments = [(kind, place, spec, rank) for rank in range(ranks)]
        self._workers = Workers(stack, serve, arguments)
        self._workers.answers()

    def measure(self, load: str, count: int) -> tuple[float, int]:
        """Microseconds at the slowest rank, and bytes that rank 0 has sent."""
        self._workers.tell_all((load, count))
        answers = self._workers.answers()
        return max(taken for taken, _ in answers), answers[0][1]


def results(groups: list[Group], rounds: int, layers: int) -> Iterator[Result]:
    cases = [(group, load) for group in groups for load in LOADS]
    taken: dict[int, list[tuple[float, int]]] = {number: [] for number in range(len(cases))}
    for _ in range(rounds):
        for number, (group, load) in enumerate(cases):
            count = max(3, layers // (1 + LOADS[load][0] // 8))
            if group.kind == "gloo":
                count = max(3, count // 5)
            taken[number].append(group.measure(load, count))
    for number, (group, load) in enumerate(cases):
        times = [each for each, _ in taken[number]]
        yield Result(
            group.kind,
            group.ranks,
            load,
            round(statistics.median(times), 1),
            round(min(times), 1),
            taken[number][0][1],
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        groups = [Group(kind, ranks, Path(folder), stack) for ranks in args.ranks for kind in KINDS]
        found = list(results(groups, args.rounds, args.layers))
    print(f"{'':14} {'ranks':>5}  {'':18} {'median':>9} {'fastest':>9} {'KiB out':>8}")
    for each in found:
        print(
            f"{each.kind:14} {each.ranks:5}  {each.load:18} {each.median:9.1f} "
            f"{each.fastest:9.1f} {each.bytes_out / 1024:8.1f}"
        )
    record = {
        "processors": machine.processors(),
        "real_time": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "hidden": HIDDEN,
        "top_k": TOP_K,
        "dtype": "bfloat16",
        "results": [asdict(each) for each in found],
    }
    save(args.json, record)


if __name__ == "__main__":
    main()
