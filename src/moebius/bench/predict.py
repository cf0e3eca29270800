"""The throughput of ranks that nobody has here: the real schedulers on a clock that is computed.

Each rank's scheduler plans its steps as it would while serving; a step takes as long as the slowest
rank's, by measured costs (costs.py). The rank whose experts are chosen most computes as many pairs
as by chance, or as by the loads that were measured, whichever is more. Not in it: fronts, networks
that are shared, and processors that others use.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist, mean

from moebius.bench.costs import Costs, ExchangeCosts, ExpertSizes, StepCosts, StepWork
from moebius.errors import ConfigError
from moebius.moe.placement import Placement
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.schedule.blocks import BlockPool
from moebius.schedule.config import SchedulerConfig
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan


@dataclass(frozen=True, slots=True)
class Job:
    """Tokens of a request's prompt and of its answer."""

    prompt: int
    output: int


# What is predicted for: the lengths of W2 of benchmarks/peers, evenly spread.
PROMPTS = (32, 256)
OUTPUTS = (16, 256)
REQUESTS_A_SEQUENCE = 2


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of all ranks together, in tokens of answers, seconds and steps.

    exchange_share   of the time that ranks exchange
    tokens           computed by a rank in a step, on average; bytes_out: sent by it to others
    """

    speed: float
    seconds: float
    steps: int
    exchange_share: float
    tokens: float
    bytes_out: float


@dataclass
class Run:
    """What steps that were simulated come to.

    seconds     of computing, each step at the slowest rank
    tokens      that were computed; drawn: of answers
    bytes_out   sent by all ranks; most_bytes: by the rank that sends most, step by step
    """

    sizes: ExpertSizes
    ranks: int
    drawn: int
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    bytes_out: float = 0.0
    most_bytes: float = 0.0

    def over(self, exchange: ExchangeCosts | None) -> Prediction:
        """With what the ranks exchange through, if they do."""
        exchanging = 0.0
        if exchange is not None:
            waits = exchange.seconds(self.sizes.layers, 0.0, self.ranks)
            exchanging = self.steps * waits + self.most_bytes / exchange.bandwidth
        seconds = self.seconds + exchanging
        rank_steps = self.steps * self.ranks
        return Prediction(
            self.drawn / seconds,
            seconds,
            self.steps,
            exchanging / seconds,
            self.tokens / rank_steps,
            self.bytes_out / rank_steps,
        )


class Simulation:
    """Ranks that share experts, and a queue in front of them.

    concurrency   requests that run at once, of all ranks together
    imbalance     tokens of the rank whose experts are chosen most, over the mean
    """

    def __init__(
        self,
        sizes: ExpertSizes,
        costs: StepCosts,
        ranks: int,
        *,
        concurrency: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        imbalance: float = 1.0,
    ) -> None:
        self._sizes = sizes
        self._imbalance = imbalance
        self._costs = costs
        self._ranks = ranks
        seats = -(-concurrency // ranks)
        config = SchedulerConfig(
            max_num_seqs=seats,
            max_num_batched_tokens=max(max_num_batched_tokens, seats),
            max_model_len=max_model_len,
            max_queue_requests=10**6,
            max_queue_tokens=10**9,
        )
        blocks = seats * -(-max_model_len // 16)
        self._schedulers = [
            Scheduler(config, BlockPool(blocks, 16, enable_prefix_caching=False, key=bytes(16)))
            for _ in range(ranks)
        ]
        self._limits = ServingLimits(2**15, max_model_len)
        self._left = [0] * ranks

    def run(self, jobs: Sequence[Job]) -> Run:
        """All are there from the start; each goes to the rank that has least to draw."""
        for number, job in enumerate(jobs):
            self._give(number, job)
        run = Run(self._sizes, self._ranks, sum(job.output for job in jobs))
        while any(scheduler.has_work for scheduler in self._schedulers):
            plans = [scheduler.plan(run.seconds) for scheduler in self._schedulers]
            self._add(run, plans)
            for scheduler, plan in zip(self._schedulers, plans, strict=True):
                scheduler.update(
                    plan, {chunk.request_id: (1,) for chunk in plan.chunks if chunk.samples}
                )
        return run

    def _give(self, number: int, job: Job) -> None:
        rank = self._left.index(min(self._left))
        self._left[rank] += job.output
        params = SamplingParams(max_tokens=job.output, ignore_eos=True)
        asked = EngineRequest.create(
            str(number), [1] * job.prompt, params, self._limits, arrival=0.0, seed=0
        )
        self._schedulers[rank].add(Request(asked))

    def _add(self, run: Run, plans: Sequence[StepPlan]) -> None:
        """A step of all ranks."""
        sizes = self._sizes
        tokens = [plan.num_tokens for plan in plans]
        total = sum(tokens)
        drawn = total * sizes.top_k
        most = max(busiest(drawn, self._ranks), drawn * self._imbalance / self._ranks)
        pairs = most * sizes.layers
        experts = sizes.read(total, self._ranks)
        works = [
            StepWork(plan.num_tokens, context(plan), samples(plan), experts, pairs)
            for plan in plans
        ]
        sent = [sizes.bytes_out(count, self._ranks) for count in tokens]
        run.steps += 1
        run.seconds += max(map(self._costs.seconds, works))
        run.tokens += total
        run.bytes_out += sum(sent)
        run.most_bytes += max(sent)


def context(plan: StepPlan) -> int:
    """Pairs of a token and one that it attends to."""
    return sum(
        chunk.num_tokens * chunk.start + chunk.num_tokens * (chunk.num_tokens + 1) // 2
        for chunk in plan.chunks
    )


def samples(plan: StepPlan) -> int:
    """Tokens that are drawn."""
    return sum(chunk.samples for chunk in plan.chunks)


def busiest(pairs: int, ranks: int) -> float:
    """Pairs of the rank that gets most, where each goes to any rank as likely: the mean, and as
    many standard deviations as the highest of so many normal draws is above theirs (G. Blom's
    approximation, 1958)."""
    if ranks == 1:
        return float(pairs)
    share = 1 / ranks
    deviation = math.sqrt(pairs * share * (1 - share))
    above = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    return min(float(pairs), pairs * share + deviation * above)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What `moebius plan` says of ranks beyond their memory.

    tokens        of each rank in a step in which all that may run decode, and bytes_out those that
                  it then sends to others
    predictions   by what is exchanged through
    """

    ranks: int
    tokens: int
    bytes_out: int
    measured: Costs | None
    predictions: dict[str, Prediction]

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, how much, remark), as the memory plan's."""
        said = f"to other ranks, in a step of {self.tokens} sequences that decode at each rank"
        rows = [("exchanged", f"{self.bytes_out / 2**20:.1f} MiB", said)] if self.ranks > 1 else []
        if self.measured is None:
            how = "give --costs FILE, which benchmarks/step_costs.py measures"
            return [*rows, ("speed", "", how)]
        for name, found in self.predictions.items():
            through = f" over {name}, {found.exchange_share:.0%} of it exchanging" if name else ""
            count = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
            rows.append(("predicted", f"{found.speed:,.0f} tokens/s", f"{count}{through}"))
        return [*rows, ("", "", self._basis(self.measured))]

    def _basis(self, costs: Costs) -> str:
        """What was measured, and what is not."""
        measured = (
            f"steps of {costs.model} measured on {costs.machine}, {costs.threads} "
            f"thread{'s' * (costs.threads > 1)} a rank, {costs.at_once} at once, fitted to "
            f"{costs.steps.error:.0%}"
        )
        if self.ranks == 1:
            return measured
        among = min(each.ranks for each in costs.exchanges.values())
        parts = [measured, f"exchanges among {among} ranks of one host"]
        if self.ranks > among:
            parts.append("more ranks and other links are extrapolated")
        return "; ".join(parts)


