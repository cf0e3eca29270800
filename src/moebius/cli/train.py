"""moebius train RECIPE: make a model, or measure one that is there."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML, such as recipes/bundled.toml.")],
    out: Annotated[
        Path, typer.Option(help="Directory of the model and, in its `training`, of the run.")
    ],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")
    ] = False,
    dense_twin: Annotated[
        bool,
        typer.Option(
            "--dense-twin", help="Train the dense model of equal active parameters instead."
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            help="The dense twin's --out, whose figures the model card gives beside its own."
        ),
    ] = None,
    evaluate_only: Annotated[
        bool,
        typer.Option(
            "--evaluate-only", help="Measure the model in --out on held-out text; train nothing."
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto (cuda when torch has it), cpu or cuda.")
    ] = "auto",
    rank_timeout: Annotated[
        float, typer.Option(help="Seconds that ranks wait for each other; then all end.")
    ] = 300.0,
) -> None:
    """Train a recipe's model, or go on with one.

    --out becomes a directory in the Hugging Face layout, which `moebius serve` serves.

    With several processes: torchrun --nproc-per-node 4 -m moebius train RECIPE --out DIR.
    """
    import torch

    # Before the first parallel operation: threads inherit the setting when they start. Subnormals
    # in Adam's moments of rare tokens would slow every step several times over.
    torch.set_flush_denormal(True)

    from moebius.ops.threads import default_threads
    from moebius.train.run import main_from_recipe

    torch.set_num_threads(default_threads())
    main_from_recipe(
        recipe,
        out,
        resume=resume,
        evaluate_only=evaluate_only,
        dense_twin=dense_twin,
        against=against,
        device=device,
        rank_timeout=rank_timeout,
    )
