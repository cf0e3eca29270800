"""What steps and exchanges cost, as measured, and what others would: two fitted models.

A step of one rank takes

    base + per_token * T + per_context * A + per_sample * S + per_expert * X + per_pair * P

seconds for the work of StepWork. One process computes as many pairs for each token, so that the fit
tells the two apart by the model's parameters alone.

An exchange takes latency + bytes / bandwidth for each layer.

Shapes: M measurements.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebius.errors import ConfigError
from moebius.files import json_text
from moebius.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """What a model's experts are, as far as costs depend on them.

    layers      that have a router
    experts     of one of them
    top_k       choices a token
    row_bytes   of one token's row in the dtype that is computed in
    share       of the parameters that one token is multiplied by before the vocabulary's: those in
                its chosen experts
    """

    layers: int
    experts: int
    top_k: int
    row_bytes: int
    share: float

    @classmethod
    def of(cls, model: ModelConfig, itemsize: int) -> "ExpertSizes":
        """Raises ConfigError for a model without experts."""
        counts = list(model.experts.values())
        if not counts:
            raise ConfigError(f"this {model.model_type} model has no experts to spread over ranks")
        parts = [part for part in model.feed_forward if part.router is not None]
        top_k = max(part.router.top_k for part in parts if part.router is not None)
        hidden = model.hidden_size
        chosen = sum(3 * hidden * part.width * top_k for part in parts)
        mixers = [layer.mixer for layer in model.layers if layer.mixer is not None]
        others = sum(
            math.prod(parameter.shape) for mixer in mixers for parameter in mixer.parameters(hidden)
        )
        share = chosen / (chosen + others)
        return cls(len(counts), max(counts), top_k, hidden * itemsize, share)

    def read(self, tokens: float, ranks: int = 1) -> float:
        """Experts, of all layers, that one of `ranks` reads for so many tokens of all of them, each
        token's choices drawn evenly."""
        missed = math.pow(1 - self.top_k / self.experts, tokens)
        return self.layers * self.experts / ranks * (1 - missed)

    def bytes_out(self, tokens: float, ranks: int) -> float:
        """Bytes of rows that a rank sends for so many tokens of each rank, in all layers: each to
        the ranks that hold any of its experts, and each pair's output home."""
        if ranks == 1:
            return 0.0
        missed = 1.0
        for choice in range(self.top_k):
            missed *= max(0.0, 1 - self.experts / ranks / (self.experts - choice))
        sent = (ranks - 1) * (1 - missed)
        back = self.top_k * (ranks - 1) / ranks
        return self.layers * tokens * (sent + back) * self.row_bytes


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a rank does in a step.

    tokens    T, its own
    context   A, pairs of a token and one that it attends to
    samples   S, tokens that it draws
    experts   X, whose weights it reads, of all layers
    pairs     P, (token, choice) pairs that it computes, of all layers
    """

    tokens: float
    context: float
    samples: float
    experts: float
    pairs: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A step of one process, and the seconds that it took."""

    work: StepWork
    seconds: float


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds, see above; error: the mean of |predicted / measured - 1| over what was measured."""

    base: float
    per_token: float
    per_context: float
    per_sample: float
    per_expert: float
    per_pair: float
    error: float

    @classmethod
    def fit(cls, measured: Sequence[Measured], sizes: ExpertSizes) -> "StepCosts":
        """The least squares of relative errors, no cost below 0."""
        works = [each.work for each in measured]
        rows = [[1.0, one.tokens, one.context, one.samples, one.experts] for one in works]
        seconds_M = np.array([each.seconds for each in measured])
        matrix = np.array(rows) / seconds_M[:, None]
        found = _not_negative(matrix, np.ones(len(measured)))
        predicted = matrix @ found
        base, per_token, per_context, per_sample, per_expert = map(float, found)
        pairs = sizes.layers * sizes.top_k
        return cls(
            base,
            per_token * (1 - sizes.share),
            per_context,
            per_sample,
            per_expert,
            per_token * sizes.share / pairs,
            float(np.abs(predicted - 1).mean()),
        )

    def seconds(self, work: StepWork) -> float:
        return (
            self.base
            + self.per_token * work.tokens
            + self.per_context * work.context
            + self.per_sample * work.samples
            + self.per_expert * work.experts
            + self.per_pair * work.pairs
        )


@dataclass(frozen=True, slots=True)
class ExchangeCosts:
    """Seconds a layer, and bytes a second that a rank sends, among so many ranks of one host."""

    ranks: int
    latency: float
    bandwidth: float

    @classmethod
    def fit(
        cls, ranks: int, bytes_out: Sequence[float], seconds: Sequence[float]
    ) -> "ExchangeCosts":
        """Of layers: the least squares of relative errors."""
        times = np.array(seconds)
        matrix = np.stack([np.ones(len(times)), np.array(bytes_out)], axis=1) / times[:, None]
        latency, a_byte = _not_negative(matrix, np.ones(len(times)))
        return cls(ranks, float(latency), 1 / max(float(a_byte), 1e-15))

    def seconds(self, layers: int, bytes_out: float, ranks: int) -> float:
        """Of a step, with its one agreement. A layer waits for each other rank: where they are
        more than was measured, as many times as long."""
        latency = self.latency * (ranks - 1) / (self.ranks - 1)
        return (layers + 1) * latency + bytes_out / self.bandwidth


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured on one machine.

    sizes       of the model
    loads       how many pairs each expert of each layer with a router got meanwhile
    threads     of a rank
    at_once     ranks that computed at the same time, as those of one host do
    exchanges   by what they go through
    """

    model: str
    sizes: ExpertSizes
    loads: dict[int, list[int]]
    machine: str
    threads: int
    at_once: int
    steps: StepCosts
    exchanges: dict[str, ExchangeCosts]

    def text(self) -> str:
        return json_text(asdict(self), indent=2)

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """Raises ConfigError for a file that holds no such record."""
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                str(found["model"]),
                ExpertSizes(**found["sizes"]),
                {int(layer): list(map(int, each)) for layer, each in found["loads"].items()},
                str(found["machine"]),
                int(found["threads"]),
                int(found["at_once"]),
                StepCosts(**_floats(found["steps"])),
                {
                    name: ExchangeCosts(ranks=int(each.pop("ranks")), **_floats(each))
                    for name, each in found["exchanges"].items()
                },
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} holds no measured costs ({error}); benchmarks/step_costs.py writes them"
            ) from None


def _floats(record: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items()}


def _not_negative(matrix: "np.ndarray[Any, Any]", wanted: "np.ndarray[Any, Any]") -> Any:
    """Least squares, with what would be below 0 left out, the lowest first."""
    kept = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            solved = np.zeros(matrix.shape[1])
            solved[kept] = found.clip(0)
            return solved
        del kept[int(found.argmin())]
