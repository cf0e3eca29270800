"""What it costs, and brings, to spread a model's experts over ranks of this machine.

    PEERS=... .venv/bin/python benchmarks/expert_parallel.py [--models m1 m2] [--workloads w1 w2]
    [--rounds 3] [--requests 64] [--json FILE]

Each group is engines in processes of their own, bound as those of `moebius serve` are, without the
front: one process of one thread and of two, and 2 and 4 ranks of one thread, which exchange through
shared memory, through sockets, and for comparison through gloo. All groups of a model are loaded
before the first is measured, and take turns, so that a busy machine slows all of them alike. Ratios
are of runs beside each other.
Models and workloads are those of benchmarks/peers; --requests takes fewer of W2's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Behind all other paths: files here have the names of packages elsewhere.
sys.path.append(str(Path(__file__).parent / "peers"))

from workloads import Request, Workload, workload

from exchange import join_by_store
from moebius import machine
from moebius.engine.config import EngineConfig
from moebius.moe.placement import Placement
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange
from records import save
from workers import Workers

MODELS = ("m1", "m2")
VOCAB = {"m1": 32_000, "m2": 49_152}
MAX_MODEL_LEN = 576
MAX_STEP_TOKENS = 2048
KV_CACHE_BYTES = 2**29
TIMEOUT = 120.0
EPOCH = Epoch("benchmark", 1)


@dataclass(frozen=True)
class Kind:
    """A group: how many ranks of how many threads, what they exchange through, whether experts are
    placed by the loads that the warm-up brought, not in order, and whether each rank reads the
    whole head where they could share it."""

    ranks: int
    threads: int
    exchange: str = ""
    balanced: bool = False
    whole_head: bool = False

    @property
    def name(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        if self.ranks == 1:
            return f"one process, {threads}"
        balanced = ", balanced" if self.balanced else ""
        head = ", whole head" if self.whole_head else ""
        return f"{self.ranks} ranks, {threads}, {self.exchange}{balanced}{head}"


KINDS = (
    Kind(1, 2),
    Kind(1, 1),
    Kind(2, 1, "shared memory"),
    Kind(2, 1, "shared memory", whole_head=True),
    Kind(2, 1, "shared memory", balanced=True),
    Kind(2, 1, "sockets"),
    Kind(2, 1, "sockets", balanced=True),
    Kind(2, 1, "gloo"),
    Kind(4, 1, "shared memory"),
    Kind(4, 1, "sockets"),
)


@dataclass
class Part:
    """What one rank says of one run. Times are seconds; begun and ended on a clock that all have.

    agreeing     in calls that agree on a step; exchanging: in those that trade rows
    waited       of both, for the other ranks
    """

    begun: float
    ended: float
    steps: int
    stepping: float
    agreeing: float
    exchanging: float
    waited: float
    bytes_out: int
    memory: int


class Clocked:
    """Adds up the seconds in the calls of an exchange."""

    def __init__(self) -> None:
        names = ("agree", "dispatch", "combine", "gather", "scatter")
        self.seconds = dict.fromkeys(names, 0.0)

    def wrap(self, exchange: Exchange) -> None:
        for name in self.seconds:
            setattr(exchange, name, self._timed(name, getattr(exchange, name)))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        seconds = self.seconds
        clock = time.perf_counter

        def timed(*arguments: Any) -> Any:
            begun = clock()
            try:
                return call(*arguments)
            finally:
                seconds[name] += clock() - begun

        return timed


def join(kind: Kind, place: str, spec: ExchangeSpec, rank: int) -> Exchange:
    if kind.exchange == "shared memory":
        return SharedMemoryExchange(place, spec, rank, EPOCH, timeout=TIMEOUT)
    import torch.distributed as dist

    return join_by_store(kind.exchange, dist.FileStore(place, spec.size), spec, rank, EPOCH)


class Served:
    """A rank's engine, in its process."""

    def __init__(self, directory: Path, kind: Kind, rank: int) -> None:
        from moebius.engine.expert_share import ExpertShare
        from moebius.engine.load import exchange_spec, load_engine, prepare
        from moebius.engine.place import place

        here = place(rank, kind.ranks, kind.threads)
        here.take()
        config = EngineConfig(
            dtype="bfloat16",
            device="cpu",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=32 // kind.ranks,
            max_num_batched_tokens=MAX_STEP_TOKENS // kind.ranks,
            kv_cache_memory_bytes=KV_CACHE_BYTES // kind.ranks,
            enable_prefix_caching=False,
            threads=kind.threads,
            ranks=kind.ranks,
        )
        share = ExpertShare(rank, kind.ranks) if kind.ranks > 1 else None
        prepared = prepare(directory, config, share)
        self.engine = load_engine(directory, config, prepared=prepared)
        self.layers = len(prepared.checkpoint.config.experts)
        self.spec = exchange_spec(prepared) if share else None
        if self.spec and kind.whole_head:
            self.spec = replace(self.spec, gathered=0)
        self.clocked = Clocked()
        self.exchange: Exchange | None = None
        self._kind = kind
        self._rank = rank
        self._number = 0
        self._runs = 0

    def join(self, place: str) -> None:
        """Be in a group with the others from now on."""
        from moebius.engine.rank import RankEngine

        if self.spec is None:
            return
        assert isinstance(self.engine, RankEngine)
        self.exchange = join(self._kind, place, self.spec, self._rank)
        self.clocked.wrap(self.exchange)
        self.engine.join(self.exchange, 0)

    def take(self, requests: list[Request]) -> None:
        from moebius.engine.rank import RankEngine
        from moebius.request.engine_request import EngineRequest
        from moebius.request.params import SamplingParams

        engine = self.engine
        for request in requests:
            self._number += 1
            params = SamplingParams(temperature=0, max_tokens=request.output, ignore_eos=True)
            asked = EngineRequest.create(
                str(self._number),
                request.prompt,
                params,
                engine.info.limits,
                arrival=engine.clock(),
                seed=0,
            )
            engine.take(asked)
        if isinstance(engine, RankEngine):
            self._runs += 1
            engine.hear(self._runs)  # all ranks have what is theirs

    def loads(self) -> dict[int, tuple[int, ...]]:
        """Pairs of each layer's experts so far."""
        return {layer.layer: layer.total_pairs for layer in self.engine.expert_loads().layers}

    def balance(self, loads: dict[int, tuple[int, ...]]) -> None:
        """Have the experts that these loads give this rank, from the next step on."""
        moves = self.engine.moves
        moves.ask(1, Placement.balanced(loads, self._kind.ranks).held)
        while moves.ready() != 1:
            time.sleep(0.01)

    def run(self) -> Part:
        """Until no rank has work."""
        engine = self.engine
        clock = time.perf_counter
        before = dict(self.clocked.seconds)
        traffic = self.exchange.traffic if self.exchange else None
        steps = 0
        begun = clock()
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
            steps += 1
        ended = clock()
        spent = {name: total - before[name] for name, total in self.clocked.seconds.items()}
        moved = self.exchange.traffic - traffic if self.exchange and traffic else None
        return Part(
            begun,
            ended,
            steps,
            ended - begun,
            spent["agree"],
            sum(spent.values()) - spent["agree"],
            moved.seconds_waited if moved else 0.0,
            moved.bytes_out if moved else 0,
            memory_held(),
        )


