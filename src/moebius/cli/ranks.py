"""Where a front's ranks come together: on this host, on several, or in a Ray cluster."""

from collections.abc import Iterator
from contextlib import contextmanager

from moebius.cli.hosts import Assembly, HostOptions
from moebius.errors import MoebiusError


@contextmanager
def listening(options: HostOptions) -> Iterator[Assembly]:
    """The front's address for other hosts, or its Ray cluster, taken before anything is loaded.
    What the block raises ends the other hosts, too."""
    assembly = _assembly(options)
    error: MoebiusError | None = None
    try:
        yield assembly
    except MoebiusError as raised:
        error = raised
        raise
    finally:
        assembly.close(error)


def _assembly(options: HostOptions) -> Assembly:
    if options.ray:
        from moebius.cli.ray import RayAssembly

        return RayAssembly(options)
    if options.nnodes == 1:
        return Assembly(options, None)
    from moebius.parallel.meet import Listener

    return Assembly(options, Listener.tcp(*options.endpoint(), options.key()))
