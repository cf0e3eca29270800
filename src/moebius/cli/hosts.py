"""moebius serve over several hosts: its options, and how the hosts find each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError, MoebiusError, require_seconds, require_word

if TYPE_CHECKING:
    from moebius.cluster.cluster import Cluster
    from moebius.cluster.hosts import Hosts
    from moebius.models.hub import ModelSource
    from moebius.parallel.key import ClusterKey
    from moebius.parallel.meet import Listener

IsaPolicy = Literal["common", "exact"]


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What says which of several hosts this one is. Names are torchrun's."""

    nnodes: Annotated[int, "Hosts that share the ranks; the same command is run on each."] = 1
    node_rank: Annotated[int, "Which of them this one is; clients connect to 0."] = 0
    rdzv_endpoint: Annotated[
        str | None, "HOST:PORT at which the front listens for the other hosts."
    ] = None
    rdzv_timeout: Annotated[float, "Seconds that hosts wait for each other."] = 60.0
    cluster_interface: Annotated[
        str | None,
        "Network interface that ranks exchange rows over, unencrypted: of a trusted network. "
        "Default: the one that leads to --rdzv-endpoint.",
    ] = None
    cluster_key_file: Annotated[
        Path | None,
        "File with what `moebius cluster key` printed; default: the variable MOEBIUS_CLUSTER_KEY.",
    ] = None
    isa: Annotated[
        IsaPolicy,
        "Where hosts' processors differ. common: all compute with the highest instruction set that "
        "each has; exact: refuse.",
    ] = "common"
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Ranks are actors in the Ray cluster that this host is a node of, or that "
            "RAY_ADDRESS names.",
        ),
    ] = False
    ray_allow_unauthenticated: Annotated[
        bool,
        typer.Option(
            "--ray-allow-unauthenticated",
            help="Take a Ray cluster that lets in anybody who reaches it.",
        ),
    ] = False

    def __post_init__(self) -> None:
        require_word("isa", self.isa, IsaPolicy)
        require_seconds("rdzv_timeout", self.rdzv_timeout)
        if self.nnodes < 1:
            raise ConfigError(f"--nnodes is {self.nnodes}; it must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"--node-rank is {self.node_rank}; with --nnodes {self.nnodes} it must be below "
                f"{self.nnodes}, and not below 0"
            )
        if self.nnodes == 1 and self.rdzv_endpoint is not None:
            raise ConfigError(
                "--rdzv-endpoint is for several hosts: give --nnodes too, or leave it out"
            )
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ConfigError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT, an address of node 0"
            )
        if self.ray and (self.nnodes > 1 or self.cluster_key_file is not None):
            raise ConfigError(
                "with --ray, Ray says which hosts there are, and a key is drawn at each start: "
                "leave out --nnodes, --node-rank and --cluster-key-file"
            )
        if self.ray_allow_unauthenticated and not self.ray:
            raise ConfigError("--ray-allow-unauthenticated is of no use without --ray")

    def check(self, config: EngineConfig) -> None:
        """ConfigError where there are more hosts than ranks."""
        if self.nnodes > config.ranks and self.nnodes > 1:
            raise ConfigError(
                f"--nnodes {self.nnodes} is more than --ranks {config.ranks}: each host needs one"
            )

    def endpoint(self) -> tuple[str, int]:
        from moebius.parallel.endpoint import parse_endpoint

        assert self.rdzv_endpoint is not None, "only with several hosts"
        return parse_endpoint(self.rdzv_endpoint, "--rdzv-endpoint")

    def key(self) -> "ClusterKey":
        """The cluster's key. ConfigError where none is given."""
        from moebius.parallel.key import VARIABLE, ClusterKey

        if self.cluster_key_file is not None:
            return ClusterKey.from_file(self.cluster_key_file)
        key = ClusterKey.from_environment()
        if key is None:
            raise ConfigError(
                f"several hosts need a key in --cluster-key-file or {VARIABLE}, the same on all; "
                "`moebius cluster key` makes one"
            )
        return key

    def address(self) -> str:
        """This host's, in the network that rows travel over. Raises ConfigError."""
        from moebius.parallel.endpoint import address_towards, interface_address

        if self.cluster_interface is not None:
            return interface_address(self.cluster_interface)
        return address_towards(*self.endpoint())


def serve_ranks(options: HostOptions, model: "ModelSource", config: EngineConfig) -> None:
    """Serve this host's ranks, until the front needs them no more."""
    from moebius.engine.hello import host_hello
    from moebius.engine.load import check_ranks
    from moebius.engine.node import Node, ended_by_signals

    # The front, too, refuses what no group can be, and is gone before it could say so here.
    check_ranks(model.path, config)
    key = options.key()
    hello = host_hello(
        model.path,
        config,
        node=options.node_rank,
        nodes=options.nnodes,
        address=options.address(),
        tokenizer=model.tokenizer,
    )
    with ended_by_signals():
        Node(hello, options.endpoint(), key, options.rdzv_timeout).run()


class Assembly:
    """The front's hosts, which come together at `listener`; None: there is one host."""

    def __init__(self, options: HostOptions, listener: "Listener | None") -> None:
        self._options = options
        self._listener = listener
        self._cluster: Cluster | None = None

    def ranks_here(self, config: EngineConfig) -> int:
        """How many ranks the front's host has."""
        from moebius.cluster.cluster import local_ranks

        return local_ranks(config.ranks, self._options.nnodes, 0)

    @property
    def key(self) -> "ClusterKey | None":
        """The cluster's; None for one host."""
        return None if self._listener is None else self._listener.key

    def hosts(self, model: "ModelSource", config: EngineConfig) -> "Hosts | None":
        """Wait for all; None for one host. ConfigError where another does not come, or serves
        something else."""
        if self._listener is None:
            return None
        from moebius.cluster.cluster import Cluster
        from moebius.cluster.hosts import ManyHosts
        from moebius.engine.hello import host_hello

        options = self._options
        address = options.address()
        own = host_hello(
            model.path,
            config,
            node=0,
            nodes=options.nnodes,
            address=address,
            tokenizer=model.tokenizer,
        )
        self._cluster = Cluster(self._listener, own, options.rdzv_timeout)
        found = self._cluster.assemble()
        hosts = ManyHosts(self._cluster, found, exact_isa=options.isa == "exact")
        typer.echo(hosts.text, err=True)
        return hosts

    def close(self, error: MoebiusError | None) -> None:
        if self._cluster is not None:
            self._cluster.close(error)
        elif self._listener is not None:
            self._listener.close()