def outlook(
    sizes: ExpertSizes,
    ranks: int,
    costs: Costs | None,
    *,
    placement: Placement | None,
    sequences: int,
    max_num_batched_tokens: int,
) -> Outlook:
    """For `sequences` that run at once at each rank, with experts placed so if there are several.

    Raises ConfigError for costs of another model.
    """
    predictions = {}
    if costs is not None:
        if costs.sizes != sizes:
            raise ConfigError(
                f"--costs are those of {costs.model}, whose layers, experts or dtype are others "
                "than this model's; measure this one by benchmarks/step_costs.py"
            )
        simulation = Simulation(
            sizes,
            costs.steps,
            ranks,
            concurrency=sequences * ranks,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=PROMPTS[1] + OUTPUTS[1],
            imbalance=1.0 if placement is None else mean_imbalance(placement, costs.loads),
        )
        run = simulation.run(jobs(sequences * ranks * REQUESTS_A_SEQUENCE))
        links: dict[str, ExchangeCosts | None] = dict(costs.exchanges) if ranks > 1 else {"": None}
        predictions = {name: run.over(exchange) for name, exchange in links.items()}
    return Outlook(ranks, sequences, round(sizes.bytes_out(sequences, ranks)), costs, predictions)


def mean_imbalance(placement: Placement, loads: Mapping[int, Sequence[int]]) -> float:
    """Of all layers, each of which waits for its own busiest rank."""
    return mean(placement.imbalance(loads).values())


def jobs(count: int) -> list[Job]:
    """Requests of such lengths, the same ones each time."""
    draw = Random(0)
    return [Job(draw.randint(*PROMPTS), draw.randint(*OUTPUTS)) for _ in range(count)]
