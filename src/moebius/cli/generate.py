"""moebius generate: completions, or a batch file answered offline; moebius chat: a conversation."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli import options as o
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError

if TYPE_CHECKING:
    from moebius.models.hub import ModelSource


@o.options_of(
    "config", EngineConfig, *o.SIZES, "threads", "switch_capacity", "speculative", "trace"
)
@o.options_of("which", o.ModelOptions)
def generate(
    config: EngineConfig,
    which: o.ModelOptions,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none: one prompt, read from stdin.")
    ] = None,
    model: o.ModelOption = "bundled",
    batch: Annotated[
        Path | None,
        typer.Option(
            help="Answer a file in OpenAI's batch format (JSON lines) instead of prompts."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where a batch's results go; run again with the same files to resume."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one completion.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: the model's.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most likely tokens of this mass.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from this many most likely tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Completions per prompt.")] = 1,
) -> None:
    """Complete prompts, or answer a batch file into another."""
    if batch is not None:
        if prompts or output is None:
            raise ConfigError("--batch FILE answers a file: give it --output FILE and no prompts")
        _batch(which.find(model), config, batch, output)
        return
    if output is not None:
        raise ConfigError("--output goes with --batch; the text of prompts is printed to stdout")
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = {name: value for name, value in given.items() if value is not None}
    _print(
        which.find(model),
        config,
        prompts,
        max_tokens=max_tokens,
        seed=seed,
        stop=tuple(stop or ()),
        n=n,
        **sampling,
    )


def _print(
    model: "ModelSource", config: EngineConfig, prompts: list[str] | None, **sampling: Any
) -> None:
    """Completions to stdout as they finish, behind the prompts that they continue."""
    if not prompts:
        if sys.stdin.isatty():
            typer.echo("reading the prompt from stdin, Ctrl-D ends it", err=True)
        prompts = [sys.stdin.read()]
    from moebius.llm import LLM

    with LLM.from_config(model, config) as llm:
        params = llm.default_params(**sampling)
        several = len(prompts) * params.n > 1
        continues = not llm.client.info.start_ids
        for output in llm.stream((prompt, params) for prompt in prompts):
            for choice in output.outputs:
                if several:
                    title = f"prompt {int(output.request_id) + 1}, completion {choice.index + 1}"
                    typer.echo(f"--- {title} ({choice.finish_reason})")
                typer.echo(f"{output.prompt}{choice.text}" if continues else choice.text)


def _batch(model: "ModelSource", config: EngineConfig, batch: Path, output: Path) -> None:
    from moebius.files import check_apart
    from moebius.server.batch import open_results, read_batch

    trace = None if config.trace is None else Path(config.trace)
    check_apart(batch=batch, output=output, trace=trace)
    calls = read_batch(batch)
    with open_results(output, batch, calls) as (out, left):
        if len(left) < len(calls):
            typer.echo(f"{len(calls) - len(left)} answered before, {len(left)} to go", err=True)
        failures = asyncio.run(_answer(model, config, left, out)) if left else 0
    typer.echo(f"{len(left) - failures} answered, {failures} refused or failed: {output}", err=True)


async def _answer(model: "ModelSource", config: EngineConfig, calls: list[Any], out: Any) -> int:
    from moebius.engine.disk_directory import launch_key
    from moebius.engine.in_process import InProcessClient
    from moebius.engine.load import load_engine
    from moebius.server.app import create_app
    from moebius.server.batch import run_batch
    from moebius.server.settings import ServerSettings
    from moebius.text import load_text

    tokenizer, defaults = load_text(model.path, model.tokenizer)
    key = launch_key(config)
    engine = load_engine(
        model.path,
        config,
        eos_ids=defaults.eos_ids,
        prefix_key=key,
        tokenizer=lambda: tokenizer,
    )
    client = InProcessClient(engine, step_deadline=config.step_deadline)
    # A batch was written for some model's name; here there is but one model.
    asked = [str(call.body["model"]) for call in calls if call.body.get("model")]
    names = tuple(dict.fromkeys([model.name, *asked]))
    settings = ServerSettings(served_model_names=names, request_timeout=86_400.0 * 365)
    app = create_app(client, tokenizer, defaults, settings, prefix_key=key)
    concurrency = 2 * config.max_num_seqs
    async with app.router.lifespan_context(app):
        with o.progress_bar("calls", len(calls)) as advance:
            return await run_batch(
                app, calls, out, concurrency=concurrency, on_result=lambda: advance(1)
            )


@o.options_of(
    "config",
    EngineConfig,
    "dtype",
    "quantization",
    "activations",
    "max_model_len",
    "kv_cache_dtype",
    "threads",
    "speculative",
    max_num_seqs=1,
)
@o.options_of("which", o.ModelOptions)
def chat(
    config: EngineConfig,
    which: o.ModelOptions,
    model: o.Model = "bundled",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: the model's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers.")] = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer; Ctrl-D or /quit leaves; /new starts over."""
    from moebius.llm import LLM

    llm = LLM.from_config(which.find(model), config)
    if not llm.tokenizer.has_chat_template:
        raise ConfigError(f"{model} has no chat template; use `moebius generate` instead")
    warmth = {} if temperature is None else {"temperature": temperature}
    params = llm.default_params(max_tokens=max_tokens, seed=seed, **warmth)
    start = [{"role": "system", "content": system}] if system else []
    history = list(start)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if line == "/quit":
            return
        if line == "/new":
            history = list(start)
            continue
        if line:
            history = _turn(llm, history, line, params)


def _turn(llm: Any, history: list[dict[str, str]], line: str, params: Any) -> list[dict[str, str]]:
    """One question and its streamed answer; a refused one leaves the conversation as it was."""
    from moebius.errors import RequestError
    from moebius.text.replies import fold

    asked = [*history, {"role": "user", "content": line}]
    said: list[Any] = []
    try:
        for event in llm.stream_events(asked, _fitting(llm, asked, params)):
            _show(event, said)
            said.append(event)
    except KeyboardInterrupt:
        pass
    except RequestError as error:
        typer.echo(f"moebius: {error}", err=True)
        return history
    typer.echo()
    whole = fold(said)
    thought = {} if whole.reasoning is None else {"reasoning_content": whole.reasoning}
    return [*asked, {"role": "assistant", "content": whole.content or "", **thought}]


def _show(event: Any, before: list[Any]) -> None:
    """Print a piece of an answer; its reasoning is dimmed, on lines of its own."""
    from moebius.text.replies import Content, Reasoning

    last = before[-1] if before else None
    if isinstance(last, Reasoning) and not isinstance(event, Reasoning):
        typer.echo()
    if isinstance(event, Reasoning):
        typer.echo(typer.style(event.text, dim=True), nl=False)
    elif isinstance(event, Content):
        typer.echo(event.text, nl=False)


def _fitting(llm: Any, messages: list[dict[str, str]], params: Any) -> Any:
    """A shorter answer where the conversation has filled the context."""
    room = llm.client.info.limits.max_model_len - len(llm.tokenizer.encode_chat(messages))
    return params.with_(max_tokens=max(1, min(params.max_tokens, room)))