def memory_held() -> int:
    """Bytes of this process: its own, and its part of what it shares."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def serve(pipe: Connection, directory: Path, kind: Kind, rank: int) -> None:
    served = Served(directory, kind, rank)
    pipe.send((served.spec, served.layers))
    served.join(pipe.recv())
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        if order == "run":
            pipe.send(served.run())
        elif order == "loads":
            pipe.send(served.loads())
        elif isinstance(order, dict):
            served.balance(order)
            pipe.send(None)
        else:
            served.take(order)
            pipe.send(None)
    served.engine.close()


class Group:
    """The processes of one kind."""

    def __init__(self, directory: Path, kind: Kind, folder: Path, stack: ExitStack) -> None:
        self.kind = kind
        ranks = [(directory, kind, rank) for rank in range(kind.ranks)]
        self._workers = Workers(stack, serve, ranks)
        spec, self.layers = self._workers.answers()[0]
        place = str(folder / f"{directory.name}-{kind.name}")
        if kind.exchange == "shared memory":
            place = stack.enter_context(Segment(spec, EPOCH)).place
        self._workers.tell_all(place)
        self._workers.answers()

    def run(self, work: Workload) -> list[Part]:
        """Serve the requests, each at the rank that has least to draw so far."""
        shares: list[list[Request]] = [[] for _ in range(self.kind.ranks)]
        for request in work.requests:
            min(shares, key=lambda share: sum(each.output for each in share)).append(request)
        self._workers.tell(shares)
        self._workers.answers()
        self._workers.tell_all("run")
        return self._workers.answers()

    def loads(self) -> dict[int, tuple[int, ...]]:
        """Of all ranks' tokens."""
        self._workers.tell_all("loads")
        each = self._workers.answers()
        found = {}
        for layer in each[0]:
            found[layer] = tuple(map(sum, zip(*(one[layer] for one in each), strict=True)))
        return found

    def balance(self, loads: dict[int, tuple[int, ...]]) -> None:
        self._workers.tell_all(loads)
        self._workers.answers()


