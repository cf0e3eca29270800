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

    Hosts prove to each other that they hold it before anything else is read. Give every host the
    same one, in a file that only you can read (serve --cluster-key-file) or in MOEBIUS_CLUSTER_KEY:

    (umask 077; moebius cluster key > key)
    """
    from moebius.parallel.key import ClusterKey

    typer.echo(ClusterKey.draw().text)
