"""The training loop: bfloat16 compute, float32 master weights, AdamW, and checkpoints that resume bit for bit.

A step reads: batch, losses, gradients, clip, update. What it computes depends on the recipe and on the step's number
alone. Shape legend: R rows, L tokens in a row, T = R * L, D model, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moebius.errors import ConfigError, NumericalError, WeightsError
from moebius.models.decoder import Decoder
from moebius.models.weights import publish
from moebius.moe.health import expert_counts, load_share, max_violation
from moebius.moe.losses import load_balance_loss, router_z_loss
from moebius.train.data import Batches, PreparedData
from moebius.train.evaluate import scores
from moebius.train.ops import DocumentAttend, TrainingOps, cross_entropy
from moebius.train.recipe import Recipe


@dataclass(frozen=True)
class StepReport:
    """What a step measured, before its update. Losses in nats a token; counts are (layers, E)."""

    loss: float
    balance: float
    z: float
    grad_norm: float
    rate: float
    counts: Tensor


class Trainer:
    """Masters in float32, a decoder in bfloat16 that is a rounded copy of them, and the optimiser between the two.

    The decoder's weights are at every step what an export would hold.
    """

    def __init__(self, recipe: Recipe, data: PreparedData) -> None:
        self.recipe, self.data = recipe, data
        config, training = recipe.model_config(), recipe.training
        self.decoder = Decoder(config, TrainingOps(), dtype=torch.bfloat16)
        initial = Decoder(config, TrainingOps(), dtype=torch.float32)
        initial.init_weights(torch.Generator().manual_seed(recipe.seed), std=recipe.model.init_std)
        self._masters = {name: p.detach() for name, p in initial.named_parameters()}
        self._copies = dict(self.decoder.named_parameters())
        self._optimizer = torch.optim.AdamW(
            _groups(self._masters, training.weight_decay),
            lr=0.0,
            betas=(training.beta1, training.beta2),
            fused=True,
        )
        mixture = dataclasses.asdict(recipe.mixture)
        self._batches = Batches(data, mixture, training.rows_per_step, training.row_length, recipe.seed)
        self._positions_T = torch.arange(training.row_length).repeat(training.rows_per_step)
        self.done = 0
        self.seconds = 0.0
        self._round()

    def step(self) -> StepReport:
        """One update. Raises: NumericalError naming the step, before anything changes, for a loss that is no number."""
        training = self.recipe.training
        batch = self._batches.batch(self.done)
        attend = DocumentAttend(self.decoder.config, batch.document_RL, torch.bfloat16)
        hidden_TD, routings = self.decoder(batch.input_RL.view(-1), self._positions_T, attend)
        loss = cross_entropy(hidden_TD, self.decoder.embed_tokens.weight, batch.target_RL.view(-1))
        balance, z = load_balance_loss(routings), router_z_loss(routings)
        torch.autograd.backward(loss + training.load_balance * balance + training.z_loss * z)
        grad_norm = self._take_gradients()
        if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
            raise NumericalError(
                f"step {self.done}: the loss is {loss.item()}, the gradient's norm {grad_norm.item()}; "
                "training stopped, the last checkpoint is good"
            )
        rate = training.rate_at(self.done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._round()
        self.done += 1
        experts = self.recipe.model.num_experts
        counts = torch.stack([expert_counts(r.expert_ids_TK, experts) for r in routings if r is not None])
        return StepReport(loss.item(), balance.item(), z.item(), grad_norm.item(), rate, counts)

    def evaluate(self, max_rows: int | None = None) -> dict[str, float]:
        """Bits per byte of each kind of held-out text, and of `all`."""
        length = self.recipe.training.row_length
        found = scores(self.decoder, self.data.heldout, self.data.tokenizer, length, max_rows)
        return {kind: score.bits_per_byte for kind, score in found.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Masters and both moments by name: with `done`, everything that the next step depends on."""
        tensors = {}
        for name, master in self._masters.items():
            slots = self._optimizer.state.get(master) or {
                key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")
            }
            tensors[f"master.{name}"] = master
            tensors[f"mean.{name}"] = slots["exp_avg"]
            tensors[f"square.{name}"] = slots["exp_avg_sq"]
        return tensors

    def save(self, path: Path) -> None:
        """Write the run's state so that `path` holds either the old one or this one, whenever the machine stops.

        It is one safetensors file: tensors, and JSON in its header. Nothing is ever unpickled.
        """
        partial = path.with_suffix(".partial")
        header = {"step": self.done, "fingerprint": self.fingerprint(), "seconds": self.seconds}
        save_file(self.tensors(), partial, metadata={"moebius": json.dumps(header)})
        publish(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from what `save` wrote.

        Raises: WeightsError, when the file is missing, truncated or no training state; ConfigError, when it belongs
        to another recipe or to other data.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["moebius"])
                step, fingerprint, seconds = (header[key] for key in ("step", "fingerprint", "seconds"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise WeightsError(f"{path} is no training checkpoint: {error}") from None
        if fingerprint != self.fingerprint():
            raise ConfigError("the checkpoint belongs to another recipe or corpus; choose another --out or delete it")
        for name, master in self._masters.items():
            master.copy_(tensors[f"master.{name}"])
            self._optimizer.state[master] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"mean.{name}"],
                "exp_avg_sq": tensors[f"square.{name}"],
            }
        self.done, self.seconds = step, seconds
        self._round()

    def fingerprint(self) -> str:
        """Of all that a run's numbers depend on."""
        return hashlib.sha256(repr((self.recipe, self.data.facts["corpus_sha256"])).encode()).hexdigest()

    def _take_gradients(self) -> Tensor:
        """Move the decoder's gradients to the masters, clipped in global norm; their norm before that."""
        for name, master in self._masters.items():
            grad = self._copies[name].grad
            master.grad = torch.zeros_like(master) if grad is None else grad.float()
            self._copies[name].grad = None
        return torch.nn.utils.clip_grad_norm_(list(self._masters.values()), self.recipe.training.clip_norm)

    @torch.no_grad()
    def _round(self) -> None:
        torch._foreach_copy_(list(self._copies.values()), [self._masters[name] for name in self._copies])


