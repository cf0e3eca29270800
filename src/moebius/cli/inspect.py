"""moebius inspect MODEL --text FILES: what a model's routers do with a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius.cli import options as o


def inspect(
    model: o.Model,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...", help="More of --text.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files, or directories of them, to run through the model.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="An earlier checkpoint of the model: how far routing has moved since.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of report.html and report.json.")] = Path("inspection"),
    max_tokens: Annotated[int, typer.Option(help="Run at most so many tokens, chosen evenly from the text.")] = 200_000,
    row_length: Annotated[int, typer.Option(help="Tokens that see each other: the context's length.")] = 512,
    step_tokens: Annotated[int, typer.Option(help="Tokens in one step, over which a step's balance is taken.")] = 2048,
    capacity_factor: Annotated[
        list[float] | None, typer.Option(help="Capacity factors whose dropped share to work out; default: 1 to 2.")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(help="Numbers of ranks to place the experts on; default: 2, 4, ...")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads; default: one a core.")] = None,
) -> None:
    """Run text through a mixture of experts and report, as HTML and JSON, how its routers spread the work."""
    from rich.console import Console
    from rich.markup import escape

    from moebius.inspect.corpus import read_documents
    from moebius.inspect.run import CAPACITY_FACTORS, InspectConfig, write_report
    from moebius.models.hub import resolve_model

    config = InspectConfig(
        max_tokens, row_length, step_tokens, capacity_factor or CAPACITY_FACTORS, ranks or (), threads
    )
    documents = read_documents([*(text or ()), *(more or ())], max_tokens)
    directory, other = resolve_model(model), None if against is None else resolve_model(against)
    report = write_report(directory, documents, out, config, name=model, against=other, progress=o.progress_bar)
    console, colors = Console(), {"good": "green", "fair": "yellow", "poor": "red", "note": "blue"}
    for finding in report["verdict"]:
        console.print(f"[{colors[finding['state']]}]●[/] {escape(finding['text'])}", highlight=False)
    console.print(f"{out / 'report.html'} and report.json hold the details", highlight=False)
