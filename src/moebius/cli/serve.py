"""moebius serve MODEL: the OpenAI-compatible server."""

from __future__ import annotations

import logging
from dataclasses import replace
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli import options as o
from moebius.cli.plan import print_plan
from moebius.config import EngineConfig
from moebius.errors import ConfigError

if TYPE_CHECKING:
    from moebius.server.settings import ServerSettings


def serve(
    model: o.Model = "bundled",
    host: Annotated[str, typer.Option(help="Address to bind; any but a loopback one needs --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="MOEBIUS_API_KEY", help="A key that clients must send; may be repeated.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name(s) of the model in the API; default: MODEL.")
    ] = None,
    generation_config: Annotated[
        str, typer.Option(help="auto: sampling defaults from generation_config.json; none: OpenAI's.")
    ] = "auto",
    vllm_metric_names: Annotated[bool, typer.Option(help="Export vLLM's metric names beside our own.")] = True,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get to finish at SIGTERM.")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    dtype: o.Dtype = o.DEFAULTS.dtype,
    device: o.Device = o.DEFAULTS.device,
    max_model_len: o.MaxModelLen = None,
    max_num_seqs: o.MaxNumSeqs = o.DEFAULTS.max_num_seqs,
    max_num_batched_tokens: o.MaxNumBatchedTokens = o.DEFAULTS.max_num_batched_tokens,
    block_size: o.BlockSize = o.DEFAULTS.block_size,
    kv_cache_memory_bytes: o.KVCacheMemoryBytes = None,
    enable_prefix_caching: o.PrefixCaching = True,
    enable_chunked_prefill: o.ChunkedPrefill = True,
    max_queue_requests: Annotated[int, typer.Option(help="Most requests that wait.")] = o.DEFAULTS.max_queue_requests,
    max_queue_tokens: Annotated[int, typer.Option(help="Most tokens that wait.")] = o.DEFAULTS.max_queue_tokens,
    step_deadline: Annotated[
        float, typer.Option(help="Seconds without progress after which the server is not ready.")
    ] = o.DEFAULTS.step_deadline,
    threads: o.Threads = None,
    trace: o.Trace = None,
) -> None:
    """Serve a model over OpenAI's API."""
    if generation_config not in ("auto", "none"):
        raise ConfigError(f"--generation-config is {generation_config!r}; use auto or none")
    config = o.engine_config(locals())
    settings = {
        "served_model_names": tuple(served_model_name or (model,)),
        "api_keys": tuple(api_key or ()),
        "vllm_metric_names": vllm_metric_names,
        "drain_timeout": drain_timeout,
    }
    _run(model, config, host, port, settings, defaults=generation_config == "auto", log_level=log_level)


def _run(
    model: str, config: EngineConfig, host: str, port: int, settings: dict[str, Any], *, defaults: bool, log_level: str
) -> None:
    """Everything that can be refused is refused before the weights are read; the port opens when tokens can flow."""
    logging.basicConfig(level=_level(log_level), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    from moebius.server.run import reserve_socket
    from moebius.server.settings import ServerSettings

    server = ServerSettings(**settings)
    with reserve_socket(host, port, api_keys=server.api_keys) as sock:
        _serve_on(sock, model, config, server, host, defaults=defaults)


def _serve_on(
    sock: socket, model: str, config: EngineConfig, server: ServerSettings, host: str, *, defaults: bool
) -> None:
    from rich.console import Console

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
    console = Console(stderr=True)
    print_plan(console, model, prepared.plan.rows())
    engine = load_engine(directory, config, eos_ids=generation.eos_ids, prepared=prepared)
    if not defaults:
        generation = replace(generation, sampling={})
    shown = ", ".join(f"{name} {value}" for name, value in generation.sampling.items()) or "OpenAI's"
    console.print(f"one answer: {'on' if prepared.ops.one_answer else 'off'} ({prepared.ops.name} kernels)")
    console.print(f"sampling defaults: {shown}")
    client = InProcessClient(engine, step_deadline=config.step_deadline)
    app = create_app(client, tokenizer, generation, server)
    console.print(
        f"serving on http://{host}:{sock.getsockname()[1]}/v1 as {server.served_model_names[0]}", highlight=False
    )
    run_server(app, sock)


def _level(name: str) -> int:
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    if name not in levels:
        raise ConfigError(f"--log-level is {name!r}; use one of {', '.join(levels)}")
    return levels[name]