def _groups(masters: dict[str, Tensor], decay: float) -> list[dict[str, Any]]:
    """Matrices decay, gains do not."""
    return [
        {"params": [m for m in masters.values() if m.ndim >= 2], "weight_decay": decay},
        {"params": [m for m in masters.values() if m.ndim < 2], "weight_decay": 0.0},
    ]


def run(trainer: Trainer, folder: Path, on_step: Callable[[int, StepReport], None] = lambda step, report: None) -> None:
    """Train to the recipe's last step, from the checkpoint in `folder` where there is one.

    Writes metrics.jsonl and checkpoint.safetensors there. A loss that is not finite ends the run with NumericalError
    and leaves the last checkpoint as it was; so does an interruption, after a checkpoint of its own.
    """
    training, checkpoint = trainer.recipe.training, folder / "checkpoint.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        trainer.restore(checkpoint)
    metrics = _Metrics(folder / "metrics.jsonl", trainer)
    saved = last = time.monotonic()
    try:
        while trainer.done < training.steps:
            report = trainer.step()
            now = time.monotonic()
            trainer.seconds, last = trainer.seconds + now - last, now
            on_step(trainer.done, report)
            metrics.add(report)
            if now - saved >= training.checkpoint_seconds:
                trainer.save(checkpoint)
                saved = now
    except KeyboardInterrupt:
        trainer.save(checkpoint)
        raise
    trainer.save(checkpoint)


class _Metrics:
    """One JSON line every log_every steps: means since the last line; every evaluate_every steps bits per byte too."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        self._path, self._trainer = path, trainer
        self._reports: list[StepReport] = []
        self._since = trainer.seconds

    def add(self, report: StepReport) -> None:
        trainer, training = self._trainer, self._trainer.recipe.training
        self._reports.append(report)
        finished = trainer.done == training.steps
        evaluated = finished or trainer.done % training.evaluate_every == 0
        if not (evaluated or trainer.done % training.log_every == 0):
            return
        line = self._means() | {"step": trainer.done, "seconds": round(trainer.seconds, 1)}
        if evaluated:
            line["heldout_bits_per_byte"] = trainer.evaluate(training.evaluate_rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._reports, self._since = [], trainer.seconds

    def _means(self) -> dict[str, Any]:
        reports, training = self._reports, self._trainer.recipe.training
        counts = torch.stack([r.counts for r in reports]).sum(0)
        tokens = len(reports) * training.rows_per_step * training.row_length
        means = {
            name: sum(getattr(r, name) for r in reports) / len(reports)
            for name in ("loss", "balance", "z", "grad_norm")
        }
        return means | {
            "learning_rate": reports[-1].rate,
            "tokens_per_second": round(tokens / max(self._trainer.seconds - self._since, 1e-9)),
            "max_violation": [round(x, 3) for x in max_violation(counts).tolist()],
            "expert_load": [[round(x, 4) for x in layer] for layer in load_share(counts).tolist()],
        }
