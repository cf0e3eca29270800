"""What several commands share: options, of which the engine's are the fields of EngineConfig, and a
progress bar."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from moebius.engine.config import EngineConfig

_MODEL_HELP = "A directory in the Hugging Face layout, a hub id, or 'bundled'."
Model = Annotated[str, typer.Argument(help=_MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", help=_MODEL_HELP)]

SIZES = (
    "dtype",
    "device",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
)
"""What the memory plan depends on."""
ALL = (*SIZES, *(name for name in EngineConfig.__dataclass_fields__ if name not in SIZES))


def takes_config(
    record: type[Any], *names: str, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command: these fields of a configuration become its options and arrive as one
    argument, `config`.

    `defaults` are values that differ from the record's own, for options and for other fields.
    """
    base = record(**defaults)
    hints = get_type_hints(record, include_extras=True)

    def option(name: str) -> inspect.Parameter:
        kind, text = get_args(hints[name])
        # The record itself says in one line which words a field may have.
        shown: Any = str if get_origin(kind) is Literal else kind
        shown = list[get_args(kind)[0]] if get_origin(kind) is Sequence else shown  # type: ignore[misc]
        annotation = Annotated[shown, typer.Option(help=text)]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=getattr(base, name), annotation=annotation
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            config = replace(base, **{name: given.pop(name) for name in names})
            command(config=config, **given)

        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "config"]
        run.__signature__ = signature.replace(parameters=[*own, *map(option, names)])  # type: ignore[attr-defined]
        return run

    return decorate


takes_engine_config = partial(takes_config, EngineConfig)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr while that is a terminal; yields what to call once for each that is done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda *_: progress.advance(task)
