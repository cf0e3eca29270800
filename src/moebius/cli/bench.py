"""moebius bench: latency and throughput of the engine, and load on any server."""

import asyncio
import math
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebius.cli import options as o
from moebius.engine.config import EngineConfig
from moebius.errors import require
from moebius.server.settings import host_and_port

if TYPE_CHECKING:
    from moebius.bench.client import Target
    from moebius.bench.metrics import Record
    from moebius.bench.workload import Dataset
    from moebius.text import Tokenizer

bench = typer.Typer(
    name="bench",
    help="Measure latency, throughput, or any server.",
    no_args_is_help=True,
)

OutputJson = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")]
Seed = Annotated[int, typer.Option(help="The same seed, the same requests.")]
NumPrompts = Annotated[int, typer.Option(help="Requests in all.")]
DatasetName = Annotated[
    str, typer.Option(help="random, or jsonl: prompts of --dataset-path, one JSON object a line.")
]
DatasetPath = Annotated[
    Path | None, typer.Option(help="Lines of {prompt, output_tokens}, or of ShareGPT.")
]
RangeRatio = Annotated[
    float, typer.Option(help="Random lengths differ by up to this share, 0 to 1.")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw a chart: .png, .svg or .pdf.")
]


InputLen = Annotated[
    int, typer.Option("--random-input-len", "--input-len", help="Tokens of a random prompt.")
]
OutputLen = Annotated[
    int | None,
    typer.Option(
        "--random-output-len", "--output-len", help="Tokens an answer; default 128, or the file's."
    ),
]


@bench.command()
@o.takes_engine_config(*o.SIZES, "threads", enable_prefix_caching=False)
def latency(
    config: EngineConfig,
    model: o.ModelOption = "bundled",
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts in the batch.")] = 8,
    n: Annotated[int, typer.Option("-n", "--n", help="Answers a prompt.")] = 1,
    num_iters: Annotated[int, typer.Option(help="Batches that are timed.")] = 30,
    num_iters_warmup: Annotated[int, typer.Option(help="Batches before them.")] = 10,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Time one batch from its prompts to its last token.

    It runs --num-iters times, with the prefix cache off.
    """
    from moebius.bench.offline import latency_figures, timed
    from moebius.bench.report import check_outputs, save_json
    from moebius.bench.workload import Dataset, require_positive
    from moebius.llm import LLM

    require_positive(batch_size=batch_size, num_iters=num_iters, n=n)
    require(
        num_iters_warmup >= 0, f"--num-iters-warmup is {num_iters_warmup}; it must be at least 0"
    )
    most, sequences = config.max_num_seqs, batch_size * n
    require(
        sequences <= most,
        f"{sequences} sequences are no single batch for --max-num-seqs {most}; raise it",
    )
    check_outputs(output_json)
    dataset, seconds = Dataset(input_len=input_len, output_len=output_len), []
    with (
        LLM.from_config(model, config) as llm,
        o.progress_bar("batches", num_iters_warmup + num_iters) as advance,
    ):
        samples = dataset.samples(batch_size, seed, llm.tokenizer)
        for _ in range(num_iters_warmup + num_iters):
            seconds.append(timed(llm, samples, n=n, progress=False)["elapsed_time"])
            advance()
    result = latency_figures(seconds[num_iters_warmup:])
    typer.echo(f"Avg latency: {result['avg_latency']:.4f} seconds")
    for p, value in result["percentiles"].items():
        typer.echo(f"{p}% percentile latency: {value:.4f} seconds")
    save_json(output_json, result)


@bench.command()
@o.takes_engine_config(*o.SIZES, "enable_prefix_caching", "enable_chunked_prefill", "threads")
def throughput(
    config: EngineConfig,
    model: o.ModelOption = "bundled",
    dataset_name: DatasetName = "random",
    dataset_path: DatasetPath = None,
    input_len: InputLen = 512,
    output_len: OutputLen = None,
    random_range_ratio: RangeRatio = 0.0,
    num_prompts: NumPrompts = 1000,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Answer many prompts, all there from the start.

    The engine runs in this process.
    """
    from moebius.bench.offline import timed
    from moebius.bench.report import check_outputs, save_json
    from moebius.bench.workload import Dataset
    from moebius.llm import LLM

    check_outputs(output_json)
    dataset = Dataset(dataset_name, dataset_path, input_len, output_len, random_range_ratio)
    with LLM.from_config(model, config) as llm:
        result = timed(llm, dataset.samples(num_prompts, seed, llm.tokenizer))
    requests, total, output = (
        result[f"{name}_per_second"] for name in ("requests", "tokens", "output_tokens")
    )
    typer.echo(
        f"Throughput: {requests:.2f} requests/s, {total:.2f} total tokens/s, {output:.2f} output "
        "tokens/s"
    )
    typer.echo(f"Total num prompt tokens:  {result['total_prompt_tokens']}")
    typer.echo(f"Total num output tokens:  {result['total_output_tokens']}")
    save_json(output_json, result)


@bench.command()
def serve(
    more_goodput: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    base_url: Annotated[
        str | None, typer.Option(help="The server's address; default: from --host and --port.")
    ] = None,
    host: Annotated[str, typer.Option(help="The server's host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The server's port.")] = 8000,
    endpoint: Annotated[
        str, typer.Option(help="/v1/completions or /v1/chat/completions.")
    ] = "/v1/completions",
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="The key the server wants.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its name there; default: the first that the server lists.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory of one, for exact prompts; default: --model.")
    ] = None,
    dataset_name: DatasetName = "random",
    dataset_path: DatasetPath = None,
    random_input_len: InputLen = 1024,
    random_output_len: OutputLen = None,
    random_range_ratio: RangeRatio = 0.0,
    num_prompts: NumPrompts = 1000,
    request_rate: Annotated[
        float, typer.Option(help="Requests a second (Poisson); inf: all at once.")
    ] = float("inf"),
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson; less: in bursts; more: evenly (gamma).")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Most requests under way at once.")
    ] = None,
    num_warmups: Annotated[
        int, typer.Option(help="Requests before the run, one after the other.")
    ] = 1,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for answers of full length.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds of silence after which a request has failed.")
    ] = 600.0,
    seed: Seed = 0,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Limits in ms, such as ttft:500 tpot:50 e2el:3000.")
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Metrics to print.")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to print.")] = "99",
    output_json: OutputJson = None,
    plot: Plot = None,
) -> None:
    """Measure latencies, throughput and goodput of any server."""
    from moebius.bench import metrics, report
    from moebius.bench.client import Target, introduce
    from moebius.bench.workload import Dataset, arrival_times, require_positive

    stray = next(iter((more_goodput or ()) if not goodput else ()), None)
    require(
        stray is None,
        f"{stray!r} belongs to no option; limits go behind --goodput, such as ttft:500",
    )
    limits = metrics.parse_goodput([*(goodput or ()), *(more_goodput or ())])
    shown = metrics.parse_metrics(percentile_metrics)
    percentiles = metrics.parse_percentiles(metric_percentiles)
    require_positive(max_concurrency=1 if max_concurrency is None else max_concurrency)
    report.check_outputs(output_json, plot)
    dataset = Dataset(
        dataset_name, dataset_path, random_input_len, random_output_len, random_range_ratio
    )
    due = arrival_times(num_prompts, request_rate, burstiness, seed)
    body = {"temperature": temperature, **({"ignore_eos": True} if ignore_eos else {})}
    root = base_url or f"http://{host_and_port(host, port)}"
    target = introduce(Target(root, endpoint, model or "", api_key, body, timeout))
    records, seconds = _send(target, dataset, due, tokenizer, num_warmups, max_concurrency, seed)
    result = {
        **_run_facts(target, len(records), request_rate, burstiness, max_concurrency),
        **metrics.summarise(records, seconds, percentiles=percentiles, goodput=limits),
    }
    typer.echo(report.serving_report(result, shown, percentiles))
    report.save_json(output_json, {**result, "requests": [asdict(record) for record in records]})
    if not result["completed"]:
        raise typer.Exit(1)
    if plot:
        title = f"{target.model}: {result['completed']} requests, {result['failed']} failed"
        report.plot_serving(plot, title, records, limits)


