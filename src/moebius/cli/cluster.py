"""moebius cluster: what processes on several hosts share."""

import typer

cluster = typer.Typer(
    name="cluster", help="Make what the hosts of a cluster share.", no_args_is_help=True
)


@cluster.callback()
def every_command() -> None:
    """Make what the hosts of a cluster share."""


@cluster.command()
def key() -> None:
    """Draw a cluster's key and print it.

    Each process shows that it holds the key before another reads a frame of it. Put it into a file
    that only you can read, or into MOEBIUS_CLUSTER_KEY, on every host.
    """
    from moebius.parallel.key import ClusterKey

    typer.echo(ClusterKey.draw().text)
