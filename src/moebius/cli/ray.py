"""moebius serve --ray: the front's side of ranks that Ray places."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from moebius import logs
from moebius.cli.hosts import Assembly, HostOptions
from moebius.engine.config import EngineConfig
from moebius.errors import MoebiusError

if TYPE_CHECKING:
    from moebius.cluster.hosts import Hosts
    from moebius.cluster.ray_actor import Invitation
    from moebius.cluster.ray_hosts import ActorCluster
    from moebius.engine.cluster import HostHello
    from moebius.models.hub import ModelSource
    from moebius.parallel.key import ClusterKey


class RayAssembly(Assembly):
    """Actors of ranks in a Ray cluster, which is connected to from when this is made.

    Raises ConfigError where there is no cluster, or none to be trusted.
    """

    def __init__(self, options: HostOptions) -> None:
        from moebius.cluster.ray_cluster import RayCluster

        super().__init__(options, None)
        self._ray = RayCluster(allow_unauthenticated=options.ray_allow_unauthenticated)

    def ranks_here(self, config: EngineConfig) -> int:
        """None is this process's own, wherever Ray places them."""
        return 0

    def hosts(self, model: "ModelSource", config: EngineConfig) -> "Hosts":
        """Place the ranks and wait for their actors. ConfigError where there is no room for them,
        and where one does not come, or has not what is to be served."""
        from moebius.cluster.ray_cluster import threads_each
        from moebius.cluster.ray_hosts import ActorHosts
        from moebius.engine.hello import host_hello
        from moebius.parallel.key import ClusterKey

        options = self._options
        threads = config.threads or threads_each(self._ray.cpus(), config.ranks)
        config = replace(config, threads=threads)
        own = host_hello(
            model.path,
            config,
            node=0,
            nodes=config.ranks + 1,
            address=self._address(),
            called=self._ray.own_name,
        )
        gpus = int(config.device == "cuda")
        self._ray.place(config.ranks, threads, gpus, options.rdzv_timeout)
        key = ClusterKey.draw()
        cluster = self._listen(own, key)
        self._cluster = cluster
        self._invite(cluster, own, model, key)
        found = cluster.assemble()
        hosts = ActorHosts(cluster, found, exact_isa=options.isa == "exact")
        typer.echo(hosts.text, err=True)
        return hosts

    def close(self, error: MoebiusError | None) -> None:
        if self._cluster is not None:
            self._cluster.close(error)
        self._ray.close()

    def _address(self) -> str:
        if self._options.cluster_interface is not None:
            return self._options.address()
        return self._ray.own_address

    def _listen(self, own: "HostHello", key: "ClusterKey") -> "ActorCluster":
        from moebius.cluster.ray_hosts import ActorCluster
        from moebius.parallel.meet import Listener

        options = self._options
        at = (own.address, 0) if options.rdzv_endpoint is None else options.endpoint()
        listener: Listener = Listener.tcp(*at, key)
        return ActorCluster(listener, own, options.rdzv_timeout, self._ray.why_absent)

    def _invite(
        self, cluster: "ActorCluster", own: "HostHello", model: "ModelSource", key: "ClusterKey"
    ) -> None:
        ranks = range(own.config.ranks)
        invitations = [
            invitation(rank, cluster.address, own, model, self._options).encode() for rank in ranks
        ]
        self._ray.start(invitations, key.text, cluster.refuse)


def invitation(
    rank: int,
    front: tuple[str, int],
    own: "HostHello",
    model: "ModelSource",
    options: HostOptions,
) -> "Invitation":
    """Of a rank's actor. front: where the front listens; own: what it says of itself."""
    from moebius.cluster.ray_actor import Invitation
    from moebius.cluster.ray_hosts import node_of

    other = model.tokenizer_name
    return Invitation(
        front=front,
        node=node_of(rank),
        nodes=own.nodes,
        model=lasting_name(model.name),
        file=model.file,
        tokenizer=None if other is None else lasting_name(other),
        config=own.config,
        interface=options.cluster_interface,
        patience=options.rdzv_timeout,
        log_level=logs.level(),
    )


def lasting_name(model: str) -> str:
    """A model's name that means the same in processes that start elsewhere: that of a directory or
    a file is made absolute."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model
