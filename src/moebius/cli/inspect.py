"""moebius inspect MODEL --text FILES: what a model's routers do with a corpus."""

from pathlib import Path
from typing import Annotated

import typer

from moebius.cli import options as o
from moebius.config import InspectConfig


@o.takes_config(InspectConfig, *InspectConfig.__dataclass_fields__)
def inspect(
    config: InspectConfig,
    model: o.Model,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...", help="More of --text.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text files, or directories of them.")] = None,
    against: Annotated[
        str | None, typer.Option(help="An earlier checkpoint of the model: how far routing has moved since.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of report.html and report.json.")] = Path("inspection"),
) -> None:
    """Run text through a mixture of experts and report, as HTML and JSON, how its routers spread the work."""
    from rich.console import Console
    from rich.text import Text

    from moebius.inspect.corpus import read_documents
    from moebius.inspect.run import write_report
    from moebius.models.hub import resolve_model

    documents = read_documents([*(text or ()), *(more or ())], config.max_tokens)
    directory, other = resolve_model(model), None if against is None else resolve_model(against)
    names = {"name": model, "against_name": against}
    report = write_report(directory, documents, out, config, against=other, progress=o.progress_bar, **names)
    console, colors = Console(), {"good": "green", "fair": "yellow", "poor": "red", "note": "blue"}
    for finding in report["verdict"]:
        console.print(Text("● ", colors[finding["state"]]).append(finding["text"], "default"))
    console.print(Text(f"{out / 'report.html'} and report.json hold the details"))
