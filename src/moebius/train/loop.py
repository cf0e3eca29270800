"""The training loop: steps, metrics, checkpoints, exports, to the last step or an interruption."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
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
    checkpoint = folder / "checkpoint.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    pending = trainer.restore(checkpoint) if checkpoint.exists() else {}
    metrics = Metrics(folder, trainer, on_line, pending)
    try:
        with _stop_signals() as asked:
            _steps(trainer, metrics, folder, checkpoint, asked, on_step, export)
    except (NumericalError, OSError, StorageError) as error:
        kept = "there is no checkpoint yet"
        if checkpoint.exists():
            kept = "the checkpoint before is whole"
        if not isinstance(error, OSError):
            raise type(error)(f"{error}; training stopped, {kept}") from None
        raise StorageError(
            f"step {trainer.done}: {error.filename or folder} cannot be written "
            f"({error.strerror}); training stopped, {kept}"
        ) from None
    if asked:
        raise KeyboardInterrupt


def _steps(
    trainer: Trainer,
    metrics: "Metrics",
    folder: Path,
    checkpoint: Path,
    asked: Sequence[int],
    on_step: Callable[[int, StepReport], None],
    export: Callable[[Path], None] | None,
) -> None:
    """Steps until the last one, or until a signal is among those that `asked` to stop."""
    training = trainer.recipe.training
    last = time.monotonic()
    saved = last
    while trainer.done < training.steps and not asked:
        report = trainer.step()
        now = time.monotonic()
        trainer.seconds += now - last
        last = now
        metrics.add(report)
        on_step(trainer.done, report)
        if export and training.export_every and trainer.done % training.export_every == 0:
            export(folder / "steps" / f"{trainer.done:06d}")
        if now - saved >= training.checkpoint_seconds or asked:
            trainer.save(checkpoint, metrics.state())
            saved = now
    if not asked:
        trainer.save(checkpoint, metrics.state())


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
    """One line every log_every steps, and one every evaluate_every with bits per byte too.

    A line has means since the last one.
    What the next line is made of is part of a checkpoint's `state`, so that an interrupted run
    writes the lines of one that was not; what was written after the checkpoint is forgotten.
    """

    def __init__(
        self, folder: Path, trainer: Trainer, on_line: Callable[[Line], None], state: dict[str, Any]
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._trainer = trainer
        self._on_line = on_line
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
        trainer = self._trainer
        training = trainer.recipe.training
        lists = {"counts": report.counts.tolist(), "dropped": report.dropped.tolist()}
        self._pending.append(report._asdict() | lists)
        evaluated = trainer.done == training.steps or trainer.done % training.evaluate_every == 0
        if not (evaluated or trainer.done % training.log_every == 0):
            return
        line: Line = {"step": trainer.done, "seconds": round(trainer.seconds, 1)} | self._means()
        self._pending = []
        self._seconds = trainer.seconds
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
        pending = self._pending
        line: Line = {}
        for name in ("loss", "balance", "z", "grad_norm"):
            line[name] = sum(each[name] for each in pending) / len(pending)
        tokens = len(pending) * self._trainer.recipe.training.tokens_per_step
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
        raise ConfigError(
            "training.tensorboard is true, but TensorBoard is missing: pip install "
            "'moebius[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _flat(line: Line) -> dict[str, float]:
    """Scalars by tag, of layers and of kinds of text side by side.

    The loads of single experts stay in metrics.jsonl.
    """
    scalars: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            scalars |= {f"{name}/{kind}": x for kind, x in value.items()}
        elif isinstance(value, list):
            layers = enumerate(value)
            scalars |= {f"{name}/layer_{i}": x for i, x in layers if not isinstance(x, list)}
        else:
            scalars[name] = value
    return scalars
