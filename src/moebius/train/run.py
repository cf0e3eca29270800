"""From a recipe to a model directory: prepare the data, train (or continue), measure, export, write the card."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moebius.config import read_json, require
from moebius.errors import StorageError
from moebius.models.weights import load_decoder
from moebius.train.data import PreparedData, prepare
from moebius.train.evaluate import routers
from moebius.train.export import export, figures_table, measure, model_card
from moebius.train.loop import Line, run
from moebius.train.ops import TrainingOps
from moebius.train.ranks import Ranks
from moebius.train.recipe import Recipe, read_recipe
from moebius.train.trainer import StepReport, Trainer


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to a recipe (moebius.cli.train); root is the standard library to read."""

    resume: bool = False
    evaluate_only: bool = False
    dense_twin: bool = False
    against: Path | None = None
    device: str = "auto"
    root: Path | None = None


def main_from_recipe(recipe_path: Path, out: Path, options: Options | None = None) -> dict[str, Any]:
    """Train `recipe_path`'s model into `out`, or measure the one that is there; the figures by kind of held-out text.

    What is needed to continue after an interruption is kept in out/training. Raises: UsageError, NumericalError or
    StorageError, each of which leaves the last checkpoint whole.
    """
    options = options or Options()
    recipe = read_recipe(recipe_path)
    recipe = recipe.dense_twin() if options.dense_twin else recipe
    try:
        if options.evaluate_only:
            figures = _evaluate(recipe, out, options.root)
        else:
            figures = _train(recipe, recipe_path, out, options)
    except OSError as error:
        raise StorageError(f"{error.filename or out} cannot be written or read: {error.strerror or error}") from None
    if figures:
        print(figures_table(figures))
    return figures


def _device(wish: str) -> torch.device:
    has = torch.cuda.is_available()
    require(wish != "cuda" or has, "--device cuda: torch finds no CUDA device; use --device cpu")
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has and wish != "cpu" else torch.device("cpu")
    )


def _train(recipe: Recipe, recipe_path: Path, out: Path, options: Options) -> dict[str, Any]:
    folder, device = out / "training", _device(options.device)
    checkpoint = folder / "checkpoint.safetensors"
    require(
        options.resume or not checkpoint.exists(),
        f"{out} holds a training run already; continue it with --resume, or choose another --out",
    )
    twin = None if options.against is None else read_json(options.against / "training" / "figures.json")
    ranks = Ranks.join(device)
    try:
        if ranks.rank == 0:
            prepare(recipe, folder / "data", options.root)
        ranks.wait()
        trainer = Trainer(recipe, prepare(recipe, folder / "data", options.root), device=device, ranks=ranks)
        speed = _run_with_progress(trainer, folder)
        if ranks.rank:
            return {}
        export(trainer, out)
        figures = measure(trainer.decoder, recipe, trainer.data)
        summary = {"figures": figures, "tokens_per_second": speed, "seconds": trainer.seconds}
        (folder / "figures.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        shown = os.path.relpath(recipe_path) if recipe_path.is_relative_to(Path.cwd()) else recipe_path.name
        card = model_card(trainer, shown, summary, twin)
        (out / "README.md").write_text(card, encoding="utf-8")
        return figures
    finally:
        ranks.leave()


def _run_with_progress(trainer: Trainer, folder: Path) -> int:
    """Train while showing loss, speed, remaining time and router health on stderr; tokens per second of the run."""
    console, steps = Console(stderr=True), trainer.recipe.training.steps
    quiet = not console.is_terminal or trainer.ranks.rank > 0
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("remaining"))
    tokens = trainer.recipe.training.tokens_per_step
    with Progress(*columns, *times, TextColumn("{task.fields[health]}"), console=console, disable=quiet) as progress:
        bar = progress.add_task(trainer.recipe.name, total=steps, health="")

        def show(done: int, report: StepReport) -> None:
            if done == 1 or progress.tasks[0].completed == 0:
                progress.reset(bar, total=steps, completed=done)
            progress.update(bar, completed=done, description=f"loss {report.loss:.3f}")

        def tell(line: Line) -> None:
            progress.update(bar, health=_health(line))
            if quiet:
                console.print(
                    f"step {line['step']} of {steps}: loss {line['loss']:.4f}, {_health(line)}", soft_wrap=True
                )

        run(trainer, folder, show, tell, None if trainer.ranks.rank else lambda path: export(trainer, path))
    return round(trainer.done * tokens / max(trainer.seconds, 1e-9))


def _health(line: Line) -> str:
    """Speed and, over the layers with a router, the worst of each measure."""
    told = f"{line['tokens_per_second']:,} tokens/s"
    if "max_violation" in line:
        told += f", MaxVio {max(line['max_violation']):.2f}, load entropy {min(line['load_entropy']):.3f}"
        told += f", dead experts {sum(line['dead_experts'])}, dropped {max(line['dropped']):.1%}"
    if "heldout_bits_per_byte" in line:
        told += f", held-out {line['heldout_bits_per_byte']['all']:.4f} bits a byte"
    return told


def _evaluate(recipe: Recipe, out: Path, root: Path | None) -> dict[str, Any]:
    require(
        (out / "model.safetensors").exists(),
        f"{out} holds no model to evaluate; train one first, without --evaluate-only",
    )
    dtype = torch.bfloat16 if recipe.training.dtype == "bfloat16" else torch.float32
    decoder = load_decoder(out, dtype, ops=TrainingOps(drops=not recipe.routing.dropless))
    for router in routers(decoder):
        router.limits = recipe.routing
    with tempfile.TemporaryDirectory() as folder:
        data: PreparedData = prepare(recipe, Path(folder), root, tokenizer=out)
        return measure(decoder, recipe, data)
