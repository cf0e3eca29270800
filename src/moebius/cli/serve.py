"""moebius serve MODEL: the OpenAI-compatible server; moebius plan MODEL: what a model takes."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path, PurePath
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius import logs, machine
from moebius.cli import options as o
from moebius.cli.config_file import bounds, set_defaults
from moebius.cli.hosts import Assembly, HostOptions, serve_ranks
from moebius.cli.ranks import listening
from moebius.engine.config import EngineConfig
from moebius.engine.garbage import settle
from moebius.errors import ConfigError
from moebius.files import json_text
from moebius.gguf import SplitName
from moebius.server.settings import ServerSettings, UnknownFields, host_and_port

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from moebius.bench.predict import Outlook
    from moebius.cluster.engines import EngineProcesses
    from moebius.cluster.hosts import Hosts
    from moebius.engine.prepared import Prepared
    from moebius.engine.wire import Planned
    from moebius.models.hub import ModelSource
    from moebius.server.tls import Certificate
    from moebius.text import GenerationDefaults


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `moebius serve` takes beside the engine's options."""

    host: Annotated[str, "Address to bind; any but a loopback one needs API keys."] = "127.0.0.1"
    port: Annotated[int, "Port to bind; 0 takes a free one."] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MOEBIUS_API_KEY", help="A key that clients must send; may be repeated."
        ),
    ] = None
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keys with names, limits and weights; read again at SIGHUP."
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None, "Name(s) of the model in the API; default: MODEL, a file's without .gguf."
    ] = None
    generation_config: Annotated[
        str, "auto: sampling defaults from generation_config.json; none: OpenAI's."
    ] = "auto"
    tool_format: Annotated[
        str,
        "How the model writes tool calls: auto (by its chat template and vocabulary), none, or the "
        "name of a format.",
    ] = "auto"
    unknown_fields: Annotated[
        UnknownFields,
        "refuse: a request with a field that nobody knows fails; warn: it is ignored and logged.",
    ] = "refuse"
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM with the certificate's chain: serve over TLS."),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM with its key; default: in the same file."),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        "Web pages from this origin may call the server; may be repeated; *: from any.",
    ] = None
    log_level: Annotated[str, "debug, info, warning or error."] = "info"
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=set_defaults,
            help="TOML with these options, for what the command line does not give; and bounds.",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.generation_config not in ("auto", "none"):
            raise ConfigError(
                f"--generation-config is {self.generation_config!r}; use auto or none"
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("--tls-key needs --tls-cert, the certificate that it is the key of")
        if self.log_level not in logs.LEVELS:
            raise ConfigError(
                f"--log-level is {self.log_level!r}; use one of {', '.join(logs.LEVELS)}"
            )

    def settings(self, model: str) -> ServerSettings:
        """What the server takes of them. Raises ConfigError."""
        return ServerSettings(
            served_model_names=tuple(self.served_model_name or _names(model)),
            api_keys=tuple(self.api_key or ()),
            api_keys_file=self.api_keys,
            unknown_fields=self.unknown_fields,
            cors_origins=tuple(self.cors_origin or ()),
            **bounds(self.config_file),
        )

    def certificate(self) -> "Certificate | None":
        """What TLS is spoken with, if it is. Raises ConfigError."""
        from moebius.server.tls import Certificate

        return None if self.tls_cert is None else Certificate(self.tls_cert, self.tls_key)


def _check_keys(settings: ServerSettings) -> None:
    """ConfigError where the key file is wrong, before the weights are read."""
    from moebius.server.keys import KeyRing

    KeyRing.of(settings)


def _names(model: str) -> list[str]:
    """What a model is called where nobody says it: as it was named, and a file without the rest."""
    path = PurePath(model)
    if path.suffix != ".gguf":
        return [model]
    part = SplitName.of(path.name)
    return [path.stem if part is None else part.stem, model]


# The options that the memory plan depends on come first.
_OTHERS = (field.name for field in fields(EngineConfig) if field.name not in o.SIZES)


@o.options_of("nodes", HostOptions)
@o.options_of("config", EngineConfig, *o.SIZES, *_OTHERS)
@o.options_of("options", ServeOptions)
@o.options_of("which", o.ModelOptions)
def serve(
    config: EngineConfig,
    options: ServeOptions,
    nodes: HostOptions,
    which: o.ModelOptions,
    model: o.Model = "bundled",
) -> None:
    """Serve a model over OpenAI's API."""
    settings = options.settings(model)
    _check_keys(settings)
    options.certificate()
    nodes.check(config)
    logs.to_stderr(options.log_level)
    if nodes.node_rank > 0:
        serve_ranks(nodes, which.find(model), config)
        return
    from moebius.server.listen import reserve

    with (
        reserve(options.host, options.port, open_to_all=not settings.needs_key) as sockets,
        listening(nodes) as assembly,
    ):
        _serve_on(sockets, which.find(model), config, settings, options, assembly)


def _serve_on(
    sockets: list[socket],
    model: "ModelSource",
    config: EngineConfig,
    settings: ServerSettings,
    options: ServeOptions,
    assembly: Assembly,
) -> None:
    """Refuse what can be refused, have an engine's process read the weights, and serve.

    Whatever is wrong is said before the weights are read; the port opens when tokens can flow.
    """
    from moebius.cluster.engines import EngineProcesses

    if config.ranks > machine.threads():
        # So many processes would take long to start, and to be refused by.
        from moebius.engine.load import check_ranks

        check_ranks(model.path, config)
    with EngineProcesses(assembly.ranks_here(config), key=assembly.key) as processes:
        from moebius.server.run import run_server

        found = partial(assembly.hosts, model, config)
        app = load_app(processes, model, config, options, found)
        address = host_and_port(options.host, sockets[0].getsockname()[1])
        certificate = options.certificate()
        scheme = "http" if certificate is None else "https"
        line = f"serving on {scheme}://{address}/v1 as {settings.served_model_names[0]}"
        settle()
        run_server(app, sockets, lambda: typer.echo(line, err=True), certificate)
        processes.check()


def load_app(
    processes: "EngineProcesses",
    model: "ModelSource",
    config: EngineConfig,
    options: ServeOptions,
    hosts: "Callable[[], Hosts | None]" = lambda: None,
    isa: str = "",
) -> "Starlette":
    """The server's application over processes that load the model, with it once they have.

    hosts: finds where the ranks are. isa: the kernels that they compute with; "": the best. Raises
    the error that this ends with.
    """
    # While the processes start.
    from moebius.engine.disk_directory import launch_key
    from moebius.engine.wire import Launch
    from moebius.server.app import create_app
    from moebius.server.spans import Spans
    from moebius.text import load_text

    spans = Spans.from_environment()
    tokenizer, generation = load_text(model.path, model.tokenizer)
    key = launch_key(config)
    ends = generation.eos_ids
    launch = Launch(
        str(model.path.absolute()),
        config,
        key,
        ends,
        options.log_level,
        isa=isa,
        tokenizer="" if model.tokenizer is None else str(model.tokenizer.absolute()),
    )
    if options.generation_config == "none":
        generation = replace(generation, sampling={})
    replies = tokenizer.replies.with_tools(options.tool_format)

    def say(planned: "Planned") -> None:
        _say_plan(model.name, planned, generation)
        if tokenizer.has_chat_template:
            typer.echo(f"tool calls: {replies.tools or 'no format that is known'}", err=True)
            typer.echo(f"reasoning: {replies.reasoning or 'none'}", err=True)

    client = processes.launch(launch, say, hosts())
    settings = options.settings(model.name)
    return create_app(
        client,
        tokenizer,
        generation,
        settings,
        prefix_key=key,
        spread=processes.spread,
        replies=replies,
        spans=spans,
        refusal=client.refusal,
    )


def _say_plan(model: str, planned: "Planned", generation: "GenerationDefaults") -> None:
    """What an operator wants to know before the weights are read."""
    typer.echo(_plan_text(model, planned.rows), err=True)
    invariant = "on" if planned.batch_invariant else "off"
    typer.echo(f"batch invariant: {invariant} ({planned.kernels} kernels)", err=True)
    sampling = [f"{name} {value}" for name, value in generation.sampling.items()]
    typer.echo("sampling defaults: " + (", ".join(sampling) or "OpenAI's"), err=True)


_OF_A_PLAN = ("ranks", "expert_placement", "spare_experts", "kv_cache_disk", "kv_cache_disk_bytes")


@o.options_of("config", EngineConfig, *o.SIZES, *_OF_A_PLAN)
@o.options_of("which", o.ModelOptions, "file")
def plan(
    config: EngineConfig,
    which: o.ModelOptions,
    model: o.Model = "bundled",
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What this model's steps cost, from benchmarks/step_costs.py: predicts tokens/s.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Plan for a CUDA device with so much memory, as 24GiB; none need be here.",
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for a host with so much memory that is free."),
    ] = None,
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="List every tensor too: bytes, mapped or copied, format."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what a model takes and how many sequences fit.

    Weights, KV cache and workspace are counted from the headers of its files; nothing is loaded.
    With --ranks they are those of one rank, as if all were on this host.
    """
    from moebius.engine.load import prepare
    from moebius.engine.target import Target

    target = Target(_size("--memory", memory), _size("--host-memory", host_memory))
    prepared = prepare(which.find(model).path, config, target=target)
    outlook = None
    if config.ranks > 1 or costs is not None:
        outlook = _outlook(prepared, config, costs)
    if as_json:
        record = _plan_record(prepared, tensors=tensors)
        typer.echo(json_text(record | ({"outlook": asdict(outlook)} if outlook else {}), indent=2))
        return
    if tensors:
        _print_tensors(prepared)
    rows = prepared.rows() + (outlook.rows() if outlook else [])
    typer.echo(_plan_text(model, rows))


def _size(option: str, text: str | None) -> int | None:
    """Bytes of an option's size. Raises ConfigError."""
    from moebius.engine.plan_words import bytes_of

    try:
        return None if text is None else bytes_of(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None


def _outlook(prepared: "Prepared", config: EngineConfig, costs: Path | None) -> "Outlook":
    """What ranks would exchange in a step, and how fast they would be."""
    from moebius.bench.costs import Costs, ExpertSizes
    from moebius.bench.predict import outlook

    sizes = ExpertSizes.of(prepared.checkpoint.config, prepared.dtype.itemsize)
    known = None if costs is None else Costs.read(costs)
    ranks = prepared.decoder.ranks
    return outlook(
        sizes,
        config.ranks,
        known,
        placement=None if ranks is None else ranks.placement,
        sequences=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )


def _plan_record(prepared: "Prepared", *, tensors: bool) -> dict[str, Any]:
    plan = prepared.plan
    record = asdict(plan) | {
        "kv_cache": plan.kv_cache,
        "kv_tokens": plan.kv_tokens,
        "bytes_per_token": plan.bytes_per_token,
    }
    if tensors:
        record["tensors"] = [
            {"name": row.name, "bytes": row.nbytes, "mapped": row.mapped, "format": row.format}
            for row in prepared.weights
        ]
    return record


def _print_tensors(prepared: "Prepared") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "bytes", "", "", box=None, pad_edge=False)
    for row in prepared.weights:
        held = "mapped" if row.mapped else "repacked" if row.repacked else "copied"
        table.add_row(row.name, f"{row.nbytes:,}", held, row.format)
    Console().print(table)


def _plan_text(model: str, rows: list[tuple[str, str, str]]) -> str:
    """A line a row: what, how much, remark. None is folded, for it may go to a log."""
    table = [("", model, ""), *rows]
    widest = max(len(what) for what, _, _ in table)
    largest = max(len(size) for _, size, _ in table)
    lines = (
        f"{what:<{widest}}  {size:>{largest}}  {remark}".rstrip() for what, size, remark in table
    )
    return "\n".join(lines)
