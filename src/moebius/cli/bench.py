"""moebius bench: latency and throughput of the engine, and load on any server."""

import asyncio
import math
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli import options as o
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError
from moebius.server.settings import host_and_port

if TYPE_CHECKING:
    from moebius.bench.client import Target
    from moebius.bench.metrics import Record
    from moebius.bench.workload import Dataset
    from moebius.text import Tokenizer

bench = typer.Typer(
    name="bench", help="Measure latency, throughput, or any server.", no_args_is_help=True
)

OutputJson = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")]
Seed = Annotated[int, typer.Option(help="The same seed, the same requests.")]
NumPrompts = Annotated[int, typer.Option(help="Requests in all.")]


@dataclass(frozen=True, slots=True)
class DatasetOptions:
    """Which requests a benchmark sends: see moebius.bench.workload.Dataset."""

    dataset_name: Annotated[
        str, "random, or jsonl: prompts of --dataset-path, one JSON object per line."
    ] = "random"
    dataset_path: Annotated[Path | None, "Lines of {prompt, output_tokens}, or of ShareGPT."] = None
    input_len: Annotated[
        int, typer.Option("--random-input-len", "--input-len", help="Tokens of a random prompt.")
    ] = 512
    output_len: Annotated[
        int | None,
        typer.Option(
            "--random-output-len",
            "--output-len",
            help="Tokens per answer; default 128, or the file's.",
        ),
    ] = None
    random_range_ratio: Annotated[float, "Random lengths differ by up to this share, 0 to 1."] = 0.0

    def dataset(self) -> "Dataset":
        """Raises ConfigError for options that do not go together."""
        from moebius.bench.workload import Dataset

        return Dataset(
            self.dataset_name,
            self.dataset_path,
            self.input_len,
            self.output_len,
            self.random_range_ratio,
        )


@bench.command()
@o.options_of("config", EngineConfig, *o.SIZES, "threads", enable_prefix_caching=False)
@o.options_of("which", o.ModelOptions)
def latency(
    config: EngineConfig,
    which: o.ModelOptions,
    model: o.ModelOption = "bundled",
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts in the batch.")] = 8,
    n: Annotated[int, typer.Option("-n", "--n", help="Answers per prompt.")] = 1,
    num_iters: Annotated[int, typer.Option(help="Batches that are timed.")] = 30,
    num_iters_warmup: Annotated[int, typer.Option(help="Batches before them, not timed.")] = 10,
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
    if num_iters_warmup < 0:
        raise ConfigError(f"--num-iters-warmup is {num_iters_warmup}; it must be at least 0")
    if batch_size * n > config.max_num_seqs:
        raise ConfigError(
            f"{batch_size * n} sequences are no single batch for --max-num-seqs "
            f"{config.max_num_seqs}; raise it"
        )
    check_outputs(output_json)
    dataset = Dataset(input_len=input_len, output_len=output_len)
    batches = num_iters_warmup + num_iters
    seconds = []
    source = which.find(model)
    with LLM.from_config(source, config) as llm, o.progress_bar("batches", batches) as advance:
        samples = dataset.samples(batch_size, seed, llm.tokenizer)
        for _ in range(batches):
            seconds.append(timed(llm, samples, n=n, progress=False)["elapsed_time"])
            advance(1)
    result = latency_figures(seconds[num_iters_warmup:])
    typer.echo(f"Avg latency: {result['avg_latency']:.4f} seconds")
    for p, value in result["percentiles"].items():
        typer.echo(f"{p}% percentile latency: {value:.4f} seconds")
    save_json(output_json, result)


@bench.command()
@o.options_of(
    "config",
    EngineConfig,
    *o.SIZES,
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "threads",
)
@o.options_of("requests", DatasetOptions)
@o.options_of("which", o.ModelOptions)
def throughput(
    config: EngineConfig,
    which: o.ModelOptions,
    requests: DatasetOptions,
    model: o.ModelOption = "bundled",
    num_prompts: NumPrompts = 1000,
    seed: Seed = 0,
    output_json: OutputJson = None,
) -> None:
    """Answer many prompts, all there from the start.

    The engine runs in this process.
    """
    from moebius.bench.offline import timed
    from moebius.bench.report import check_outputs, save_json
    from moebius.llm import LLM

    check_outputs(output_json)
    dataset = requests.dataset()
    with LLM.from_config(which.find(model), config) as llm:
        result = timed(llm, dataset.samples(num_prompts, seed, llm.tokenizer))
    typer.echo(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    typer.echo(f"Total num prompt tokens:  {result['total_prompt_tokens']}")
    typer.echo(f"Total num output tokens:  {result['total_output_tokens']}")
    save_json(output_json, result)


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """Which server to measure."""

    base_url: Annotated[str | None, "The server's address; default: from --host and --port."] = None
    host: Annotated[str, "The server's host."] = "127.0.0.1"
    port: Annotated[int, "The server's port."] = 8000
    endpoint: Annotated[str, "/v1/completions or /v1/chat/completions."] = "/v1/completions"
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="The key the server wants.")
    ] = None
    model: Annotated[str | None, "Its model's name; default: the first that it lists."] = None
    tokenizer: Annotated[
        str | None,
        "Directory or GGUF file of the model's tokenizer, for exact prompts; default: --model.",
    ] = None

    def root(self) -> str:
        return self.base_url or f"http://{host_and_port(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How many requests are sent, when, and how."""

    num_prompts: NumPrompts = 1000
    request_rate: Annotated[float, "Requests per second (Poisson); inf: all at once."] = math.inf
    burstiness: Annotated[float, "1: Poisson; less: in bursts; more: evenly (gamma)."] = 1.0
    max_concurrency: Annotated[int | None, "Most requests under way at once."] = None
    num_warmups: Annotated[int, "Requests before the run, one after the other."] = 1
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for answers of full length.")
    ] = False
    temperature: Annotated[float, "0 is greedy."] = 0.0
    timeout: Annotated[float, "Seconds of silence after which a request has failed."] = 600.0
    seed: Seed = 0

    def body(self) -> dict[str, Any]:
        """Fields of every request."""
        asked: dict[str, Any] = {"temperature": self.temperature}
        return asked | {"ignore_eos": True} if self.ignore_eos else asked

    def facts(self) -> dict[str, Any]:
        """What the figures are said to be of."""
        return {
            "request_rate": None if math.isinf(self.request_rate) else self.request_rate,
            "burstiness": self.burstiness,
            "max_concurrency": self.max_concurrency,
        }


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """Which figures are shown, and where they go."""

    goodput: Annotated[list[str] | None, "Limits in ms, such as ttft:500 tpot:50 e2el:3000."] = None
    percentile_metrics: Annotated[str, "Metrics to print."] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[str, "Percentiles to print."] = "99"
    output_json: OutputJson = None
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a chart: .png, .svg or .pdf.")
    ] = None


