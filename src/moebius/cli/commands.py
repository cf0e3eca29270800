"""The commands of `moebius`. They import what is heavy inside their functions."""

from pathlib import Path
from typing import Annotated

import typer

from moebius.cli import options as o
from moebius.cli.bench import bench
from moebius.cli.cluster import cluster
from moebius.cli.generate import chat, generate
from moebius.cli.serve import plan, serve
from moebius.cli.train import train
from moebius.inspect.config import InspectConfig

app = typer.Typer(
    name="moebius",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (serve, generate, chat, plan, train):
    app.command()(command)
app.add_typer(bench)
app.add_typer(cluster)


@app.command()
@o.options_of("config", InspectConfig)
@o.options_of("which", o.ModelOptions)
def inspect(
    config: InspectConfig,
    which: o.ModelOptions,
    model: o.Model,
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILES", help="More of --text.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text files, or directories of them.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="An earlier checkpoint of the model: how far routing has moved since."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of report.html and report.json.")] = Path(
        "inspection"
    ),
) -> None:
    """Report how a model's routers spread the tokens of a text.

    The text runs through the model; the findings are printed, and written as HTML and JSON.
    """
    from rich.console import Console
    from rich.text import Text

    from moebius.inspect.corpus import read_documents
    from moebius.inspect.run import write_report
    from moebius.models.hub import resolve_model

    documents = read_documents([*(text or ()), *(more or ())], config.max_tokens)
    source = which.find(model)
    other = None
    if against is not None:
        other = resolve_model(against)
    found = write_report(
        source.path,
        documents,
        out,
        config,
        name=model,
        other_tokenizer=source.tokenizer,
        against=other,
        against_name=against,
        progress=o.progress_bar,
    )
    console = Console()
    colors = {"good": "green", "fair": "yellow", "poor": "red", "note": "blue"}
    for finding in found["verdict"]:
        console.print(Text("● ", colors[finding["state"]]).append(finding["text"], "default"))
    console.print(Text(f"{out / 'report.html'} and report.json hold the details"))


@app.command()
def replay(file: Annotated[Path, typer.Argument(help="A file that --trace wrote.")]) -> None:
    """Check that a trace's scheduling decisions come out the same.

    The exit code is 1 where one of them does not.
    """
    from moebius.engine.trace import replay as run

    found = run(file)
    if found.difference is None:
        typer.echo(f"the same: every decision of {found.steps} steps (requests: {found.requests})")
        return
    typer.echo(f"different at {found.difference}")
    raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    from moebius import __version__

    typer.echo(__version__)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def every_command(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Train, inspect and serve Mixture-of-Experts language models."""
