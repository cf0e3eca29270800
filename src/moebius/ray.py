"""A Ray Serve application: autoscaled replicas of the whole server.

    serve run moebius.ray:app model=bundled max_num_seqs=32 max_replicas=4

A replica is the server's application over engines of its own, in processes of their own, on one
node. Arguments are the options of `moebius serve`, checked by the same code, and those of
ReplicaOptions. Serve places replicas, sends them requests, and says when one has to end.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius import machine
from moebius.cli import options as o
from moebius.cli.ray import lasting_name
from moebius.cli.serve import ServeOptions, load_app
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError, EngineError, MoebiusError, in_one_line

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.applications import Starlette

_DRAIN_MARGIN = 10.0
_CHECK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """What the application takes beside the options of `moebius serve`."""

    min_replicas: Annotated[int, "Replicas that there are at least."] = 1
    max_replicas: Annotated[int, "Replicas that there are at most."] = 4
    target_ongoing_requests: Annotated[
        float | None,
        "Requests of a replica that Serve aims at; default: three quarters of what runs at once.",
    ] = None
    isa: Annotated[
        str,
        "Kernels of all replicas, where nodes differ: portable, avx2, avx512, avx512vnni, "
        "avx512bf16 or amx.",
    ] = ""
    ray_allow_unauthenticated: Annotated[
        bool, "Take a Ray cluster that lets in anybody who reaches it."
    ] = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ConfigError(
                f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; the "
                "second must be at least 1, and the first not more, and not below 0"
            )
        target = self.target_ongoing_requests
        if target is not None and not target > 0:
            raise ConfigError(f"target_ongoing_requests is {target}; it must be above 0")


# Serve has the door: what opens it and holds its connections is said to Serve.
_DOOR = ("host", "port", "tls_cert", "tls_key")
_SERVE = tuple(name for name in ServeOptions.__dataclass_fields__ if name not in _DOOR)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What an application was asked to be."""

    model: str
    which: o.ModelOptions
    config: EngineConfig
    options: ServeOptions
    replicas: ReplicaOptions

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Arguments":
        """From Serve's arguments, by name, as texts or as what they are. ConfigError."""
        found: list[Arguments] = []

        @o.options_of("config", EngineConfig)
        @o.options_of("options", ServeOptions, *_SERVE)
        @o.options_of("replicas", ReplicaOptions)
        @o.options_of("which", o.ModelOptions)
        def take(
            config: EngineConfig,
            options: ServeOptions,
            replicas: ReplicaOptions,
            which: o.ModelOptions,
            model: Annotated[str, typer.Option()] = "bundled",
        ) -> None:
            found.append(cls(model, which, config, options, replicas))

        o.run_with(take, given, "moebius.ray:app")
        (arguments,) = found
        arguments.options.settings(arguments.model)
        return arguments

    @property
    def target(self) -> float:
        """Requests of a replica that Serve aims at: it starts another one before they wait."""
        running = self.config.max_num_seqs * self.config.ranks
        return self.replicas.target_ongoing_requests or max(1.0, 0.75 * running)

    @property
    def most_ongoing(self) -> int:
        """Requests that Serve gives to a replica: as many wait as run, so that none of its steps
        is emptier than need be; the rest waits where another replica can have it."""
        return 2 * self.config.max_num_seqs * self.config.ranks


def app(args: dict[str, Any]) -> "Application":
    """What `serve run moebius.ray:app` builds. Raises ConfigError."""
    from ray import serve

    arguments = Arguments.read(args)
    ranks = arguments.config.ranks
    with _connection() as connected:
        if connected:
            _check_cluster(arguments)
        cpus = _cpus_of_a_node() if connected else machine.threads()
    settings = arguments.options.settings(arguments.model)
    threads = arguments.config.threads or max(1, cpus // ranks)
    deployment = serve.deployment(
        serve.ingress(_application_here)(Replica),
        name="moebius",
        ray_actor_options={"num_cpus": threads * ranks},
        max_ongoing_requests=arguments.most_ongoing,
        autoscaling_config={
            "min_replicas": arguments.replicas.min_replicas,
            "max_replicas": arguments.replicas.max_replicas,
            "target_ongoing_requests": arguments.target,
        },
        health_check_period_s=_CHECK_SECONDS,
        health_check_timeout_s=_CHECK_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_timeout + _DRAIN_MARGIN,
    )
    named: dict[str, Any] = {"model": lasting_name(arguments.model), "threads": threads}
    if arguments.which.tokenizer is not None:
        named["tokenizer"] = lasting_name(arguments.which.tokenizer)
    return deployment.bind({**args, **named})


@contextmanager
def _connection() -> Iterator[bool]:
    """One to the cluster that RAY_ADDRESS names, or that this host is a node of, where this process
    has none yet: `serve run` makes its own when it knows the application, and a cluster where there
    is none. Whether there is one."""
    import ray

    if ray.is_initialized():
        yield True
        return
    try:
        ray.init(address="auto", configure_logging=False, log_to_driver=False)
    except ConnectionError:
        yield False
        return
    try:
        yield True
    finally:
        ray.shutdown()


def _check_cluster(arguments: Arguments) -> None:
    """ConfigError where the cluster lets in anybody, and that is not allowed."""
    import ray

    from moebius.cluster.ray_authentication import check_authenticated

    address = ray.get_runtime_context().gcs_address
    check_authenticated(address, arguments.replicas.ray_allow_unauthenticated)


def _cpus_of_a_node() -> int:
    """Of the smallest one that has any, so that a replica can be on each of them."""
    import ray

    found = (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    return min((cpus for cpus in found if cpus > 0), default=1)


class Replica:
    """The server's application and its engines, in one of Serve's processes.

    It reads the arguments again, so that a key in its node's MOEBIUS_API_KEY need not travel.
    """

    application: "Starlette | None" = None
    """That of this process."""

    def __init__(self, args: dict[str, Any]) -> None:
        from moebius import logs
        from moebius.cluster.engines import EngineProcesses

        arguments = Arguments.read(args)
        _check_cluster(arguments)  # which may be another than the one that it was built with
        logs.to_stderr(arguments.options.log_level)
        # A server would end with them; here Serve is told, when it asks how this is.
        self._processes = EngineProcesses(arguments.config.ranks, on_give_up=lambda: None)
        try:
            self._app = load_app(
                self._processes,
                arguments.which.find(arguments.model),
                arguments.config,
                arguments.options,
                isa=arguments.replicas.isa,
            )
        except BaseException:
            self._processes.close()
            raise
        Replica.application = self._app

    async def check_health(self) -> None:
        """What Serve calls: EngineError where tokens cannot flow. It starts another replica in the
        place of one that says so three times in a row."""
        try:
            self._processes.check()
        except MoebiusError as error:
            raise EngineError(in_one_line(error)) from error
        if not self._app.state.front_door.ready:
            raise EngineError("the engine is not ready")

    def __del__(self) -> None:
        """What Serve calls last of all, when requests under way are finished, or their time is."""
        processes = getattr(self, "_processes", None)
        if processes is not None:
            processes.close()


def _application_here() -> "Starlette":
    """What Serve asks for once the replica of this process is made."""
    assert Replica.application is not None
    return Replica.application