@bench.command()
@o.options_of("shown", ReportOptions)
@o.options_of("load", LoadOptions)
@o.options_of("requests", DatasetOptions, input_len=1024)
@o.options_of("server", TargetOptions)
def serve(
    server: TargetOptions,
    requests: DatasetOptions,
    load: LoadOptions,
    shown: ReportOptions,
    more_goodput: Annotated[list[str] | None, typer.Argument(metavar="LIMITS", hidden=True)] = None,
) -> None:
    """Measure latencies, throughput and goodput of any server."""
    from moebius.bench import metrics, report
    from moebius.bench.client import Target, introduce
    from moebius.bench.workload import arrival_times, require_positive

    stray = more_goodput or []
    if stray and not shown.goodput:
        raise ConfigError(
            f"{stray[0]!r} belongs to no option; limits go behind --goodput, such as ttft:500"
        )
    limits = metrics.parse_goodput([*(shown.goodput or []), *stray])
    names = metrics.parse_metrics(shown.percentile_metrics)
    percentiles = metrics.parse_percentiles(shown.metric_percentiles)
    if load.max_concurrency is not None:
        require_positive(max_concurrency=load.max_concurrency)
    report.check_outputs(shown.output_json, shown.plot)
    dataset = requests.dataset()
    due = arrival_times(load.num_prompts, load.request_rate, load.burstiness, load.seed)
    target = introduce(
        Target(
            server.root(),
            server.endpoint,
            server.model or "",
            server.api_key,
            load.body(),
            load.timeout,
        )
    )
    records, seconds = _send(target, dataset, due, server.tokenizer, load)
    result = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "base_url": target.root,
        "endpoint": target.endpoint,
        "model_id": target.model,
        "num_prompts": len(records),
        **load.facts(),
        **metrics.summarise(records, seconds, percentiles=percentiles, goodput=limits),
    }
    typer.echo(report.serving_report(result, names, percentiles))
    details = {"requests": [asdict(record) for record in records]}
    report.save_json(shown.output_json, result | details)
    if not result["completed"]:
        raise typer.Exit(1)
    if shown.plot:
        title = f"{target.model}: {result['completed']} requests, {result['failed']} failed"
        report.plot_serving(shown.plot, title, records, limits)


def _send(
    target: "Target",
    dataset: "Dataset",
    due: list[float],
    tokenizer: str | None,
    options: LoadOptions,
) -> "tuple[list[Record], float]":
    """Warm the server up, then send one request at each of the times `due`.

    Returns their records and the run's seconds.
    """
    from moebius.bench.client import run_load, warm_up

    # Chat takes text, so its random prompts have about the length that was asked for.
    found = None if target.chat and dataset.path is None else _tokenizer(tokenizer, target.model)
    if options.num_warmups > 0:
        # Other prompts where these are random, so that no prefix cache knows the run's.
        first = dataset.samples(options.num_warmups, options.seed + 1, found)
        asyncio.run(warm_up(target, first))
    samples = dataset.samples(len(due), options.seed, found)
    if len(samples) < len(due):
        typer.echo(f"the dataset has {len(samples)} prompts; that many are sent", err=True)
    with o.progress_bar("requests", len(samples)) as advance:
        load = run_load(
            target,
            samples,
            due[: len(samples)],
            max_concurrency=options.max_concurrency,
            on_done=lambda _: advance(1),
        )
        return asyncio.run(load)


def _tokenizer(wanted: str | None, served: str) -> "Tokenizer | None":
    """The wanted model's tokenizer, or the served one's where its name is a directory or a GGUF
    file here.

    Nothing is downloaded.
    """
    from moebius.models.hub import BUNDLED, resolve_tokenizer
    from moebius.text import load_tokenizer

    name = wanted or served
    if Path(name).exists() or name == BUNDLED:
        return load_tokenizer(resolve_tokenizer(name))
    if wanted is not None:
        raise ConfigError(
            f"--tokenizer {wanted!r} is no directory; name one that holds a tokenizer.json, or a "
            "GGUF file"
        )
    return None
