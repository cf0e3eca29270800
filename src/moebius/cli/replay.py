"""moebius replay FILE: make the scheduling decisions of a trace again."""

from pathlib import Path
from typing import Annotated

import typer


def replay(file: Annotated[Path, typer.Argument(help="A file that --trace wrote.")]) -> None:
    """Re-run a trace's scheduling decisions and say whether they are the same (exit code 1 if not)."""
    from moebius.engine.trace import replay as run

    report = run(file)
    if report.difference is None:
        typer.echo(f"the same: {report.steps} steps of {report.requests} requests, every decision")
        return
    typer.echo(f"different at {report.difference}")
    raise typer.Exit(1)
