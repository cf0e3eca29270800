"""moebius chat: talk to a model in the terminal."""

from typing import Annotated, Any

import typer

from moebius.cli import options as o
from moebius.config import EngineConfig


@o.takes_engine_config("dtype", "max_model_len", "threads", max_num_seqs=1)
def chat(
    config: EngineConfig,
    model: o.Model = "bundled",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same answers.")] = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer; Ctrl-D or an empty /quit leaves; /new starts over."""
    from moebius.llm import LLM

    llm = LLM.from_config(model, config)
    if not llm.tokenizer.has_chat_template:
        raise typer.BadParameter(f"{model} has no chat template; use `moebius generate` instead", param_hint="MODEL")
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

    asked = [*history, {"role": "user", "content": line}]
    answer = ""
    try:
        for piece in llm.stream_chat(asked, _fitting(llm, asked, params)):
            answer += piece
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        pass
    except RequestError as error:
        typer.echo(f"moebius: {error}", err=True)
        return history
    typer.echo()
    return [*asked, {"role": "assistant", "content": answer}]


def _fitting(llm: Any, messages: list[dict[str, str]], params: Any) -> Any:
    """A shorter answer where the conversation has filled the context."""
    room = llm.engine.info.limits.max_model_len - len(llm.tokenizer.encode_chat(messages))
    return params.with_(max_tokens=max(1, min(params.max_tokens, room)))
