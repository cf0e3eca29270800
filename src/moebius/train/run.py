"""From a recipe to a model directory: prepare the data, train (or continue), measure, export, write the card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer

from moebius.errors import ConfigError
from moebius.models.weights import load_decoder
from moebius.train.corpus import read_corpus
from moebius.train.data import prepare, streams
from moebius.train.export import export, measure, model_card, parameter_counts
from moebius.train.ops import TrainingOps
from moebius.train.recipe import Recipe, read_recipe
from moebius.train.trainer import StepReport, Trainer, run


def main_from_recipe(
    recipe_path: Path, out: Path, *, evaluate_only: bool = False, root: Path | None = None
) -> dict[str, Any]:
    """Train `recipe_path`'s model into `out`, or measure the one that is there; the figures by kind of held-out text.

    What is needed to continue after an interruption is kept in out/training; running again continues there.
    `root` is the standard library to read, this Python's by default.
    """
    recipe = read_recipe(recipe_path)
    figures = _evaluate(recipe, out, root) if evaluate_only else _train(recipe, recipe_path, out, root)
    _print_figures(figures)
    return figures


def _train(recipe: Recipe, recipe_path: Path, out: Path, root: Path | None) -> dict[str, Any]:
    folder = out / "training"
    data = prepare(recipe, folder / "data", root)
    trainer = Trainer(recipe, data)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(recipe.name, total=recipe.training.steps)

        def show(done: int, report: StepReport) -> None:
            progress.update(bar, completed=done, description=f"loss {report.loss:.3f}")

        run(trainer, folder, show)
    export(trainer.decoder, recipe, data.tokenizer, out)
    figures = measure(trainer.decoder, recipe, data.heldout, data.tokenizer)
    counts = parameter_counts(trainer.decoder, recipe.model.num_experts, recipe.model.experts_per_token)
    shown = os.path.relpath(recipe_path) if recipe_path.is_relative_to(Path.cwd()) else recipe_path.as_posix()
    card = model_card(recipe, shown, data.facts, figures, counts, trainer.seconds)
    (out / "README.md").write_text(card, encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def _evaluate(recipe: Recipe, out: Path, root: Path | None) -> dict[str, Any]:
    if not (out / "model.safetensors").exists():
        raise ConfigError(f"{out} holds no model to evaluate; train one first, without --evaluate-only")
    decoder = load_decoder(out, torch.bfloat16, ops=TrainingOps())
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    heldout = streams(read_corpus(recipe.corpus.heldout_share, root).heldout, tokenizer)
    return measure(decoder, recipe, heldout, tokenizer)


def _print_figures(figures: dict[str, Any]) -> None:
    table = Table("held-out text", "bytes", "bits per byte", "gzip -9", "xz -9", box=None, pad_edge=False)
    for kind, f in figures.items():
        ratios = (f["bits_per_byte"], f["gzip_bits_per_byte"], f["xz_bits_per_byte"])
        table.add_row(kind, f"{f['bytes']:,}", *(f"{ratio:.4f}" for ratio in ratios))
    Console().print(table)