@dataclass
class Result:
    """Medians over the rounds, of one group.

    speed              output tokens a second; against: its ratio to one process of two threads, of
                       runs beside each other, with the lowest and the highest
    step_ms            a step
    exchange_share     of a step inside of calls to other ranks; waited_share: of these, for them
    layer_us           microseconds a layer and step inside of dispatch and combine; moved_us:
                       without what they waited
    bytes_a_token      of rows to other ranks, for each token that was computed
    memory_gb          of the rank with most
    """

    model: str
    workload: str
    group: str
    ranks: int
    threads: int
    exchange: str
    speed: float
    against: list[float]
    step_ms: float
    exchange_share: float
    waited_share: float
    layer_us: float
    moved_us: float
    bytes_a_token: float
    memory_gb: float


def tokens_of(work: Workload) -> tuple[int, int]:
    """Those that are drawn, and those that are computed."""
    drawn = work.output_tokens
    return drawn, drawn + sum(len(request.prompt) - 1 for request in work.requests)


def summed(
    model: str,
    work: Workload,
    group: Group,
    runs: list[list[Part]],
    walls: dict[Kind, list[float]],
) -> Result:
    kind = group.kind
    drawn, computed = tokens_of(work)
    base = walls[KINDS[0]]
    ratios = sorted(one / own for one, own in zip(base, walls[kind], strict=True))
    median = statistics.median
    steps = [parts[0].steps for parts in runs]
    layers = [max(1, count * group.layers) for count in steps]

    def share(of: Callable[[Part], float]) -> float:
        return median(sum(map(of, parts)) / sum(p.stepping for p in parts) for parts in runs)

    exchanging = [median([part.exchanging for part in parts]) for parts in runs]
    moving = [
        median([part.exchanging + part.agreeing - part.waited for part in parts]) for parts in runs
    ]
    return Result(
        model,
        work.name,
        kind.name,
        kind.ranks,
        kind.threads,
        kind.exchange,
        round(median(drawn / wall for wall in walls[kind]), 1),
        [round(each, 3) for each in (median(ratios), ratios[0], ratios[-1])],
        round(median(1000 * p[0].stepping / p[0].steps for p in runs), 2),
        round(share(lambda part: part.exchanging + part.agreeing), 4),
        round(share(lambda part: part.waited), 4),
        round(median(1e6 * each / n for each, n in zip(exchanging, layers, strict=True)), 1),
        round(median(1e6 * each / n for each, n in zip(moving, layers, strict=True)), 1),
        round(median(sum(part.bytes_out for part in parts) / computed for parts in runs), 1),
        round(max(part.memory for parts in runs for part in parts) / 1e9, 3),
    )


def shortened(work: Workload, requests: int) -> Workload:
    return replace(work, requests=work.requests[:requests])


def measure(directory: Path, args: argparse.Namespace) -> Iterator[Result]:
    """All groups of a model in turn, for each workload."""
    model = directory.name
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # All are compared with one process.
        kinds = [kind for kind in KINDS if kind.ranks in (1, *args.ranks)]
        groups = [Group(directory, kind, Path(folder), stack) for kind in kinds]
        for name in args.workloads:
            runs: dict[Kind, list[list[Part]]] = {kind: [] for kind in kinds}
            for draw in range(args.rounds + 1):  # the first is the warm-up
                work = shortened(workload(name, VOCAB[model], draw), args.requests)
                for group in groups:
                    parts = group.run(work)
                    wall = max(part.ended for part in parts) - min(part.begun for part in parts)
                    print(f"{model} {name} {draw} {group.kind.name}: {wall:.2f} s", flush=True)
                    if draw:
                        runs[group.kind].append(parts)
                    elif group.kind.balanced:
                        group.balance(group.loads())
            walls = {
                kind: [max(p.ended for p in parts) - min(p.begun for p in parts) for parts in each]
                for kind, each in runs.items()
            }
            for group in groups:
                yield summed(model, work, group, runs[group.kind], walls)


def show(results: list[Result]) -> None:
    print(f"{'':44} tokens/s  of one  step ms  exchange  waited  us/layer  moved  B/token   GB")
    for each in results:
        name = f"{each.model} {each.workload} {each.group}"
        print(
            f"{name:44} {each.speed:8.1f} {each.against[0]:7.1%} {each.step_ms:8.2f} "
            f"{each.exchange_share:9.1%} {each.waited_share:7.1%} {each.layer_us:9.1f} "
            f"{each.moved_us:6.1f} {each.bytes_a_token:8.0f} {each.memory_gb:4.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workloads", nargs="+", choices=("w1", "w2"), default=["w1", "w2"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "PEERS" not in os.environ:
        sys.exit("set PEERS to the folder that holds models/ (benchmarks/peers/README.md)")
    load_before = os.getloadavg()[0]
    results: list[Result] = []
    for model in args.models:
        results += measure(Path(os.environ["PEERS"]) / "models" / model, args)
    show(results)
    record = {
        "processors": machine.processors(),
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "rounds": args.rounds,
        "requests": args.requests,
        "results": [asdict(each) for each in results],
    }
    save(args.json, record)


if __name__ == "__main__":
    main()
