"""The `moebius` command. Each subcommand is a file of its own and imports what is heavy inside its function."""

import sys

import typer

from moebius.cli.bench import bench
from moebius.cli.chat import chat
from moebius.cli.generate import generate
from moebius.cli.inspect import inspect
from moebius.cli.plan import plan
from moebius.cli.replay import replay
from moebius.cli.serve import serve
from moebius.cli.train import train
from moebius.errors import MoebiusError

app = typer.Typer(
    name="moebius",
    help="Train, inspect and serve Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (serve, generate, chat, plan, replay, inspect, train):
    app.command()(command)
app.add_typer(bench)


@app.command()
def version() -> None:
    """Print the version."""
    from moebius import __version__

    typer.echo(__version__)


def main() -> None:
    """Run a command; an error raised on purpose is one line on stderr and exit code 2."""
    try:
        app()
    except MoebiusError as error:
        print(f"moebius: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
