"""What several commands share: options that are the fields of a record, and a progress bar."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from moebius.errors import ConfigError

if TYPE_CHECKING:
    from moebius.models.hub import ModelSource
    from moebius.progress import Advance

_MODEL_HELP = "A directory in the Hugging Face layout, a GGUF file, a hub id, or 'bundled'."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", help=_MODEL_HELP)]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What says more of a model than its name."""

    file: Annotated[
        str | None, "Which GGUF file of a directory or a hub id: its name, or a part of it."
    ] = None
    tokenizer: Annotated[
        str | None, "Directory, GGUF file or hub id of a tokenizer to use instead of the model's."
    ] = None

    def find(self, model: str) -> "ModelSource":
        """The model's files. Raises ConfigError."""
        from moebius.models.hub import find_model

        return find_model(model, self.file, self.tokenizer)


SIZES = (
    "dtype",
    "quantization",
    "activations",
    "device",
    "experts",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_dtype",
    "kv_cache_memory_bytes",
    "mmap_cold",
)
"""The fields of EngineConfig that the memory plan depends on."""

OTHER_NAMES = {"experts": ("--experts", "--experts-on-gpu")}
"""Of fields whose option has more than one."""

Command = Callable[..., None]


def options_of(
    parameter: str, record: type[Any], *names: str, **defaults: Any
) -> Callable[[Command], Command]:
    """Decorates a command: a record's fields become its options, and arrive as one argument.

        @options_of("config", EngineConfig, "dtype", "threads", max_num_seqs=1)
        def chat(config: EngineConfig, model: Model) -> None: ...

    has --dtype and --threads where `config` stood. A field is annotated with its help text,
    `Annotated[int, "Most sequences."]`, or with a whole typer.Option. Without `names` all fields
    are options. `defaults` differ from the record's own, for options and for other fields. Typer
    reads what to ask for from the signature, so the decorated command's is rewritten.
    """
    base = record(**defaults)
    hints = get_type_hints(record, include_extras=True)
    chosen = names or tuple(field.name for field in fields(record))

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**given: Any) -> None:
            values = {name: given.pop(name) for name in chosen}
            command(**given, **{parameter: replace(base, **values)})

        signature = inspect.signature(command, eval_str=True)
        parameters = [each for each in signature.parameters.values() if each.name != parameter]
        for name in chosen:
            option = inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(base, name),
                annotation=_annotation(name, hints[name]),
            )
            parameters.append(option)
        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        return run

    return decorate


def run_with(command: Command, given: Mapping[str, Any], name: str) -> None:
    """Run a command whose options come as a mapping, with the command line's own checks.

    Values are texts, or what the option is: numbers, truth values, lists. ConfigError names the
    option that there is not, or the value that is wrong.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    found = typer.main.get_command(app)
    known = {option.name: option for option in found.params if option.name != "help"}
    words: list[str] = []
    for key, value in given.items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            raise ConfigError(f"{name} has no option {key!r}; it has {', '.join(known)}")
        words += _words(option, value)
    try:
        found.main(args=words, prog_name=name, standalone_mode=False)
    except typer.BadParameter as error:
        raise ConfigError(f"{name}: {error.format_message()}") from error


def _words(option: Any, value: Any) -> list[str]:
    """An option with its value as a command line has it."""
    if value is None:
        return []
    if getattr(option, "is_flag", False):
        return _flag(option, value)
    many = value if isinstance(value, list | tuple) else [value]
    return [f"{option.opts[0]}={each}" for each in many]


def _flag(option: Any, value: Any) -> list[str]:
    said = str(value).lower()
    if said not in ("true", "false"):
        raise ConfigError(f"{option.name} is {value!r}; it must be true or false")
    if said == "true":
        return [option.opts[0]]
    return list(option.secondary_opts[:1])  # none where that is what it is anyway


def _annotation(name: str, hint: Any) -> Any:
    """A field's annotation as typer wants a parameter's."""
    kind, described = get_args(hint)
    option = described
    if isinstance(described, str):
        option = typer.Option(*OTHER_NAMES.get(name, ()), help=described)
    if get_origin(kind) is Literal:
        kind = str  # the record itself says in one line which words a field may have
    elif get_origin(kind) is Sequence:
        kind = GenericAlias(list, get_args(kind))
    elif kind == int | str:
        kind = str  # a number, or a word instead: the record reads both
    return Annotated[kind, option]


@contextmanager
def progress_bar(what: str, total: int) -> Iterator["Advance"]:
    """A bar on stderr while that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)
