"""moebius serve MODEL: the OpenAI-compatible server; moebius plan MODEL: what a model takes,
without loading it."""

import gc
import logging
from dataclasses import asdict, replace
from functools import partial
from socket import socket
from typing import Annotated

import typer

from moebius.cli import options as o
from moebius.engine.config import EngineConfig
from moebius.errors import require
from moebius.files import json_text
from moebius.server.settings import ServerSettings, host_and_port


@o.takes_engine_config(*o.ALL)
def serve(
    config: EngineConfig,
    model: o.Model = "bundled",
    host: Annotated[
        str, typer.Option(help="Address to bind; any but a loopback one needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MOEBIUS_API_KEY", help="A key that clients must send; may be repeated."
        ),
    ] = None,
    metrics_api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MOEBIUS_METRICS_API_KEY", help="The key that opens /metrics, and nothing else."
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name(s) of the model in the API; default: MODEL.")
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(help="auto: sampling defaults from generation_config.json; none: OpenAI's."),
    ] = "auto",
    vllm_metric_names: Annotated[
        bool, typer.Option(help="Export vLLM's metric names beside our own.")
    ] = True,
    unknown_fields: Annotated[
        str,
        typer.Option(
            help="refuse: a request with a field that nobody knows fails; warn: it is ignored and "
            "logged."
        ),
    ] = "refuse",
    request_timeout: Annotated[
        float, typer.Option(help="Seconds after which a request is given up.")
    ] = 3600.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get to finish at SIGTERM.")
    ] = 30.0,
    keep_alive_timeout: Annotated[
        int, typer.Option(help="Seconds that a connection may rest between two requests.")
    ] = 75,
    max_connections: Annotated[int, typer.Option(help="Most connections at once.")] = 2048,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web pages from this origin may call the server; may be repeated; *: from any."
        ),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model over OpenAI's API."""
    require(
        generation_config in ("auto", "none"),
        f"--generation-config is {generation_config!r}; use auto or none",
    )
    levels = ("debug", "info", "warning", "error")
    require(log_level in levels, f"--log-level is {log_level!r}; use one of {', '.join(levels)}")
    settings = ServerSettings(
        served_model_names=tuple(served_model_name or (model,)),
        api_keys=tuple(api_key or ()),
        metrics_api_key=metrics_api_key,
        vllm_metric_names=vllm_metric_names,
        unknown_fields=unknown_fields,  # type: ignore[arg-type]  # checked there
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        keep_alive_timeout=keep_alive_timeout,
        max_connections=max_connections,
        cors_origins=tuple(cors_origin or ()),
    )
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from moebius.server.listen import reserve

    with reserve(host, port, api_keys=settings.api_keys) as sockets:
        _serve_on(sockets, model, config, settings, host, defaults=generation_config == "auto")


def _serve_on(
    sockets: list[socket],
    model: str,
    config: EngineConfig,
    settings: ServerSettings,
    host: str,
    *,
    defaults: bool,
) -> None:
    """Everything that can be refused is refused before the weights are read; the port opens when
    tokens can flow."""
    from moebius.engine.in_process import InProcessClient
    from moebius.engine.load import load_engine, prepare
    from moebius.models.hub import resolve_model
    from moebius.server.app import create_app
    from moebius.server.run import run_server
    from moebius.text import GenerationDefaults, Tokenizer

    directory = resolve_model(model)
    tokenizer = Tokenizer.load(directory)
    generation = GenerationDefaults.load(directory, tokenizer)
    prepared = prepare(directory, config)
    say = partial(typer.echo, err=True)
    say(_plan_text(model, prepared.rows()))
    engine = load_engine(directory, config, eos_ids=generation.eos_ids, prepared=prepared)
    if not defaults:
        generation = replace(generation, sampling={})
    shown = (
        ", ".join(f"{name} {value}" for name, value in generation.sampling.items()) or "OpenAI's"
    )
    say(f"one answer: {'on' if prepared.ops.one_answer else 'off'} ({prepared.ops.name} kernels)")
    say(f"sampling defaults: {shown}")
    client = InProcessClient(engine, step_deadline=config.step_deadline)
    app = create_app(client, tokenizer, generation, settings)
    address = host_and_port(host, sockets[0].getsockname()[1])
    line = f"serving on http://{address}/v1 as {settings.served_model_names[0]}"
    # or a collection, while requests wait, walks all that was loaded: a tenth of a second
    gc.freeze()
    run_server(app, sockets, on_start=lambda: say(line))


@o.takes_engine_config(*o.SIZES)
def plan(
    config: EngineConfig,
    model: o.Model = "bundled",
    tensors: Annotated[
        bool,
        typer.Option("--tensors", help="List every tensor too: mapped or copied, and its bytes."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what a model takes and how many sequences fit.

    Weights, KV cache and workspace are counted from the headers of its files; nothing is loaded.
    """
    from moebius.engine.load import prepare
    from moebius.models.hub import resolve_model

    prepared = prepare(resolve_model(model), config)
    weights = (
        prepared.checkpoint.plan_weights(prepared.plan.dtype, prepared.plan.device)
        if tensors
        else []
    )
    if as_json:
        record = asdict(prepared.plan) | {
            "kv_cache": prepared.plan.kv_cache,
            "kv_tokens": prepared.plan.kv_tokens,
            "bytes_per_token": prepared.plan.bytes_per_token,
        }
        if tensors:
            record["tensors"] = [
                {"name": row.name, "bytes": row.nbytes, "mapped": row.mapped} for row in weights
            ]
        typer.echo(json_text(record, indent=2))
        return
    if tensors:
        from rich.console import Console
        from rich.table import Table

        table = Table("tensor", "bytes", "", box=None, pad_edge=False)
        for row in weights:
            table.add_row(row.name, f"{row.nbytes:,}", "mapped" if row.mapped else "copied")
        Console().print(table)
    typer.echo(_plan_text(model, prepared.rows()))


def _plan_text(model: str, rows: list[tuple[str, str, str]]) -> str:
    """A line a row: what, how much, remark. None is folded, for it may go to a log."""
    table = [("", model, ""), *rows]
    first, second = (max(len(row[column]) for row in table) for column in (0, 1))
    lines = (
        f"{what:<{first}}  {size:>{second}}  {remark}".rstrip() for what, size, remark in table
    )
    return "\n".join(lines)
