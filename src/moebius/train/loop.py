"""The training loop: steps, metrics, checkpoints, exports, until the recipe's last step or an
interruption."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moebius.errors import ConfigError, NumericalError, StorageError
from moebius.files import json_text
from moebius.moe.health import dead_experts, load_entropy, load_share, max_violation
from moebius.train.step import StepReport
from moebius.train.trainer import Trainer

Line = dict[str, Any]


def run(
    trainer: Trainer,
    folder: Path,
    on_step: Callable[[int, StepReport], None] = lambda step, report: None,
    on_line: Callable[[Line], None] = lambda line: None,
    export: Callable[[Path], None] | None = None,
) -> None:
    """Train to the recipe's last step, from the checkpoint in `folder` where there is one.

    Writes metrics.jsonl and checkpoint.safetensors there and, where the recipe says so,
    TensorBoard's events and models by `export`. A loss that is not finite or a full disk ends the
    run with NumericalError or StorageError and leaves the last checkpoint as it was; SIGINT or
    SIGTERM ends it with KeyboardInterrupt after the step and a checkpoint.
    """
    training, checkpoint = trainer.recipe.training, folder / "checkpoint.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(
        folder, trainer, on_line, trainer.restore(checkpoint) if checkpoint.exists() else {}
    )
    saved = last = time.monotonic()
    try:
        with _stop_signals() as asked:
            while trainer.done < training.steps and not asked:
                report = trainer.step()
                now = time.monotonic()
                trainer.seconds, last = trainer.seconds + now - last, now
                metrics.add(report)
                on_step(trainer.done, report)
                if export and training.export_every and trainer.done % training.export_every == 0:
                    export(folder / "steps" / f"{trainer.done:06d}")
                if now - saved >= training.checkpoint_seconds or asked:
                    trainer.save(checkpoint, metrics.state())
                    saved = now
            if not asked:
                trainer.save(checkpoint, metrics.state())
    except (NumericalError, OSError, StorageError) as error:
        kept = (
            "the checkpoint before is whole"
            if checkpoint.exists()
            else "there is no checkpoint yet"
        )
        if not isinstance(error, OSError):
            raise type(error)(f"{error}; training stopped, {kept}") from None
        full = (
            f"step {trainer.done}: {error.filename or folder} cannot be written ({error.strerror})"
        )
        raise StorageError(f"{full}; training stopped, {kept}") from None
    if asked:
        raise KeyboardInterrupt


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The signals that came to end the run, so that a step is never cut in two."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda which, _: asked.append(which)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Metrics:
    """One line every log_every steps: means since the last line; every evaluate_every steps bits
    per byte too.

    What the next line is made of is part of a checkpoint's `state`, so that an interrupted run
    writes the lines of one that was not; what was written after the checkpoint is forgotten.
    """

    def __init__(
        self, folder: Path, trainer: Trainer, on_line: Callable[[Line], None], state: dict[str, Any]
    ) -> None:
        self._path, self._trainer, self._on_line = folder / "metrics.jsonl", trainer, on_line
        self._pending: list[dict[str, Any]] = state.get("pending", [])
        self._seconds = trainer.seconds
        self._events: Any = None
        self._path.touch()
        if trainer.ranks.rank == 0:
            os.truncate(self._path, min(state.get("size", 0), self._path.stat().st_size))
            if trainer.recipe.training.tensorboard:
                self._events = _tensorboard(folder, trainer.done + 1)

    def state(self) -> dict[str, Any]:
        return {"pending": self._pending, "size": self._path.stat().st_size}

    def add(self, report: StepReport) -> None:
        trainer, training = self._trainer, self._trainer.recipe.training
        told = report._asdict().items()
        self._pending.append(
            {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in told}
        )
        evaluated = trainer.done == training.steps or trainer.done % training.evaluate_every == 0
        if not (evaluated or trainer.done % training.log_every == 0):
            return
        line: Line = {"step": trainer.done, "seconds": round(trainer.seconds, 1)} | self._means()
        self._pending, self._seconds = [], trainer.seconds
        if trainer.ranks.rank:
            return
        if evaluated:
            line["heldout_bits_per_byte"] = trainer.evaluate(training.evaluate_rows)
            if trainer.recipe.routing.eval_capacity_factor is not None:
                limited = trainer.evaluate(training.evaluate_rows, at_capacity=True)
                line["heldout_bits_per_byte_at_capacity"] = limited
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")
        if self._events is not None:
            for tag, value in _flat(line).items():
                self._events.add_scalar(tag, value, trainer.done)
            self._events.flush()
        self._on_line(line)

    def _means(self) -> Line:
        """Means over the pending steps; router health, a value a layer, of their loads together."""
        pending, training = self._pending, self._trainer.recipe.training
        names = ("loss", "balance", "z", "grad_norm")
        line: Line = {name: sum(p[name] for p in pending) / len(pending) for name in names}
        tokens = len(pending) * training.tokens_per_step
        line["learning_rate"] = pending[-1]["learning_rate"]
        line["tokens_per_second"] = round(tokens / max(self._trainer.seconds - self._seconds, 1e-9))
        counts = torch.tensor([p["counts"] for p in pending], dtype=torch.float64).sum(0)
        if counts.numel() == 0:
            return line
        return line | {
            "max_violation": _rounded(max_violation(counts)),
            "load_entropy": _rounded(load_entropy(counts)),
            "dead_experts": dead_experts(counts).sum(-1).tolist(),
            "dropped": _rounded(torch.tensor([p["dropped"] for p in pending]).mean(0)),
            "expert_load": [_rounded(layer) for layer in load_share(counts)],
        }


def _tensorboard(folder: Path, first_step: int) -> Any:
    """A writer of events; what older files hold of first_step and later is void."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        missing = (
            "training.tensorboard is true, but TensorBoard is missing: pip install "
            "'moebius[tensorboard]'"
        )
        raise ConfigError(missing) from None
    return SummaryWriter(str(folder), purge_step=first_step)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _flat(line: Line) -> dict[str, float]:
    """Scalars by tag: layers and kinds of text side by side; the loads of single experts stay in
    metrics.jsonl."""
    scalars = {name: value for name, value in line.items() if not isinstance(value, (dict, list))}
    for name, value in line.items():
        several = enumerate(value) if isinstance(value, list) else ()
        scalars |= {f"{name}/layer_{i}": x for i, x in several if not isinstance(x, list)}
        scalars |= (
            {f"{name}/{kind}": x for kind, x in value.items()} if isinstance(value, dict) else {}
        )
    return scalars
