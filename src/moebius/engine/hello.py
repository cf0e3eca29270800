"""What a host says of itself before it serves ranks."""

import socket
from pathlib import Path

from moebius import __version__, machine
from moebius.engine.cluster import HostHello
from moebius.engine.config import EngineConfig
from moebius.engine.load import weights_name
from moebius.ops.select import kernel_levels
from moebius.text import load_text


def host_hello(
    directory: Path,
    config: EngineConfig,
    *,
    node: int,
    nodes: int,
    address: str,
    called: str = "",
    tokenizer: Path | None = None,
) -> HostHello:
    """This host, with the model in `directory`; the rest as HostHello has it. Raises UsageError for
    what is no model, or no tokenizer."""
    return HostHello(
        release=__version__,
        node=node,
        nodes=nodes,
        name=socket.gethostname(),
        address=address,
        directory=str(directory.absolute()),
        weights=weights_name(directory),
        config=config,
        isas=kernel_levels(),
        called=called,
        machine=machine.identity(),
        tokenizer="" if tokenizer is None else str(tokenizer.absolute()),
        vocabulary=load_text(directory, tokenizer).tokenizer.fingerprint(),
    )
