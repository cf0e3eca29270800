"""One run: train it with moebius.train, and measure what the claims speak of. Nats a byte
throughout.

Shape legend: S layers with a router, E experts, K experts a token, T tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from claims.experiments import DOMAINS, PAIR_WIDTH, Run, facts, recipe_of
from moebius.moe import health
from moebius.moe.losses import present
from moebius.moe.router import Router, Routing
from moebius.moe.training import TrainingRouting
from moebius.nn.packed import PackedPast
from moebius.train.data import Batches, PreparedData, evaluation_batches, prepare
from moebius.train.evaluate import Score, measuring, routers, scores
from moebius.train.trainer import Trainer

CURVE_EVERY = 100
CAPACITIES = (0.5, 0.75, 1.0, 1.25, 2.0)
_PROBE_ROWS = 32
_CURVE_ROWS = 48
_FINAL_ROWS = 200


class PureBatches(Batches):
    """Batches whose micro-batches are of one kind of text each: rows are shuffled within a kind,
    then in groups."""

    parts = 4

    def _shuffled(self, epoch: int) -> np.ndarray:
        order = super()._shuffled(epoch)
        size = self._rows // self.parts
        groups: list[np.ndarray] = []
        for kind in np.unique(order[:, 0]):
            groups += _groups(order[order[:, 0] == kind], size)
        chosen = np.random.default_rng((self._seed, epoch, 1)).permutation(len(groups))
        return np.concatenate([groups[i] for i in chosen])


def _groups(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]


def losses(trainer: Trainer, max_rows: int, *, at_capacity: bool = False) -> dict[str, float]:
    """Of held-out text, by kind, and `all`: their mean with the weights of DOMAINS."""
    return _nats(_scores(trainer, max_rows, at_capacity=at_capacity))


def _scores(trainer: Trainer, max_rows: int, *, at_capacity: bool = False) -> dict[str, Score]:
    length = trainer.recipe.training.row_length
    return scores(trainer.decoder, trainer.data, length, max_rows, at_capacity=at_capacity)


def _nats(found: dict[str, Score]) -> dict[str, float]:
    by_kind = {kind: found[kind].nats / found[kind].num_tokens for kind in DOMAINS}
    return by_kind | {"all": sum(weight * by_kind[kind] for kind, weight in DOMAINS.items())}


class Probe:
    """The same held-out rows looked at again and again: where they go, how large the logits are."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        length = trainer.recipe.training.row_length
        stream = np.concatenate(
            [stream[: _PROBE_ROWS // 2 * length] for stream in trainer.data.heldout.values()]
        )
        self._batch = next(evaluation_batches(stream, trainer.data, _PROBE_ROWS, length))

    @torch.no_grad()
    def look(self) -> list[Routing]:
        decoder = self._trainer.decoder
        batch = self._batch
        positions_T = torch.arange(batch.input_RL.shape[1]).repeat(len(batch.input_RL))
        with measuring(decoder):
            past = PackedPast(batch.input_RL.shape[1], batch.document_RL)
            return present(decoder(batch.input_RL.reshape(-1), positions_T, past)[1])

    def ids(self) -> torch.Tensor:
        """Expert ids (S, T, K)."""
        return torch.stack([routing.expert_ids_TK for routing in self.look()])

    def logits(self) -> dict[str, float]:
        """Mean logsumexp squared, and the largest absolute logit, over all layers."""
        found = torch.stack([routing.logits_TE for routing in self.look()])
        return {
            "z": torch.logsumexp(found, -1).square().mean().item(),
            "largest_logit": found.abs().max().item(),
        }

    def flipped(self) -> float:
        """Which share of tokens would meet other experts if the router ran in bfloat16."""
        changed: list[torch.Tensor] = []

        def look(router: Router, inputs: tuple[torch.Tensor], routing: Routing) -> None:
            ids = health.routed_in_bfloat16(
                inputs[0], router.weight, router.bias, router.config, router.selection_bias
            )
            changed.append((health.overlap(routing.expert_ids_TK, ids) < 1).double().mean())

        hooks = [router.register_forward_hook(look) for router in routers(self._trainer.decoder)]
        self.look()
        for hook in hooks:
            hook.remove()
        return torch.stack(changed).mean().item()


def train(name: str, run: Run, seed: int, folder: Path, steps: int) -> dict[str, Any]:
    """The whole run: its curve, its figures at the end, and what it took."""
    recipe = recipe_of(name, run, seed, folder / "corpus", steps)
    trainer = Trainer(recipe, prepare(recipe, folder / "data"))
    if run.pure:
        trainer._batches = PureBatches(
            trainer.data, {}, recipe.training.rows_per_step, recipe.training.row_length, seed
        )
    probe = Probe(trainer) if run.experts else None
    curve: list[dict[str, float]] = []
    seen: list[torch.Tensor] = []
    counts = torch.zeros(1)
    spent = 0.0
    while trainer.done < steps:
        before = time.process_time()
        report = trainer.step()
        spent += time.process_time() - before
        counts = counts + report.counts if trainer.done > steps - 100 else counts
        if trainer.done % CURVE_EVERY == 0 or trainer.done == steps:
            curve.append(
                {
                    "step": trainer.done,
                    "loss": losses(trainer, _CURVE_ROWS)["all"],
                    "seconds": spent,
                }
            )
            seen += [probe.ids()] if probe else []
    result = {"name": name, **facts(run, seed, steps), "curve": curve, "cpu_seconds": spent}
    result["tokens"] = steps * recipe.training.tokens_per_step
    result["parameters"] = sum(p.numel() for p in trainer.decoder.parameters())
    found = _scores(trainer, _FINAL_ROWS)
    result |= {"loss": _nats(found)}
    if probe is not None:
        result |= {
            "routing": _health(counts, found),
            "bfloat16_changed": probe.flipped(),
            **probe.logits(),
        }
        last = _flat(seen[-1])
        result["saturation"] = [health.overlap(_flat(one), last).mean().item() for one in seen]
        result["at_capacity"] = {str(factor): value for factor, value in _sweep(trainer)}
    return result


def _flat(ids_STK: torch.Tensor) -> torch.Tensor:
    return ids_STK.flatten(0, 1)


def _health(counts_SE: torch.Tensor, found: dict[str, Score]) -> dict[str, Any]:
    """Balance over the last hundred steps; how differently the kinds of held-out text are spread, 0
    to 1."""
    loads = {kind: health.load_share(torch.as_tensor(found[kind].counts_SE)) for kind in DOMAINS}
    apart = [health.total_variation(loads[a], loads[b]) for a, b in combinations(DOMAINS, 2)]
    return {
        "max_violation": health.max_violation(counts_SE).tolist(),
        "load_entropy": health.load_entropy(counts_SE).tolist(),
        "dead_experts": health.dead_experts(counts_SE).sum(-1).tolist(),
        "domain_variation": torch.stack(apart).mean().item(),
    }


def _sweep(trainer: Trainer) -> Iterator[tuple[float, float]]:
    """(capacity factor, loss) of the trained model when experts have so much room in evaluation."""
    for factor in CAPACITIES if trainer.recipe.name == "e8" else CAPACITIES[-2:]:
        with _limited(trainer, factor):
            yield factor, losses(trainer, _FINAL_ROWS, at_capacity=True)["all"]


@contextmanager
def _limited(trainer: Trainer, factor: float) -> Iterator[None]:
    limits = TrainingRouting(dropless=False, capacity_factor=factor, eval_capacity_factor=factor)
    before = [router.limits for router in routers(trainer.decoder)]
    drops = trainer.decoder.ops.drops
    trainer.decoder.ops.drops = True
    for router in routers(trainer.decoder):
        router.limits = limits
    try:
        yield
    finally:
        trainer.decoder.ops.drops = drops
        for router, limit in zip(routers(trainer.decoder), before, strict=True):
            router.limits = limit


def train_pair(
    seed: int,
    folder: Path,
    steps: int,
    *,
    device: str = "cpu",
    width: int = PAIR_WIDTH,
    training: Mapping[str, Any] = MappingProxyType({}),
    curve_every: int = CURVE_EVERY,
    told: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Row 2: a mixture and its dense twin, wider than the others, trained in turn in one process,
    five steps each.

    training: what its recipes have of their own. told: hears the result so far, at each point of
    the curves.
    """
    of_both = dict(training)
    arms = {
        "dense": Run(experts=0, width=width, training=of_both),
        "e8": Run(width=width, training=of_both),
    }
    trainers: dict[str, Trainer] = {}
    for name, run in arms.items():
        recipe = recipe_of(name, run, seed, folder / "corpus", steps)
        data = _data(trainers) or prepare(recipe, folder / "data")
        trainers[name] = Trainer(recipe, data, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else bool
    result: dict[str, Any] = {"name": "pair", **facts(replace(arms["e8"]), seed, steps)}
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    while trainers["dense"].done < steps:
        for name, trainer in trainers.items():
            start = time.perf_counter()
            for _ in range(5):
                trainer.step()
            wait()
            seconds[name].append((time.perf_counter() - start) / 5)
            if trainer.done % curve_every == 0:
                point = {"step": trainer.done, "loss": losses(trainer, _CURVE_ROWS)["all"]}
                curves[name].append(point)
        if curves["e8"] and trainers["e8"].done % curve_every == 0:
            told({"curves": curves, "step_seconds": seconds})
    return result | {"curves": curves, "step_seconds": seconds}


def _data(trainers: dict[str, Trainer]) -> PreparedData | None:
    return next((trainer.data for trainer in trainers.values()), None)
