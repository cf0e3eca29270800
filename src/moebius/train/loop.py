"""The training loop: steps, metrics, checkpoints, exports, to the last step or an interruption."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moebius.errors import (
    ConfigError,
    MemoryPlanError,
    NumericalError,
    PeerError,
    StorageError,
)
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
    run with NumericalError or StorageError and leaves the last checkpoint as it was, as do a device
    with too little memory, with MemoryPlanError, and a rank that is lost, with PeerError. SIGINT or
    SIGTERM at any rank ends it with KeyboardInterrupt after the step and a checkpoint. Rank 0
    writes, and what is given to be called is called there.
    """
    checkpoint = folder / "checkpoint.safetensors"
    ranks = trainer.ranks
    pending = ranks.together(lambda: _resumed(trainer, checkpoint))
    if ranks.count > 1:
        # Gradients are added up; nothing else would tell that they are of different models.
        weights = trainer.masters.digest()[:12]
        run_name = trainer.fingerprint()[:12]
        ranks.require_same({"run": run_name, "step": trainer.done, "weights": weights})
    metrics = Metrics(folder, trainer, on_line, pending)
    try:
        with _stop_signals() as asked:
            stopped = _steps(trainer, metrics, folder, checkpoint, asked, on_step, export)
    except (MemoryPlanError, NumericalError, OSError, StorageError, PeerError) as error:
        kept = "there is no checkpoint yet"
        if checkpoint.exists():
            kept = "the checkpoint before is whole"
        ending = f"training stopped, {kept}"
        if isinstance(error, PeerError):
            told = f"step {trainer.done}: {error}; {ending}"
            raise PeerError(told, ranks=error.ranks) from None
        if not isinstance(error, OSError):
            raise type(error)(f"{error}; {ending}") from None
        raise StorageError(
            f"step {trainer.done}: {error.filename or folder} cannot be written "
            f"({error.strerror}); {ending}"
        ) from None
    if stopped:
        raise KeyboardInterrupt


def _resumed(trainer: Trainer, checkpoint: Path) -> dict[str, Any]:
    """What the next line of metrics is made of, from a checkpoint where there is one."""
    pending: dict[str, Any] = trainer.restore(checkpoint) if checkpoint.exists() else {}
    return pending


def _steps(
    trainer: Trainer,
    metrics: "Metrics",
    folder: Path,
    checkpoint: Path,
    asked: Sequence[int],
    on_step: Callable[[int, StepReport], None],
    export: Callable[[Path], None] | None,
) -> bool:
    """Steps until the last one, or until a signal is among those that `asked` any rank to stop.

    Whether one did.
    """
    training = trainer.recipe.training
    last = time.monotonic()
    saved = last
    while trainer.done < training.steps:
        report = trainer.step()
        now = time.monotonic()
        trainer.seconds += now - last
        last = now
        metrics.add(report)
        if trainer.ranks.rank == 0:
            on_step(trainer.done, report)
        if export and training.export_every and trainer.done % training.export_every == 0:
            export(folder / "steps" / f"{trainer.done:06d}")
        # Clocks and signals differ between ranks, which must do the same.
        due = now - saved >= training.checkpoint_seconds
        stop, save = trainer.ranks.all_reduce_max(float(len(asked)), float(due))
        if save or stop:
            trainer.save(checkpoint, metrics.state())
            saved = now
        if stop:
            return True
    trainer.save(checkpoint, metrics.state())
    return False


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
        trainer.ranks.lead(lambda: self._open(state.get("size", 0)))

    def _open(self, size: int) -> None:
        """What is written after so many bytes takes the place of what is there."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        os.truncate(self._path, min(size, self._path.stat().st_size))
        if self._trainer.recipe.training.tensorboard:
            self._events = _tensorboard(self._path.parent, self._trainer.done + 1)

    def state(self) -> dict[str, Any]:
        """Of a checkpoint, which rank 0 writes."""
        size = 0 if self._trainer.ranks.rank else self._path.stat().st_size
        return {"pending": self._pending, "size": size}

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
        if evaluated:
            line["heldout_bits_per_byte"] = trainer.evaluate(training.evaluate_rows)
            if trainer.recipe.routing.eval_capacity_factor is not None:
                limited = trainer.evaluate(training.evaluate_rows, at_capacity=True)
                line["heldout_bits_per_byte_at_capacity"] = limited
        trainer.ranks.lead(lambda: self._write(line))

    def _write(self, line: Line) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")
        if self._events is not None:
            for tag, value in _flat(line).items():
                self._events.add_scalar(tag, value, self._trainer.done)
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
