"""moebius serve MODEL: the OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

import typer

from moebius.cli import options as o
from moebius.errors import ConfigError


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
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get to finish at SIGTERM.")] = 30.0,
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
    config = o.engine_config(
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        max_queue_requests=max_queue_requests,
        max_queue_tokens=max_queue_tokens,
        step_deadline=step_deadline,
        threads=threads,
        trace=trace,
    )
    from moebius.server.launch import Launch, launch

    launch(
        Launch(
            model=model,
            engine=config,
            host=host,
            port=port,
            api_keys=tuple(api_key or ()),
            served_model_names=tuple(served_model_name or (model,)),
            model_defaults=generation_config == "auto",
            vllm_metric_names=vllm_metric_names,
            drain_timeout=drain_timeout,
            log_level=log_level,
        )
    )