def _send(
    target: "Target",
    dataset: "Dataset",
    due: list[float],
    tokenizer: str | None,
    num_warmups: int,
    max_concurrency: int | None,
    seed: int,
) -> "tuple[list[Record], float]":
    """Warm the server up, then send one request at each of the times `due`; records and the run's
    seconds."""
    from moebius.bench.client import run_load, warm_up

    # Chat takes text, so its random prompts have about the length that was asked for.
    found = None if target.chat and dataset.path is None else _tokenizer(tokenizer, target.model)
    if num_warmups > 0:
        # Other prompts where these are random, so that no prefix cache knows the run's.
        asyncio.run(warm_up(target, dataset.samples(num_warmups, seed + 1, found)))
    samples = dataset.samples(len(due), seed, found)
    if len(samples) < len(due):
        typer.echo(f"the dataset has {len(samples)} prompts; that many are sent", err=True)
    with o.progress_bar("requests", len(samples)) as advance:
        load = run_load(
            target, samples, due[: len(samples)], max_concurrency=max_concurrency, on_done=advance
        )
        return asyncio.run(load)


def _run_facts(
    target: "Target",
    num_prompts: int,
    request_rate: float,
    burstiness: float,
    max_concurrency: int | None,
) -> dict[str, object]:
    """What was measured, and when."""
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "base_url": target.root,
        "endpoint": target.endpoint,
        "model_id": target.model,
        "num_prompts": num_prompts,
        "request_rate": None if math.isinf(request_rate) else request_rate,
        "burstiness": burstiness,
        "max_concurrency": max_concurrency,
    }


def _tokenizer(wanted: str | None, served: str) -> "Tokenizer | None":
    """The wanted model's tokenizer, or the served one's where its name is a directory here; nothing
    is downloaded."""
    from moebius.models.hub import BUNDLED, resolve_model
    from moebius.text import Tokenizer

    name = wanted or served
    if Path(name).is_dir():
        return Tokenizer.load(Path(name))
    if name == BUNDLED:
        return Tokenizer.load(resolve_model(name))
    require(
        wanted is None,
        f"--tokenizer {wanted!r} is no directory; name one that holds a tokenizer.json",
    )
    return None
