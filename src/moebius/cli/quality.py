"""moebius quality: how well a model predicts a text, in one format or several."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.cli import options as o
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError

if TYPE_CHECKING:
    from moebius.bench.quality import Candidate
    from moebius.models.hub import ModelSource

_NONE = "none"


@o.options_of("config", EngineConfig, "dtype", "threads")
@o.options_of("which", o.ModelOptions)
def quality(
    config: EngineConfig,
    which: o.ModelOptions,
    model: o.Model,
    others: Annotated[
        list[str] | None,
        typer.Argument(metavar="OTHERS", help="More models, or GGUF files, to set beside it."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Held-out text: files, or directories of them.")
    ] = None,
    quantization: Annotated[
        list[str] | None,
        typer.Option(help="MODEL in this format too; may be repeated. See `moebius serve`."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPTION=VALUE",
            help="MODEL with other options of `serve`, several with commas; may be repeated.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of text, chosen evenly.")] = 20_000,
    row_length: Annotated[int, typer.Option(help="Tokens that see each other.")] = 512,
    output_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")
    ] = None,
) -> None:
    """Measure how well a model predicts a text, in several formats.

    All are computed as they would be served, on the same rows of tokens. The divergence is
    Kullback-Leibler's, from the first model's distribution of the next token to each other's.
    """
    from moebius.bench.quality import measure
    from moebius.bench.report import check_outputs, save_json
    from moebius.inspect.corpus import read_documents

    if max_tokens < 2 or row_length < 2:
        raise ConfigError("--max-tokens and --row-length must be at least 2")
    check_outputs(output_json)
    documents = read_documents(text or [], max_tokens)
    candidates = _candidates(
        which.find(model), others or [], quantization or [], variant or [], config
    )
    figures = measure(
        candidates,
        documents,
        row_length=row_length,
        max_tokens=max_tokens,
        progress=o.progress_bar,
    )
    records = [each.record() for each in figures]
    typer.echo(_table(records))
    save_json(output_json, {"model": model, "row_length": row_length, "figures": records})


def _candidates(
    model: "ModelSource",
    others: Iterable[str],
    quantizations: Iterable[str],
    variants: Iterable[str],
    config: EngineConfig,
) -> "list[Candidate]":
    from moebius.bench.quality import Candidate
    from moebius.models.hub import resolve_model

    path = model.path
    found = [Candidate(model.name, path, config, model.tokenizer)]
    for name in quantizations:
        found.append(Candidate(name, path, replace(config, quantization=name)))
    for asked in variants:
        found.append(Candidate(asked, path, replace(config, **_options(asked))))
    for other in others:
        found.append(Candidate(other, resolve_model(other), config))
    return found


def _options(asked: str) -> Mapping[str, Any]:
    """`dtype=float32,quantization=q8_0` as fields of EngineConfig. Raises ConfigError."""
    default = asdict(EngineConfig())
    words = {name for name, value in default.items() if isinstance(value, str)} | {"quantization"}
    given: dict[str, str | None] = {}
    for part in asked.split(","):
        name, equals, value = part.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        value = value.strip()
        if not equals or name not in words:
            raise ConfigError(
                f"--variant {asked}: {part!r} is not OPTION=VALUE with one of "
                f"{', '.join(sorted(words))}"
            )
        if name in given:
            raise ConfigError(f"--variant {asked}: {name} is there twice; give it one value")
        given[name] = None if value == _NONE else value
    return given


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each, under a head; changes of bits per byte are in percent of the first's."""
    from moebius.engine.plan_words import human_bytes

    first = records[0]["bits_per_byte"]
    head = ("model", "weights", "bits per byte", "change", "divergence", "same choice")
    lines: list[tuple[str, ...]] = [head]
    for each in records:
        bits = each["bits_per_byte"]
        lines.append(
            (
                str(each["label"]),
                human_bytes(each["weight_bytes"]),
                f"{bits:.4f}",
                f"{100 * (bits / first - 1):+.2f} %",
                f"{each['mean_divergence']:.5f}",
                f"{100 * each['same_choice']:.1f} %",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    tokens = f"{records[0]['tokens']:,} tokens, {records[0]['bytes']:,} bytes of text"
    rows = []
    for label, *cells in lines:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        rows.append("  ".join([label.ljust(widths[0]), *right]))
    return "\n".join([*rows, tokens])
