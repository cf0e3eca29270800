"""moebius train RECIPE: make a model, or measure one that is there."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML, such as recipes/bundled.toml.")],
    out: Annotated[Path, typer.Option(help="Directory of the model; an interrupted run continues from it.")],
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Measure the model in --out on held-out text; train nothing.")
    ] = False,
) -> None:
    """Train a recipe's model into a directory in the Hugging Face layout, or continue where a run was interrupted."""
    import torch

    # Before the first parallel operation: threads inherit the setting when they start. Subnormals in Adam's moments
    # of rare tokens would slow every step several times over.
    torch.set_flush_denormal(True)

    from moebius.train.run import main_from_recipe

    main_from_recipe(recipe, out, evaluate_only=evaluate_only)
